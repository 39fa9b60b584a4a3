"""Int8 beside its peers: `python benchmarks/quantization.py MNIST_DIR CIFAR10_DIR WEIGHTS_DIR`.

LeNet-5 (MNIST), a MobileNetV3-like network (digits), ResNet-20 and ResNet-56 (CIFAR-10 as JPEG files): float32, ours by
target and range method and after quantization-aware training, onnxruntime's `quantize_static` (pre-processed, per
channel, uint8 activations and int8 weights, by calibration method) and NNCF's `quantize` (by preset), all from one ONNX
file and the same calibration samples. File size, latency beside float32 in one session, SQNR of the logits against
float32's, and accuracy, on the test images. Then the same of ours after half the channels are gone.

Peers need `pip install '.[peers]'`. What is done is kept under runs/, and the same command goes on from there.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "pipelines"), str(ROOT / "benchmarks")]  # the examples' models and data

import cifar10
import digits
import mnist
from publish import cpu, link, publish

from compressor.export.to_onnx import to_onnx
from compressor.measure.latency import time_models
from compressor.measure.model import measure
from compressor.models.artifact import OnnxModel, TorchModel
from compressor.onnx_files.writing import compact, write
from compressor.quantization.analysis import sqnr_db
from compressor.records.environment import environment
from compressor.records.measurements import Latency
from compressor.references.reference import Reference
from compressor.stage import StageContext
from compressor.stages.int8_ptq import Int8Ptq
from compressor.stages.int8_qat import Int8Qat
from compressor.stages.magnitude_pruning import MagnitudePruning
from compressor.stages.training import Training
from compressor.task import Samples, Task, evenly_spaced, gather
from compressor.text.figures import size, size_ratio, speed

NETWORKS = ("lenet5", "mobile", "resnet20", "resnet56")
PRUNED = ("lenet5", "prunable_resnet56")
TARGETS, RANGES = ("portable", "x86-vnni"), ("minmax", "moving_average", "entropy", "mse")
ORT_METHODS, NNCF_PRESETS = ("MinMax", "Entropy", "Percentile"), ("performance", "mixed")
CALIBRATION_SAMPLES = 256
SHOWN = {
    "float32",
    "int8_ptq, portable",
    "int8_ptq, portable, keep_float: auto",
    "int8_ptq, portable, rounding: learned",
    "int8_ptq, x86-vnni",
    "int8_qat, portable",
    "quantize_static, all defaults",
    "quantize_static tuned, Percentile",
    "NNCF, performance",
}
"""What docs/results.md shows of them."""
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "lenet5": {"epochs": 3, "batch_size": 128},
    "mobile": {"epochs": 60, "batch_size": 64, "optimizer": {"learning_rate": 0.003}},
    "qat": {"epochs": 2, "batch_size": 64},
    "pruning": {"pruning_ratio": 0.5, "round_to": 8, "recovery": {"epochs": 2, "batch_size": 64}},
}


def main() -> None:
    """Make what is not there yet, time each network's files in one session, then print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("mnist_dir", type=Path)
    parser.add_argument("cifar10_dir", type=Path)
    parser.add_argument("weights_dir", type=Path)
    parser.add_argument("--only", nargs="*", default=[*NETWORKS, *(f"{name} pruned" for name in PRUNED)])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name in arguments.only:
        network = name.removesuffix(" pruned")
        task = task_of(network, arguments.mnist_dir, arguments.cifar10_dir)
        directory = ROOT / "runs" / "benchmark_quantization" / name
        baseline = stored(directory / "baseline", partial(trained, network, task, arguments.weights_dir))
        if name == network:
            rows += compared(name, directory, task, {**ours(baseline, task), **peers(baseline, task, directory)})
        else:
            pruned = stored(directory / "pruned", partial(cut, baseline, task))
            rows += compared(name, directory, task, ours(pruned, task, reference=baseline, short=True))
    chosen = "" if len(arguments.only) == len(NETWORKS) + len(PRUNED) else f" --only {' '.join(arguments.only)}"
    facts = environment()
    result = {
        "settings": SETTINGS,
        "calibration_samples": CALIBRATION_SAMPLES,
        "rows": rows,
        "environment": {**facts, "versions": {**facts["versions"], "nncf": version("nncf")}},
    }
    command = f"python benchmarks/quantization.py MNIST_DIR CIFAR10_DIR WEIGHTS_DIR{chosen}"
    publish("quantization", command, result, table)


Make = Callable[[Path], OnnxModel]
"""Writes a model as ONNX into an empty directory."""


