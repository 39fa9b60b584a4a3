"""What zeros cost and bring: `python benchmarks/sparsity.py MNIST_DIR CIFAR10_DIR WEIGHTS_FILE`.

LeNet-300-100 and LeNet-5 on MNIST: `weight_pruning` with LAMP in cubic steps, recovery by distillation, then int8 and
gzip, beside what Han et al. 2015 (arXiv 1506.02626 and 1510.00149) report. ResNet-56 on CIFAR-10 as JPEG files: LAMP
against uniform and global allocation after the same short recovery. What is reported
is the accuracy on the test images after the last step.

What is done is kept under runs/, and the same command goes on from there.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "pipelines")]  # the examples' models and data

import cifar10
import mnist
from publish import cpu, link, publish

from compressor.export.to_onnx import to_onnx
from compressor.measure.model import measure
from compressor.models.artifact import OnnxModel, TorchModel
from compressor.records.environment import environment
from compressor.references.reference import Reference
from compressor.stage import StageContext
from compressor.stages.int8_ptq import Int8Ptq
from compressor.stages.soft_labels import SoftLabels
from compressor.stages.training import Training
from compressor.stages.weight_pruning import WeightPruning
from compressor.task import Task
from compressor.text.figures import size, size_ratio
from quantization import stored

SEEDS = (0, 1)
LENETS, LENET_SPARSITIES = ("lenet_300_100", "lenet5"), (0.93, 0.96)
REPORTED = {"lenet_300_100": {"fewer": 12, "smaller": 40}, "lenet5": {"fewer": 12, "smaller": 39}}
"""Non-zeros and bytes: Han et al. 2015 and Deep Compression, tables 1 of both."""
ALLOCATIONS, RESNET_SPARSITIES = ("lamp", "global", "uniform"), (0.9, 0.97)
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "lenet_training": {"epochs": 10, "batch_size": 128},
    "lenet_pruning": {
        "allocation": "lamp",
        "schedule": {"shape": "cubic", "steps": 4},
        "recovery": {"batch_size": 128},
    },
    "lenet_recovery": {
        "lenet_300_100": {
            "epochs": 40,
            "losses": {"kd": {"temperature": 2.0, "weight": 0.5}, "hard": {"weight": 0.5}},
        },
        "lenet5": {"epochs": 12},
    },
    "resnet_pruning": {
        "recovery": {"epochs": 1, "batch_size": 64, "optimizer": {"name": "sgd", "learning_rate": 0.03}},
    },
}
"""Chosen on validation images at seed 0: the learning rate as the better of 0.01 and 0.03 in the mean over allocations,
the losses of LeNet-300-100 as the best of these, `hard` alone and the default."""


def main() -> None:
    """Run what is not there yet, then print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("mnist_dir", type=Path)
    parser.add_argument("cifar10_dir", type=Path)
    parser.add_argument("weights_file", type=Path)
    parser.add_argument("--jobs", type=int, default=2, help="Processes, of one thread each.")
    arguments = parser.parse_args()
    kept = ROOT / "runs" / "benchmark_sparsity"
    kept.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(arguments.jobs) as pool:
        where = {"data_dir": arguments.cifar10_dir, "weights_file": arguments.weights_file, "kept": kept}
        resnet = [
            pool.submit(resnet56, seed, allocation, sparsity, **where)
            for seed in SEEDS
            for sparsity in RESNET_SPARSITIES
            for allocation in ALLOCATIONS
        ]
        lenets = [pool.submit(lenet, seed, name, arguments.mnist_dir, kept) for seed in SEEDS for name in LENETS]
        found = [row for job in lenets for row in job.result()]
        allocations = [job.result() for job in resnet]
    result = {
        "settings": SETTINGS,
        "lenets": found,
        "reported_by_han_et_al": REPORTED,
        "resnet56": allocations,
        "environment": environment(),
    }
    publish("sparsity", "python benchmarks/sparsity.py MNIST_DIR CIFAR10_DIR WEIGHTS_FILE", result, table)


def lenet(seed: int, name: str, data_dir: Path, kept: Path) -> list[dict[str, Any]]:
    """Figures of one LeNet: dense, then at each sparsity as float and as int8."""
    torch.set_num_threads(1)
    task = replace(mnist.task(data_dir), augmentation=None)
    dense = TorchModel.build(Reference(factory=f"mnist:{name}"), seed=seed)
    directory = kept / f"{name}{seed}"

    def context(reference: TorchModel, part: str) -> StageContext:
        work_dir = directory / part
        work_dir.mkdir(parents=True, exist_ok=True)
        return StageContext(
            reference, torch.device("cpu"), seed, work_dir, lambda line: print(f"{name} {seed}: {line}")
        )

    def trained() -> TorchModel:
        return Training(**SETTINGS["lenet_training"]).apply(dense, task, context(dense, "training"))

    baseline = stored(directory / "baseline", trained)
    rows = [figures(baseline, task, directory, "dense", seed=seed, network=name, sparsity=0.0)]
    for sparsity in LENET_SPARSITIES:
        recovery = {**SETTINGS["lenet_pruning"]["recovery"], **SETTINGS["lenet_recovery"][name]}
        settings = {**SETTINGS["lenet_pruning"], "recovery": recovery, "sparsity": sparsity}
        pruning = WeightPruning.model_validate_json(json.dumps(settings))
        part = f"pruned{sparsity}"

        def pruned(pruning: WeightPruning = pruning, part: str = part) -> TorchModel:
            return pruning.apply(baseline, task, context(baseline, part))

        sparse = stored(directory / f"{part}_model", pruned)
        rows.append(figures(sparse, task, directory, part, seed=seed, network=name, sparsity=sparsity))
        int8 = Int8Ptq().apply(sparse, task, context(baseline, f"int8{sparsity}"))
        rows.append(figures(int8, task, directory, f"{part}_int8", seed=seed, network=name, sparsity=sparsity))
    return rows


