"""What the latency method is worth on this machine: false differences, a 5 % slowdown, spread under load, cold caches.

`python benchmarks/latency.py` takes 10 minutes on a calm machine, 40 on a busy one, and writes
benchmarks/results/latency.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from publish import publish

from compressor.measure.latency import time_models
from compressor.onnx_files.inputs import random_inputs
from compressor.onnx_files.runtime import open_session
from compressor.records.environment import environment
from compressor.records.measurements import Latency


def conv_net(path: Path, *layers: tuple[int, int]) -> Path:
    """Write a chain of convolutions with ReLU on (N, 1, 28, 28); a layer is (output channels, kernel size)."""
    nodes, weights, channels = [], [], 1
    for index, (units, kernel) in enumerate(layers):
        weights.append(_weight(f"w{index}", (units, channels, kernel, kernel)))
        names = [f"t{index}", f"w{index}"]
        nodes.append(helper.make_node("Conv", names, [f"c{index}"], pads=[kernel // 2] * 4))
        nodes.append(helper.make_node("Relu", [f"c{index}"], [f"t{index + 1}"]))
        channels = units
    nodes.append(helper.make_node("GlobalAveragePool", [f"t{len(layers)}"], ["y"]))
    return _save(path, nodes, weights)


def dense_net(path: Path, *units: int) -> Path:
    """Write a chain of matrix products with ReLU on (N, 1, 28, 28), flattened."""
    nodes, weights, width = [helper.make_node("Flatten", ["t0"], ["r0"])], [], 784
    for index, wider in enumerate(units):
        weights.append(_weight(f"w{index}", (width, wider)))
        nodes.append(helper.make_node("MatMul", [f"r{index}", f"w{index}"], [f"m{index}"]))
        nodes.append(helper.make_node("Relu", [f"m{index}"], [f"r{index + 1}"]))
        width = wider
    nodes.append(helper.make_node("Identity", [f"r{len(units)}"], ["y"]))
    return _save(path, nodes, weights)


def _weight(name: str, shape: tuple[int, ...]) -> onnx.TensorProto:
    return numpy_helper.from_array(0.05 * np.random.default_rng(0).standard_normal(shape, dtype=np.float32), name)


def _save(path: Path, nodes: Sequence[onnx.NodeProto], weights: Sequence[onnx.TensorProto]) -> Path:
    inputs = [helper.make_tensor_value_info("t0", TensorProto.FLOAT, ["batch", 1, 28, 28])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    graph = helper.make_graph(nodes, path.stem, inputs, outputs, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def write_models(directory: Path) -> dict[str, Path]:
    """The models that the experiments compare, from 7 µs to 1.1 ms on the machine of the committed results."""
    body = ((32, 3), (32, 3), (32, 3))
    return {
        "conv": conv_net(directory / "conv.onnx", *body),
        "conv_5_percent_more": conv_net(directory / "conv_5_percent_more.onnx", *body, (32, 1)),
        "conv_narrow": conv_net(directory / "conv_narrow.onnx", (24, 3), (24, 3), (24, 3)),
        "conv_wide": conv_net(directory / "conv_wide.onnx", (96, 3), (96, 3), (96, 3)),
        "conv_half": conv_net(directory / "conv_half.onnx", (16, 3), (16, 3), (16, 3)),
        "dense_2_mb": dense_net(directory / "dense_2_mb.onnx", 500, 10),
        "dense_15_mb": dense_net(directory / "dense_15_mb.onnx", 2048, 1024, 10),
        "tiny": conv_net(directory / "tiny.onnx", (8, 3)),
    }


@contextmanager
def cpu_hogs(count: int) -> Iterator[None]:
    """Keep `count` processes busy for the length of the block."""
    hogs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()


def false_differences(models: dict[str, Path], *, repeats: int, hogs: int) -> dict[str, Any]:
    """Compare a model with itself: how often the 95 % interval says that it is another."""
    with cpu_hogs(hogs):
        found = [time_models([models["conv"], models["conv"]]) for _ in range(repeats)]
    others = [latencies[1] for latencies, _ in found]
    return {
        "repeats": repeats,
        "hogs": hogs,
        "share_excluding_1": _share(others, lambda other: not other.ratio_low <= 1 <= other.ratio_high),
        "share_excluding_1_by_1_percent": _share(
            others, lambda other: other.ratio_low > 1.01 or other.ratio_high < 0.99
        ),
        "largest_error_percent": 100 * max(abs(other.ratio - 1) for other in others),
        "median_half_width_percent": 100 * statistics.median(map(_half_width, others)),
        "median_seconds": statistics.median(session.seconds for _, session in found),
        "median_rounds": statistics.median(session.rounds for _, session in found),
    }


def slowdown(models: dict[str, Path], *, repeats: int, hogs: int) -> dict[str, Any]:
    """Compare a model with itself plus a little work, whose true cost a long session without hogs finds first."""
    pair = [models["conv"], models["conv_5_percent_more"]]
    true = time_models(pair, precision=0.0, max_seconds=20)[0][1]
    with cpu_hogs(hogs):
        found = [time_models(pair)[0][1] for _ in range(repeats)]
    return {
        "repeats": repeats,
        "hogs": hogs,
        "true_slowdown_percent": 100 * (1 / true.ratio - 1),
        "true_slowdown_percent_interval": [100 * (1 / end - 1) for end in (true.ratio_high, true.ratio_low)],
        "times_found": sum(one.ratio_high < 1 for one in found),
        "slowdowns_percent": [100 * (1 / one.ratio - 1) for one in found],
    }


def spread(models: dict[str, Path], *, repeats: int, hogs: int) -> dict[str, Any]:
    """Repeat one session of several models: by how much the ratios of two runs differ."""
    names = ("conv", "conv_narrow", "conv_wide", "dense_2_mb")
    with cpu_hogs(hogs):
        found = [time_models([models[name] for name in names]) for _ in range(repeats)]
    by_name = dict(zip(names, zip(*(latencies for latencies, _ in found), strict=True), strict=True))
    return {
        "repeats": repeats,
        "hogs": hogs,
        "median_seconds": statistics.median(session.seconds for _, session in found),
        "rounds": [session.rounds for _, session in found],
        "models": {name: _spread(latencies) for name, latencies in by_name.items()},
    }


def _spread(latencies: Sequence[Latency]) -> dict[str, float]:
    ratios = [latency.ratio for latency in latencies]
    p50s = [latency.p50_ms for latency in latencies]
    return {
        "median_p50_ms": statistics.median(p50s),
        "p50_spread_percent": 100 * (max(p50s) / min(p50s) - 1),
        "median_ratio": statistics.median(ratios),
        "ratio_spread_percent": 100 * (max(ratios) / min(ratios) - 1),
        "median_half_width_percent": 100 * statistics.median(map(_half_width, latencies)),
    }


def cold_caches(models: dict[str, Path], *, cycles: int, calls: int) -> dict[str, Any]:
    """Visit the models in turn, `calls` calls each: the time of each call of a visit over the last one's."""
    names = ("tiny", "conv", "dense_2_mb", "dense_15_mb")
    sessions = [open_session(models[name], threads=1) for name in names]
    feeds = random_inputs(models["conv"])
    times = np.empty((cycles, len(names), calls))
    for cycle in times:
        for model, session in enumerate(sessions):
            for call in range(calls):
                start = time.perf_counter_ns()
                session.run(None, feeds)
                cycle[model, call] = time.perf_counter_ns() - start
    by_call = np.median(times, axis=0)
    relative = by_call / by_call[:, -1:]
    return {name: [round(float(part), 3) for part in row] for name, row in zip(names, relative, strict=True)}


