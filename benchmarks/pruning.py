"""Channel pruning of ResNet-56: `python benchmarks/pruning.py CIFAR10_DIR WEIGHTS_FILE`.

At a half, a third and a quarter of the MACs, with one epoch of recovery: `magnitude_pruning` that recovers by
distillation from soft labels, the same that recovers by labels alone, and Torch-Pruning's own cut of this network
(`GroupNormPruner`, global ranking, in small steps to the target) through its public API, then labels. Accuracy on the
test images after the last step; cuts are made once, seeds differ in recovery. Latency of every model beside the dense
one's, under ONNX Runtime on one thread. Then the goals `latency_ratio` 2 and 3, searched for and measured again in
another session.

Cuts and recovered models are kept under runs/, and the same command goes on from there.
"""

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "pipelines")]  # the example's models and data

import cifar10
from publish import cpu, link, publish

from compressor.distillation.distillation_settings import DistillationSettings
from compressor.distillation.recovery import recover
from compressor.export.to_onnx import to_onnx
from compressor.measure.latency import time_models
from compressor.measure.model import measure
from compressor.models.artifact import TorchModel
from compressor.models.edits import structural_edits
from compressor.records.environment import environment
from compressor.records.findings import Finding, Reached
from compressor.records.measurements import Latency
from compressor.references.reference import Reference
from compressor.stage import StageContext
from compressor.stages.magnitude_pruning import MagnitudePruning
from compressor.stages.soft_labels import SoftLabels
from compressor.task import Task
from compressor.text.figures import speed, times

SEEDS, FACTORS, LATENCY_GOALS, GOAL_ROUND_TO = (0, 1, 2), (2, 3, 4), (2.0, 3.0), 4
COURSE = {"epochs": 1, "batch_size": 64}
GENTLE, FAST = ({"name": "sgd", "learning_rate": rate, "weight_decay": 5e-4} for rate in (0.005, 0.02))
"""Chosen on validation images, at a third of the MACs and seed 0: for distillation of 0.003, 0.005 (as good) and 0.01,
for labels of 0.005, 0.02 and 0.05. The gradients of kd are larger, by its squared temperature."""
CUT = {"criterion": "taylor", "allocation": "global", "round_to": 1}
KD, HARD = {"kd": {"temperature": 4.0, "weight": 0.9}, "hard": {"weight": 0.1}}, {"hard": {}}
RECOVERIES: Mapping[str, Mapping[str, Any]] = {
    "distilled": {**COURSE, "optimizer": GENTLE, "losses": KD},
    "labels": {**COURSE, "optimizer": FAST, "losses": HARD},
    "torch_pruning": {**COURSE, "optimizer": FAST, "losses": HARD},
}
NAMES = {
    "distilled": "compressor, distilled",
    "labels": "compressor, labels",
    "torch_pruning": "Torch-Pruning, labels",
}