def ours(model: TorchModel, task: Task, *, reference: TorchModel | None = None, short: bool = False) -> dict[str, Make]:
    """By name, what makes each of our files: float32 first."""
    context = partial(StageContext, reference or model, torch.device("cpu"), 0, log=print)

    def ptq(settings: Mapping[str, Any]) -> Make:
        stage = Int8Ptq.model_validate_json(json.dumps({"calibration_samples": CALIBRATION_SAMPLES, **settings}))
        return lambda directory: stage.apply(model, task, context(work_dir=directory))

    def qat(settings: Mapping[str, Any]) -> Make:
        made = {"calibration_samples": CALIBRATION_SAMPLES, **SETTINGS["qat"], **settings}
        stage = Int8Qat.model_validate_json(json.dumps(made))
        return lambda directory: stage.apply(model, task, context(work_dir=directory))

    found: dict[str, Make] = {"float32": lambda directory: to_onnx(model.module, task, directory / "model.onnx")}
    for target in TARGETS:
        found[f"int8_ptq, {target}"] = ptq({"target": target})
    found["int8_ptq, portable, keep_float: auto"] = ptq({"keep_float": "auto"})
    found["int8_qat, portable"] = qat({})
    if not short:
        found["int8_ptq, portable, rounding: learned"] = ptq({"rounding": "learned"})
    for method in () if short else RANGES:
        found[f"int8_ptq, x86-vnni, ranges: {method}"] = ptq({"target": "x86-vnni", "ranges": method})
    return found


def peers(model: TorchModel, task: Task, directory: Path) -> dict[str, Make]:
    """By name, what makes each peer's file."""
    file = directory / "for_peers.onnx"
    to_onnx(model.module, task, file)
    return {
        "quantize_static, all defaults": partial(by_onnxruntime, file, task, None),
        **{f"quantize_static tuned, {method}": partial(by_onnxruntime, file, task, method) for method in ORT_METHODS},
        **{f"NNCF, {preset}": partial(by_nncf, file, task, preset) for preset in NNCF_PRESETS},
    }


def by_onnxruntime(file: Path, task: Task, method: str | None, directory: Path) -> OnnxModel:
    """ONNX Runtime's static quantization: as its documentation says for x86, or, without `method`, all defaults."""
    from onnxruntime.quantization import (  # noqa: PLC0415  # it configures logging
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process  # noqa: PLC0415

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # its interface
        def __init__(self) -> None:
            self.batches = ({"input": array} for array in calibration_arrays(task, batch_size=32))

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.batches, None)

    result = directory / "model.onnx"
    if method is None:
        quantize_static(file, result, Reader())
        return OnnxModel(result)
    prepared = directory / "prepared.onnx"
    quant_pre_process(file, prepared)
    quantize_static(
        prepared,
        result,
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod[method],
    )
    return OnnxModel(result)


def by_nncf(file: Path, task: Task, preset: str, directory: Path) -> OnnxModel:
    """NNCF's post-training quantization of the same file."""
    import nncf  # noqa: PLC0415  # an extra

    data = nncf.Dataset(list(calibration_arrays(task, batch_size=1)), lambda array: {"input": array})
    chosen = {"performance": nncf.QuantizationPreset.PERFORMANCE, "mixed": nncf.QuantizationPreset.MIXED}[preset]
    quantized = nncf.quantize(onnx.load(file), data, preset=chosen, subset_size=CALIBRATION_SAMPLES)
    onnx.save(quantized, directory / "model.onnx")
    return OnnxModel(directory / "model.onnx")


def calibration_arrays(task: Task, *, batch_size: int) -> Iterator[np.ndarray]:
    """The samples on which ours calibrates, so many at a time."""
    indices = evenly_spaced(task.calibration, CALIBRATION_SAMPLES)
    for start in range(0, len(indices), batch_size):
        yield gather(task.calibration, indices[start : start + batch_size]).inputs[0].numpy()


def compared(name: str, directory: Path, task: Task, makers: Mapping[str, Make]) -> list[dict[str, Any]]:
    """Figures of each file, of which the first is float32, and its latency beside the first."""
    files = {}
    for maker, make in makers.items():
        place = directory / maker.replace(":", "").replace(", ", "_").replace(" ", "_")
        file, done = place / "model.onnx", place / "done"
        if not done.exists():
            place.mkdir(parents=True, exist_ok=True)
            print(f"{name}: {maker}", flush=True)
            make(place)
            done.touch()
        files[maker] = file
    wanted = OnnxModel(next(iter(files.values()))).predict(task.test.inputs)
    rows = []
    for maker, file in files.items():
        measured = measure(file, task).measurement
        stripped = file.with_name("stripped.onnx")
        write(compact(onnx.load(file)), stripped)
        rows.append(
            {
                "network": name,
                "maker": maker,
                "size_bytes": measured.size_bytes,
                "stripped_bytes": stripped.stat().st_size,
                "sqnr_db": sqnr_db([OnnxModel(file).predict(task.test.inputs)], [wanted]),
                "accuracy": measured.metrics["accuracy"],
            }
        )
    times, session = time_models(tuple(files.values()), inputs=[task.example_inputs[0][:1].numpy()], max_seconds=8)
    return [
        {**row, "latency": time.model_dump(), "latency_session": session.model_dump()}
        for row, time in zip(rows, times, strict=True)
    ]