def agreement(models: dict[str, Path], *, repeats: int) -> dict[str, Any]:
    """Compare the ratios of a session with those of models that each run back to back in a process of their own."""
    names = ("conv", "conv_half", "dense_2_mb", "dense_15_mb", "tiny")
    latencies, _ = time_models([models[name] for name in names])
    alone = {name: [_alone_ns(models[name]) for _ in range(repeats)] for name in names}
    baseline = statistics.median(alone["conv"])
    return {
        name: {
            "session": latency.ratio,
            "session_interval": [latency.ratio_low, latency.ratio_high],
            "alone": baseline / statistics.median(alone[name]),
        }
        for name, latency in zip(names, latencies, strict=True)
    }


_ALONE = """
import statistics, sys, time
from pathlib import Path
from compressor.onnx_files.inputs import random_inputs
from compressor.onnx_files.runtime import open_session
path = Path(sys.argv[1])
session = open_session(path, threads=1)
feeds = random_inputs(path)
stamps = [time.perf_counter_ns()]
while len(stamps) < 3000:
    session.run(None, feeds)
    stamps.append(time.perf_counter_ns())
print(statistics.median(after - before for before, after in zip(stamps[500:], stamps[501:])))
"""


def _alone_ns(path: Path) -> float:
    done = subprocess.run([sys.executable, "-c", _ALONE, str(path)], check=True, capture_output=True, text=True)
    return float(done.stdout)


def _half_width(latency: Latency) -> float:
    return (latency.ratio_high - latency.ratio_low) / 2 / latency.ratio


def _share(latencies: Sequence[Latency], holds: Callable[[Latency], bool]) -> float:
    return sum(map(holds, latencies)) / len(latencies)


def main() -> None:
    """Run the experiments, print what each found, and write all of it when none was left out."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--only", help="run one experiment and write nothing")
    only = arguments.parse_args().only
    with tempfile.TemporaryDirectory() as directory:
        models = write_models(Path(directory))
        experiments: dict[str, Callable[[], dict[str, Any]]] = {
            "cold_caches": lambda: cold_caches(models, cycles=100, calls=16),
            "agreement": lambda: agreement(models, repeats=9),
            "false_differences": lambda: false_differences(models, repeats=30, hogs=0),
            "false_differences_with_hogs": lambda: false_differences(models, repeats=30, hogs=2),
            "slowdown": lambda: slowdown(models, repeats=10, hogs=0),
            "slowdown_with_hogs": lambda: slowdown(models, repeats=10, hogs=2),
            "spread": lambda: spread(models, repeats=10, hogs=0),
            "spread_with_hogs": lambda: spread(models, repeats=10, hogs=2),
        }
        found: dict[str, Any] = {"environment": environment()}
        for name in [only] if only else experiments:
            found[name] = {**experiments[name](), "load_average_after": os.getloadavg()}
            print(name, json.dumps(found[name], indent=1), flush=True)
    if not only:
        publish("latency", "python benchmarks/latency.py", found)


if __name__ == "__main__":
    main()
