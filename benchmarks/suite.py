"""The headline results: `python benchmarks/suite.py MNIST_DIR CIFAR10_DIR WEIGHTS_DIR [--seeds 0 1 2]`.

Runs the demo, the pipelines of MNIST and CIFAR-10 with each seed, and with the first one that of CIFAR-10 also in
parts: each technique alone, every pair, and both orders of distillation and pruning. All stages are kept under
runs/headline, and the same command goes on from there. When every model is made, pipelines are timed again with nothing
else running, and the parts in one session beside the int8 that onnxruntime and NNCF (`pip install '.[peers]'`) make of
the same teacher.
The first seed's reports and the figures of all go to benchmarks/results, tables to the README.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "pipelines"), str(ROOT / "benchmarks")]  # the examples' data, and the peers

from compressor.latency import time_models
from compressor.report.environment import environment
from compressor.report.figures import compared_size, count, factor, size, speed
from compressor.report.json import read_report, to_json
from compressor.report.markdown import to_markdown
from compressor.report.measurements import Latency
from compressor.report.records import Report

RESULTS, RUNS = ROOT / "benchmarks" / "results", ROOT / "runs" / "headline"
README, BEGIN, END = ROOT / "README.md", "<!-- results:begin -->", "<!-- results:end -->"
DEEP_COMPRESSION = {"mnist": (39, 0.9920), "mnist_300_100": (40, 0.9836)}
"""How much smaller Han et al. (2016) made the same network, and its test accuracy, which they did not lose."""
TECHNIQUES = {
    "D": ("soft_labels", "distillation"),
    "P": ("magnitude_pruning",),
    "Q": ("int8_qat", "onnx_export"),
}
WHOLE, PARTS = "DPQ", ("D", "P", "Q", "DP", "DQ", "PQ", "PDQ")


def main() -> None:
    """Run what has not been run, then time, and write results and README."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("mnist_dir", type=Path)
    parser.add_argument("cifar10_dir", type=Path)
    parser.add_argument("weights_dir", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    places = {
        name: os.path.relpath(getattr(arguments, name), ROOT) for name in ("mnist_dir", "cifar10_dir", "weights_dir")
    }
    import nncf  # noqa: PLC0415  # an extra; better to lack it before hours of work than after

    whole: dict[str, list[Callable[[], Report]]] = {
        "cifar10": [partial(cifar10_report, WHOLE, seed, places) for seed in arguments.seeds],
        **{name: [partial(mnist_report, name, seed, places) for seed in arguments.seeds] for name in DEEP_COMPRESSION},
        "digits": [digits_report],
    }
    others = [run for name, runs in whole.items() for run in (runs[1:] if name == "cifar10" else runs)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # one thread each, so that any number of cores gives equal sums
        of_parts = pool.submit(cifar10_parts, arguments.seeds[0], places)  # they begin with the whole
        try:
            for finished in as_completed([of_parts, *map(pool.submit, others)]):
                finished.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    reports = {name: [run() for run in runs] for name, runs in whole.items()}  # from what is kept, and timed alone
    session = timed_together(arguments.seeds[0], places)
    facts = environment()
    result = {
        "command": "python benchmarks/suite.py MNIST_DIR CIFAR10_DIR WEIGHTS_DIR"
        + ("" if arguments.seeds == [0, 1, 2] else f" --seeds {' '.join(map(str, arguments.seeds))}"),
        "date": datetime.now(UTC).date().isoformat(),
        "seeds": arguments.seeds,
        "pipelines": {name: [of_run(report) for report in found] for name, found in reports.items()},
        "one_layer": one_layer(arguments.seeds[0]),
        "cifar10_session": session,
        "environment": {**facts, "versions": {**facts["versions"], "nncf": nncf.__version__}},
    }
    for name, found in reports.items():
        (RESULTS / f"pipeline_{name}.json").write_text(to_json(found[0]))
    (RESULTS / "headline.json").write_text(json.dumps(result, indent=1) + "\n")
    before, _, rest = README.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(f"{before}{BEGIN}\n{tables(result)}\n{END}{after}")
    print(tables(result))


def compressed(name: str, file: Path, runs: Path, overrides: Mapping[str, object]) -> Report:
    """Report of a pipeline file, whose stages are taken from `runs` where they are there; `name` is for its log."""
    search = os.pathsep.join([str(ROOT), str(ROOT / "pipelines"), os.environ.get("PYTHONPATH", "")])
    settings = [part for path, value in overrides.items() for part in ("--set", f"{path}={value}")]
    with subprocess.Popen(
        [sys.executable, "-m", "compressor", "run", str(file), "--runs", str(runs), "--device", "cpu", *settings],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": search},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:  # of several pipelines at once
            print(f"{name}: {line}", end="", file=sys.stderr, flush=True)
    if process.returncode not in (0, 3, 4):  # an unmet gate is a result too
        msg = f"compress run {file} ended with {process.returncode}"
        raise RuntimeError(msg)
    return read_report(runs / file.stem / "report.json")


def digits_report() -> Report:
    """The demo."""
    return compressed("digits", ROOT / "pipelines" / "digits.yaml", RUNS, {})


def mnist_report(name: str, seed: int, places: Mapping[str, str]) -> Report:
    """One of the pipelines of MNIST."""
    overrides = {"seed": seed, "task.data_dir": places["mnist_dir"]}
    return compressed(f"{name} {seed}", ROOT / "pipelines" / f"{name}.yaml", RUNS / f"seed{seed}", overrides)


def cifar10_report(chain: str, seed: int, places: Mapping[str, str]) -> Report:
    """The pipeline of CIFAR-10, or a part of it; its model is kept by the name of the part."""
    file, runs = ROOT / "pipelines" / "cifar10.yaml", RUNS / f"seed{seed}"
    settings = YAML(typ="safe").load(file)
    by_name = {stage["stage"]: stage for stage in settings["stages"]}
    names = [name for technique in chain for name in TECHNIQUES[technique]]
    kept = runs / "parts" / chain
    kept.mkdir(parents=True, exist_ok=True)
    if chain != WHOLE:
        file = kept / file.name
        del settings["gate"]
        file.write_text(json.dumps({**settings, "stages": [by_name[name] for name in names]}))  # JSON is YAML
    weights = f"{places['weights_dir']}/{{}}_cifar10.safetensors"
    overrides = {
        "seed": seed,
        "task.data_dir": places["cifar10_dir"],
        "model.weights_path": weights.format("resnet56"),
    }
    if "distillation" in names:
        overrides[f"stages.{names.index('distillation')}.student.weights_path"] = weights.format("resnet20")
    report = compressed(f"cifar10 {seed} {chain}", file, runs, overrides)
    shutil.copy(runs / "cifar10" / report.rows[-1].model_file, kept / "model.onnx")
    return report


def cifar10_parts(seed: int, places: Mapping[str, str]) -> None:
    """Make every part of the pipeline of CIFAR-10; they share the stages they begin with, so the longest go first."""
    for chain in (WHOLE, *reversed(PARTS)):
        cifar10_report(chain, seed, places)


def of_run(report: Report) -> dict[str, Any]:
    """Figures of a report: the baseline and the delivered model."""
    first, last = report.rows[0], report.rows[-1]
    assert last.latency is not None
    assert report.latency_session is not None
    return {
        "size_ratio": first.measurement.size_bytes / last.measurement.size_bytes,
        "size_bytes": last.measurement.size_bytes,
        "latency": last.latency.model_dump(),
        "noise": report.latency_session.noise.model_dump(),
        "baseline_accuracy": first.measurement.metrics["accuracy"],
        "accuracy": last.measurement.metrics["accuracy"],
        "accuracies": {row.stage: row.measurement.metrics["accuracy"] for row in report.rows},
        "seconds": {row.stage: row.seconds for row in (*report.preparations, *report.rows)},
    }


def timed_together(seed: int, places: Mapping[str, str]) -> dict[str, Any]:
    """One latency session of all CIFAR-10 models of a seed and of what peers make of its baseline."""
    import cifar10  # noqa: PLC0415  # imports torch

    from compressor.measure import measure  # noqa: PLC0415
    from compressor.onnx_writing import compact, write  # noqa: PLC0415
    from quantization import by_nncf, by_onnxruntime  # noqa: PLC0415

    task, runs = cifar10.task(ROOT / places["cifar10_dir"]), RUNS / f"seed{seed}"
    baseline = runs / "cifar10" / read_report(runs / "cifar10" / "report.json").rows[0].model_file
    files = {"float32": baseline} | {chain: runs / "parts" / chain / "model.onnx" for chain in (*PARTS, WHOLE)}
    peers: dict[str, Callable[[Path], object]] = {
        "onnxruntime, calibrated, defaults": lambda place: by_onnxruntime(baseline, task, None, place),
        "onnxruntime, calibrated, per channel": lambda place: by_onnxruntime(baseline, task, "MinMax", place),
        "NNCF, calibrated": lambda place: by_nncf(baseline, task, "mixed", place),
    }
    for name, make in peers.items():
        place = runs / "peers" / name.replace(", ", "_").replace(" ", "_")
        place.mkdir(parents=True, exist_ok=True)
        make(place)
        files[name] = place / "without_metadata.onnx"  # as ours are
        write(compact(onnx.load(place / "model.onnx")), files[name])
    found = {name: measure(file, task).measurement for name, file in files.items()}
    times, session = time_models(tuple(files.values()), inputs=[task.example_inputs[0][:1].numpy()])
    rows = {
        name: {
            "size_bytes": found[name].size_bytes,
            "accuracy": found[name].metrics["accuracy"],
            "latency": latency.model_dump(),
        }
        for name, latency in zip(files, times, strict=True)
    }
    return {"rows": rows, "session": session.model_dump()}


def one_layer(seed: int) -> dict[str, Any]:
    """Latency of a single layer, 784 inputs and 10 outputs, beside LeNet-300-100: nothing on these inputs is faster."""
    runs = RUNS / f"seed{seed}" / "mnist_300_100"
    baseline = runs / read_report(runs / "report.json").rows[0].model_file
    graph = helper.make_graph(
        [helper.make_node("Flatten", ["x"], ["flat"]), helper.make_node("Gemm", ["flat", "weight"], ["y"])],
        "one layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 1, 28, 28])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 10])],
        [numpy_helper.from_array(np.full((784, 10), 0.01, dtype=np.float32), "weight")],
    )
    file = RUNS / f"seed{seed}" / "one_layer.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), file)
    (_, latency), _ = time_models((baseline, file))
    return latency.model_dump()


def tables(result: Mapping[str, Any]) -> str:
    """The README's results: the demo, MNIST beside Deep Compression, CIFAR-10 in parts and beside peers."""
    demo = read_report(RESULTS / "pipeline_digits.json")
    _, headline, table, *_ = to_markdown(demo).split("\n\n")
    facts = result["environment"]
    versions = ", ".join(f"{name} {facts['versions'][name]}" for name in ("torch", "onnxruntime", "nncf"))
    hours = sum(sum(run["seconds"].values()) for runs in result["pipelines"].values() for run in runs) / 3600
    first, *_ = result["seeds"]
    provenance = (
        f"<sub>`{result['command']}`, {result['date']}. Ranges and standard deviations (±) are over seeds, everything "
        f"else is of seed {first}; sizes without metadata. The stages of the pipelines took "
        f"{hours:.1f} hours, on one thread each. {facts['cores']} cores of {facts['cpu']} "
        f"({', '.join(facts['cpu_flags'])}), {versions}; all of it in [headline.json](benchmarks/results/headline.json)"
        f", reports of seed {first} in pipeline_*.json beside it.</sub>"
    )
    return "\n\n".join([f"**{demo.pipeline}**: {headline}", table, of_mnist(result), of_cifar10(result), provenance])


def of_mnist(result: Mapping[str, Any]) -> str:
    """MNIST beside what was published."""
    lines = [
        "| MNIST, ONNX file | smaller | faster, batch 1 | accuracy before | after | Deep Compression |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    networks = {"mnist": "LeNet-5", "mnist_300_100": "LeNet-300-100"}
    for name, (smaller, accuracy) in DEEP_COMPRESSION.items():
        runs = result["pipelines"][name]
        lines.append(
            f"| {networks[name]}, {count(len(runs), 'seed')} | {least_and_most([run['size_ratio'] for run in runs])} | "
            f"{least_and_most([run['latency']['ratio'] for run in runs])} | "
            f"{mean([run['baseline_accuracy'] for run in runs])} | {mean([run['accuracy'] for run in runs])} | "
            f"{smaller}x at {100 * accuracy:.2f} % |"
        )
    one = speed(Latency.model_validate(result["one_layer"]))
    bound = f"A file of one layer, 784 inputs and 10 outputs, is {one} than LeNet-300-100."
    return "\n".join([*lines, "", bound])


def of_cifar10(result: Mapping[str, Any]) -> str:
    """CIFAR-10: each technique alone, every pair, both orders, and peers, in one session."""
    rows, noise = result["cifar10_session"]["rows"], result["cifar10_session"]["session"]["noise"]
    lines = ["| CIFAR-10, ResNet-56 | size | | latency | accuracy |", "|---|--:|--:|--:|--:|"]
    words = {"D": "distillation", "P": "pruning", "Q": "int8 (QAT)"}
    for name, row in rows.items():
        runs = result["pipelines"]["cifar10"] if name == WHOLE else [row]
        chain = " → ".join(words[part] for part in name) if name in (*PARTS, WHOLE) else name
        label = f"{chain}, {count(len(runs), 'seed')}" if len(runs) > 1 else chain
        first = name == next(iter(rows))
        smaller = "" if first else compared_size(rows["float32"]["size_bytes"], row["size_bytes"])
        faster = "" if first else speed(Latency.model_validate(row["latency"]))
        accuracy = mean([run["accuracy"] for run in runs])
        lines.append(f"| {label} | {size(row['size_bytes'])} | {smaller} | {faster} | {accuracy} |")
    floor = max(noise["ratio_high"], 1 / noise["ratio_low"]) - 1
    return "\n".join(
        [*lines, "", f"One latency session; two sessions of one file differ by up to {100 * floor:.1f} %."]
    )


def mean(shares: Sequence[float]) -> str:
    """Mean, and standard deviation if there are several, of shares, in percent."""
    deviation = f" ± {100 * statistics.stdev(shares):.2f}" if len(shares) > 1 else ""
    return f"{100 * statistics.fmean(shares):.2f}{deviation} %"


def least_and_most(ratios: Sequence[float]) -> str:
    """The smallest and the largest of some ratios, or one figure where both are written alike."""
    return " to ".join(dict.fromkeys(f"{factor(ratio)}x" for ratio in (min(ratios), max(ratios))))


if __name__ == "__main__":
    main()