def task_of(network: str, mnist_dir: Path, cifar10_dir: Path) -> Task:
    """The task of a network."""
    match network:
        case "lenet5":
            return mnist.task(mnist_dir)
        case "mobile":
            small = digits.task()
            return replace(
                small,
                **{name: enlarged(getattr(small, name)) for name in ("train", "validation", "test", "calibration")},
                example_inputs=(enlarged(small.train).inputs[0][:2],),
            )
    return cifar10.task(cifar10_dir)


def enlarged(split: Samples) -> Samples:
    """Digits as images of three channels, (N, 3, 16, 16)."""
    images = F.interpolate(split.inputs[0], size=16, mode="bilinear").expand(-1, 3, -1, -1)
    return Samples((images.contiguous(),), split.targets)


def trained(network: str, task: Task, weights_dir: Path) -> TorchModel:
    """The network with weights: of a file, or of a short training."""
    match network:
        case "resnet20" | "resnet56":
            file = str(weights_dir / f"{network}_cifar10.safetensors")
            return TorchModel.build(Reference(factory=f"cifar10:{network}", weights_file=file), seed=0)
        case "prunable_resnet56":
            path = weights_dir / "resnet56_cifar10.safetensors"
            reference = Reference(factory="cifar10:prunable_resnet56", weights_path=str(path))
            return TorchModel(cifar10.prunable_resnet56(path).eval(), reference)
    factory = {"lenet5": "mnist:lenet5", "mobile": "mobile_network:MobileNetwork"}[network]
    model = TorchModel.build(Reference(factory=factory), seed=0)
    context = StageContext(model, torch.device("cpu"), 0, Path(), print)
    return Training.model_validate_json(json.dumps(SETTINGS[network])).apply(model, task, context)


def cut(model: TorchModel, task: Task) -> TorchModel:
    """The network with half the channels of each group."""
    context = StageContext(model, torch.device("cpu"), 0, Path(), print)
    return MagnitudePruning.model_validate_json(json.dumps(SETTINGS["pruning"])).apply(model, task, context)


def stored(directory: Path, make: Callable[[], TorchModel]) -> TorchModel:
    """Take a model from a directory, or make it and put it there."""
    if not (directory / "model.json").exists():
        directory.mkdir(parents=True, exist_ok=True)
        make().save(directory)
    return TorchModel.load(directory)


def table(result: Mapping[str, Any]) -> str:
    """The result as Markdown: a table with a part for each network."""
    lines = ["| | size | | latency | SQNR, dB | accuracy |", "|---|--:|--:|--:|--:|--:|"]
    noises: list[str] = []
    for name in dict.fromkeys(row["network"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["network"] == name]
        session = rows[0]["latency_session"]
        noise = Latency.model_validate(session["noise"]).interval.distance
        lines.append(f"| **{name}** | | | | | |")
        for row in (row for row in rows if row["maker"] in SHOWN):
            first, sqnr = row is rows[0], row["sqnr_db"]
            smaller = "" if first else size_ratio(rows[0]["stripped_bytes"], row["stripped_bytes"])
            faster = "" if first else speed(Latency.model_validate(row["latency"]))
            lines.append(
                f"| {row['maker']} | {size(row['stripped_bytes'])} | {smaller} | {faster} | "
                f"{'' if sqnr is None else f'{sqnr:.1f}'} | {100 * row['accuracy']:.2f} % |"
            )
        noises.append(f"{100 * noise:.1f} % ({name})")
    facts = result["environment"]
    versions = facts["versions"]
    lines += [
        "",
        f"<sub>`{result['command']}`, {result['date']}: one seed, test images, batch 1 on one thread, sizes without "
        f"metadata; a latency session for each network: in each, the baseline timed against itself differs by up to "
        f"{', '.join(noises)}. {cpu(facts)}, torch {versions['torch']}, "
        f"onnxruntime {versions['onnxruntime']}, NNCF {versions['nncf']}; all of it in {link('quantization')}, "
        f"with all range methods. Times on x86 without VNNI and on ARM: not measured.</sub>",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