def resnet56(
    seed: int, allocation: str, sparsity: float, *, data_dir: Path, weights_file: Path, kept: Path
) -> dict[str, Any]:
    """Test accuracy of ResNet-56 with so many zeros, shared out in one way, after a short recovery."""
    torch.set_num_threads(1)
    directory = kept / f"resnet56_{allocation}_{sparsity}_{seed}"
    directory.mkdir(exist_ok=True)
    file = directory / "result.json"
    settings = json.loads(json.dumps({**SETTINGS["resnet_pruning"], "allocation": allocation, "sparsity": sparsity}))
    if not file.exists() or json.loads(file.read_text())["settings"] != settings:
        task = cifar10.task(data_dir)
        teacher = TorchModel.build(Reference(factory="cifar10:resnet56", weights_file=str(weights_file)), seed=seed)
        context = StageContext(
            teacher, torch.device("cpu"), seed, directory, lambda line: print(f"{directory.name}: {line}")
        )
        answered = SoftLabels(views=1).apply(teacher, task, context)
        start = time.perf_counter()
        pruning = WeightPruning.model_validate_json(json.dumps(settings))
        sparse = pruning.apply(answered, task, replace(context, reference=answered))
        facts = figures(sparse, task, directory, "model", seed=seed, network="resnet56", sparsity=sparsity)
        seconds = time.perf_counter() - start
        file.write_text(json.dumps({"settings": settings, **facts, "allocation": allocation, "seconds": seconds}))
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def figures(model: TorchModel | OnnxModel, task: Task, directory: Path, part: str, **facts: Any) -> dict[str, Any]:
    """Size, non-zeros and accuracy of a model in its ONNX form, after `facts`."""
    onnx = model if isinstance(model, OnnxModel) else to_onnx(model.module, task, directory / f"{part}.onnx")
    measured = measure(onnx.path, task).measurement
    return {
        **facts,
        "int8": isinstance(model, OnnxModel),
        "parameters": measured.parameters,
        "nonzero": measured.nonzero,
        "size_bytes": measured.size_bytes,
        "transfer_bytes": measured.transfer_bytes,
        "accuracy": measured.metrics["accuracy"],
    }


def table(result: Mapping[str, Any]) -> str:
    """The result as Markdown."""
    lines = [
        "| MNIST | fewer non-zeros | accuracy, dense to sparse | int8 and gzip | beside dense | accuracy, int8 |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name in LENETS:
        rows = [row for row in result["lenets"] if row["network"] == name]
        dense = [row for row in rows if row["sparsity"] == 0]
        for sparsity in LENET_SPARSITIES:
            sparse, int8 = (
                [row for row in rows if row["sparsity"] == sparsity and row["int8"] == whether]
                for whether in (False, True)
            )
            fewer = dense[0]["parameters"] / mean(sparse, "nonzero")
            transfer_bytes = round(mean(int8, "transfer_bytes"))
            smaller = size_ratio(round(mean(dense, "size_bytes")), transfer_bytes)
            lines.append(
                f"| {name} | {fewer:.1f}x | {percent(dense)} to {percent(sparse)} | "
                f"{size(transfer_bytes)} | {smaller} | {percent(int8)} |"
            )
        reported = REPORTED[name]
        lines.append(f"| {name}, Han et al. 2015 | {reported['fewer']}x |  |  | {reported['smaller']}x smaller |  |")
    lines += ["", "| ResNet-56, accuracy | " + " | ".join(ALLOCATIONS) + " |", "|---|" + "--:|" * len(ALLOCATIONS)]
    for sparsity in RESNET_SPARSITIES:
        cells = [
            percent([r for r in result["resnet56"] if (r["allocation"], r["sparsity"]) == (allocation, sparsity)])
            for allocation in ALLOCATIONS
        ]
        lines.append(f"| {sparsity:.0%} zeros, one epoch of recovery | " + " | ".join(cells) + " |")
    facts = result["environment"]
    source = (
        f"<sub>`{result['command']}`, {result['date']}: {len(SEEDS)} seeds, mean ± standard deviation on all test "
        f"images; the dense file is float32, not compressed. {cpu(facts)}, torch {facts['versions']['torch']}; "
        f"all of it in {link('sparsity')}.</sub>"
    )
    return "\n".join([*lines, "", source])


def mean(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    """Mean of a figure over seeds."""
    return statistics.fmean(row[name] for row in rows)


def percent(rows: Sequence[Mapping[str, Any]]) -> str:
    """Mean and standard deviation of the accuracy over seeds, in percent."""
    accuracies = [100 * row["accuracy"] for row in rows]
    return f"{statistics.fmean(accuracies):.2f} ± {statistics.stdev(accuracies):.2f} %"


if __name__ == "__main__":
    main()