def main() -> None:
    """Run what is not there yet, then print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("cifar10_dir", type=Path)
    parser.add_argument("weights_file", type=Path)
    parser.add_argument("--jobs", type=int, default=2, help="Processes, of one thread each.")
    arguments = parser.parse_args()
    kept = ROOT / "runs" / "benchmark_pruning"
    kept.mkdir(parents=True, exist_ok=True)
    where = {"data_dir": arguments.cifar10_dir, "weights_file": arguments.weights_file, "kept": kept}
    with ProcessPoolExecutor(arguments.jobs) as pool:
        list(pool.map(partial(prepared, **where), SEEDS))
        jobs = [
            pool.submit(point, seed, method, factor, data_dir=arguments.cifar10_dir, kept=kept)
            for seed in SEEDS
            for factor in FACTORS
            for method in RECOVERIES
        ]
        points = [job.result() for job in jobs]
    torch.set_num_threads(1)
    dense, task = stored(kept / "dense0"), cifar10.task(arguments.cifar10_dir)
    files = {"dense": to_onnx(dense.module, task, kept / "dense.onnx").path}
    files |= {
        f"{method} {factor}": kept / f"{method}_{factor}_0" / "model.onnx"
        for method in RECOVERIES
        for factor in FACTORS
    }
    goals = {f"goal {asked}": latency_goal(asked, dense, task, kept) for asked in LATENCY_GOALS}
    files |= {name: kept / f"{name}.onnx" for name in goals}
    times, session = time_models(tuple(files.values()), inputs=[task.example_inputs[0][:1].numpy()])
    result = {
        "cut": CUT,
        "recoveries": RECOVERIES,
        "dense": facts(dense, task, kept / "dense.onnx"),
        "points": points,
        "latency_goals": goals,
        "latencies": {name: one.model_dump() for name, one in zip(files, times, strict=True)},
        "latency_session": session.model_dump(),
        "environment": environment(),
    }
    publish("pruning", "python benchmarks/pruning.py CIFAR10_DIR WEIGHTS_FILE", result, table)


def prepared(seed: int, *, data_dir: Path, weights_file: Path, kept: Path) -> None:
    """Keep ResNet-56 with its answers to a seed's views and, for one seed, its cuts."""
    torch.set_num_threads(1)
    directory, task = kept / f"dense{seed}", cifar10.task(data_dir)
    if not (directory / "model.json").exists():
        reference = Reference(factory="cifar10:prunable_resnet56", weights_path=str(weights_file))
        model = TorchModel(cifar10.prunable_resnet56(weights_file).eval(), reference)
        directory.mkdir(exist_ok=True)
        work_dir = kept / f"labels{seed}"
        work_dir.mkdir(exist_ok=True)
        SoftLabels(views=COURSE["epochs"]).apply(model, task, context(model, work_dir, seed)).save(directory)
    dense = stored(directory)
    for factor in FACTORS if seed == SEEDS[0] else ():
        for whose in ("compressor", "torch_pruning"):
            cut = kept / f"cut_{whose}_{factor}"
            if not (cut / "model.json").exists():
                cut.mkdir(exist_ok=True)
                macs = facts(dense, task, cut / "dense.onnx")["macs"] // factor
                if whose == "compressor":
                    smaller = MagnitudePruning(macs=macs, **CUT).apply(dense, task, context(dense, cut, seed))
                else:
                    smaller = cut_by_torch_pruning(dense, task, factor=factor)
                smaller.save(cut)


def cut_by_torch_pruning(model: TorchModel, task: Task, *, factor: int) -> TorchModel:
    """Take up to 400 small steps of global group norms until the MACs are reached, as its reproduction script does."""
    module = copy.deepcopy(model.module)
    inputs = task.example_inputs[0][:1]
    pruner = tp.pruner.GroupNormPruner(
        module,
        inputs,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        global_pruning=True,
        pruning_ratio=1.0,
        iterative_steps=400,
        ignored_layers=[module.linear],
    )
    macs, _ = tp.utils.count_ops_and_params(module, inputs)
    while macs / tp.utils.count_ops_and_params(module, inputs)[0] < factor:
        pruner.step()
    return model.with_module(module, *structural_edits(model.module, module))


def point(seed: int, method: str, factor: int, *, data_dir: Path, kept: Path) -> dict[str, Any]:
    """Accuracy and size of ResNet-56 with 1 / `factor` of its MACs, after recovery."""
    torch.set_num_threads(1)
    directory = kept / f"{method}_{factor}_{seed}"
    directory.mkdir(exist_ok=True)
    file, settings = directory / "result.json", json.loads(json.dumps([CUT, RECOVERIES[method]]))
    if not file.exists() or json.loads(file.read_text())["settings"] != settings:
        task, dense = cifar10.task(data_dir), stored(kept / f"dense{seed}")
        whose = "torch_pruning" if method == "torch_pruning" else "compressor"
        recovery = DistillationSettings.model_validate_json(json.dumps(RECOVERIES[method]))
        start = time.perf_counter()
        model = recover(stored(kept / f"cut_{whose}_{factor}"), recovery, task, context(dense, directory, seed))
        seconds = time.perf_counter() - start
        found = facts(model, task, directory / "model.onnx")
        about = {"method": method, "factor": factor, "seed": seed}
        file.write_text(json.dumps({"settings": settings, **about, **found, "seconds": seconds}))
    result: dict[str, Any] = json.loads(file.read_text())
    return result


def latency_goal(asked: float, dense: TorchModel, task: Task, kept: Path) -> dict[str, Any]:
    """Search for a model that is `asked` times as fast; what the search measured, and what the model has left."""
    found: dict[str, Any] = {"asked": asked}

    def report(finding: Finding) -> None:
        if isinstance(finding, Reached):
            found["achieved"] = finding.achieved

    directory = kept / f"goal {asked}"
    directory.mkdir(exist_ok=True)
    stage = MagnitudePruning(latency_ratio=asked, **{**CUT, "round_to": GOAL_ROUND_TO})
    start = time.perf_counter()
    model = stage.apply(dense, task, replace(context(dense, directory, 0), report=report))
    found["seconds"] = time.perf_counter() - start
    return {**found, **facts(model, task, kept / f"goal {asked}.onnx")}


def context(reference: TorchModel, directory: Path, seed: int) -> StageContext:
    """What a stage is told; its lines begin with the name of `directory`."""
    return StageContext(
        reference, torch.device("cpu"), seed, directory, lambda line: print(f"{directory.name}: {line}", flush=True)
    )


def stored(directory: Path) -> TorchModel:
    """Take a model from a directory."""
    return TorchModel.load(directory)


def facts(model: TorchModel, task: Task, file: Path) -> dict[str, Any]:
    """Size, MACs and accuracy of a model in its ONNX form."""
    measured = measure(to_onnx(model.module, task, file).path, task).measurement
    return {
        "macs": measured.macs,
        "parameters": measured.parameters,
        "size_bytes": measured.size_bytes,
        "accuracy": measured.metrics["accuracy"],
    }


def table(result: Mapping[str, Any]) -> str:
    """The result as Markdown."""
    dense, latencies = result["dense"], result["latencies"]
    lines = [
        "| fewer MACs | method | accuracy | latency | parameters |",
        "|--:|---|--:|--:|--:|",
        f"| 1x | ResNet-56 | {100 * dense['accuracy']:.2f} % |  | {dense['parameters']:,} |",
    ]
    for factor in FACTORS:
        for method, name in NAMES.items():
            points = [one for one in result["points"] if (one["method"], one["factor"]) == (method, factor)]
            accuracies = [100 * one["accuracy"] for one in points]
            fewer = dense["macs"] / points[0]["macs"]
            found = f"{statistics.fmean(accuracies):.1f} ± {statistics.stdev(accuracies):.1f} %"
            faster = speed(Latency.model_validate(latencies[f"{method} {factor}"]))
            lines.append(f"| {fewer:.2f}x | {name} | {found} | {faster} | {points[0]['parameters']:,} |")
    lines += [
        "",
        "| `latency_ratio` asked | achieved in the search | measured again | fewer MACs |",
        "|--:|--:|--:|--:|",
    ]
    for name, goal in result["latency_goals"].items():
        achieved = times(goal["achieved"], "faster", "slower")
        again = speed(Latency.model_validate(latencies[name]))
        lines.append(f"| {goal['asked']}x | {achieved} | {again} | {dense['macs'] / goal['macs']:.2f}x |")
    environment_facts = result["environment"]
    versions = ", ".join(f"{name} {environment_facts['versions'][name]}" for name in ("torch", "torch-pruning"))
    source = (
        f"<sub>`{result['command']}`, {result['date']}: CIFAR-10 as JPEG files, one epoch of recovery, {len(SEEDS)} "
        f"seeds, mean ± standard deviation. {cpu(environment_facts)}, {versions}; all of it in {link('pruning')}.</sub>"
    )
    return "\n".join([*lines, "", source])


if __name__ == "__main__":
    main()
