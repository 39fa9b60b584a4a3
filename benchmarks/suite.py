"""The headline results: `python benchmarks/suite.py MNIST_DIR CIFAR10_DIR WEIGHTS_DIR [--seeds 0 1 2]`.

Runs the pipelines of digits and MNIST as they are, and that of CIFAR-10 whole and in parts: each technique alone, every
pair, and both orders of distillation and pruning. All stages are kept under runs/headline, and the same command goes
on from there. Then the CIFAR-10 models of the first seed are timed in one session beside the int8 that onnxruntime and
NNCF (`pip install '.[peers]'`) make of the same teacher. Reports and figures go to benchmarks/results, tables to the
README.
"""

import argparse
import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "pipelines"), str(ROOT / "benchmarks")]  # the examples' data, and the peers

from compressor.latency import time_models
from compressor.report.environment import environment
from compressor.report.figures import size
from compressor.report.json import read_report, to_json
from compressor.report.markdown import to_markdown
from compressor.report.records import Report

RESULTS, RUNS = ROOT / "benchmarks" / "results", ROOT / "runs" / "headline"
README, BEGIN, END = ROOT / "README.md", "<!-- results:begin -->", "<!-- results:end -->"
PUBLISHED = {
    "mnist": {"network": "LeNet-5", "smaller": 39, "accuracy": 0.9920},
    "mnist_300_100": {"network": "LeNet-300-100", "smaller": 40, "accuracy": 0.9836},
}
"""Deep Compression (Han et al. 2016, table 1)."""
TECHNIQUES = {
    "D": ("soft_labels", "distillation"),
    "P": ("magnitude_pruning",),
    "Q": ("int8_qat", "onnx_export"),
}
CHAINS = ("D", "P", "Q", "DP", "DQ", "PQ", "PDQ", "DPQ")
"""The last is the pipeline itself."""


def main() -> None:
    """Run what has not been run, then time, and write results and README."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("mnist_dir", type=Path)
    parser.add_argument("cifar10_dir", type=Path)
    parser.add_argument("weights_dir", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    places = {
        "mnist_dir": arguments.mnist_dir.resolve(),
        "cifar10_dir": arguments.cifar10_dir.resolve(),
        "weights_dir": arguments.weights_dir.resolve(),
    }
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # one thread each: stages then give equal models on any machine
        digits = pool.submit(digits_report)
        of_mnist = {
            name: [pool.submit(mnist_report, name, seed, places["mnist_dir"]) for seed in arguments.seeds]
            for name in PUBLISHED
        }
        of_cifar10 = [pool.submit(cifar10_reports, seed, places) for seed in arguments.seeds]
        reports = {name: [run.result() for run in runs] for name, runs in of_mnist.items()}
        chains = [run.result() for run in of_cifar10]
        (RESULTS / "pipeline_digits.json").write_text(to_json(digits.result()))
    session = timed_together(arguments.seeds[0], places)
    result = {
        "command": "python benchmarks/suite.py MNIST_DIR CIFAR10_DIR WEIGHTS_DIR"
        + ("" if arguments.seeds == [0, 1, 2] else f" --seeds {' '.join(map(str, arguments.seeds))}"),
        "date": datetime.now(UTC).date().isoformat(),
        "seeds": arguments.seeds,
        "mnist": {name: [of_run(report) for report in found] for name, found in reports.items()},
        "cifar10": [{chain: of_run(report) for chain, report in found.items()} for found in chains],
        "cifar10_session": session,
        "environment": environment(),
    }
    for name, found in {**reports, "cifar10": [found[CHAINS[-1]] for found in chains]}.items():
        (RESULTS / f"pipeline_{name}.json").write_text(to_json(found[0]))
    (RESULTS / "headline.json").write_text(json.dumps(result, indent=1) + "\n")
    before, _, rest = README.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(f"{before}{BEGIN}\n{tables(result)}\n{END}{after}")
    print(tables(result))


def compressed(file: Path, runs: Path, *settings: str) -> Report:
    """Report of a pipeline file, whose stages are taken from `runs` where they are there."""
    overrides = [part for setting in settings for part in ("--set", setting)]
    search = os.pathsep.join([str(ROOT), str(ROOT / "pipelines"), os.environ.get("PYTHONPATH", "")])
    finished = subprocess.run(
        [sys.executable, "-m", "compressor", "run", str(file), "--runs", str(runs), *overrides],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": search},
        stdout=subprocess.PIPE,
        check=False,
    )
    if finished.returncode not in (0, 3, 4):  # an unmet gate is a result too
        msg = f"compress run {file} ended with {finished.returncode}"
        raise RuntimeError(msg)
    return read_report(runs / file.stem / "report.json")


def digits_report() -> Report:
    """The demo."""
    return compressed(ROOT / "pipelines" / "digits.yaml", RUNS)


def mnist_report(name: str, seed: int, data_dir: Path) -> Report:
    """One of the pipelines of MNIST."""
    file = ROOT / "pipelines" / f"{name}.yaml"
    return compressed(file, RUNS / f"seed{seed}", f"seed={seed}", f"task.data_dir={data_dir}")


def cifar10_reports(seed: int, places: Mapping[str, Path]) -> dict[str, Report]:
    """The pipeline of CIFAR-10 and its parts, by techniques in their order; parts share the stages they begin with."""
    found = {}
    for chain in CHAINS:
        runs = RUNS / f"seed{seed}"
        file = runs / "chains" / chain / "cifar10.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(part(chain, seed, places)))  # JSON is YAML
        found[chain] = compressed(file, runs)
        shutil.copy(runs / "cifar10" / "report.json", file.with_name("report.json"))
        shutil.copy(runs / "cifar10" / found[chain].rows[-1].model_file, file.with_name("model.onnx"))
    return found


def part(chain: str, seed: int, places: Mapping[str, Path]) -> dict[str, Any]:
    """The settings of pipelines/cifar10.yaml with the stages of these techniques alone, in this order."""
    from compressor.config import load  # noqa: PLC0415  # it imports torch

    paths = {
        "task.data_dir": str(places["cifar10_dir"]),
        "model.weights_path": str(places["weights_dir"] / "resnet56_cifar10.safetensors"),
        "stages.1.student.weights_path": str(places["weights_dir"] / "resnet20_cifar10.safetensors"),
    }
    overrides = [f"seed={seed}", *(f"{path}={value}" for path, value in paths.items())]
    whole = load(ROOT / "pipelines" / "cifar10.yaml", overrides).settings
    for path, value in paths.items():  # settings have them relative to the pipeline's own directory
        *parents, last = path.split(".")
        functools.reduce(lambda at, step: at[int(step) if step.isdecimal() else step], parents, whole)[last] = value
    by_name = {stage["stage"]: stage for stage in whole["stages"]}
    stages = [by_name[name] for technique in chain for name in TECHNIQUES[technique]]
    return {**{name: value for name, value in whole.items() if name != "gate"}, "stages": stages}


def of_run(report: Report) -> dict[str, Any]:
    """Figures of a report: the baseline and the delivered model."""
    first, last = report.rows[0], report.rows[-1]
    assert last.latency is not None
    return {
        "size_ratio": first.measurement.size_bytes / last.measurement.size_bytes,
        "size_bytes": last.measurement.size_bytes,
        "latency": last.latency.model_dump(),
        "noise": report.latency_session.noise.model_dump() if report.latency_session else None,
        "baseline_accuracy": first.measurement.metrics["accuracy"],
        "accuracy": last.measurement.metrics["accuracy"],
        "seconds": sum(row.seconds for row in (*report.rows, *report.preparations)),
    }


def timed_together(seed: int, places: Mapping[str, Path]) -> dict[str, Any]:
    """One latency session of all CIFAR-10 models of a seed and of what peers make of its baseline."""
    import cifar10  # noqa: PLC0415  # imports torch

    from compressor.measure import measure  # noqa: PLC0415
    from quantization import by_nncf, by_onnxruntime  # noqa: PLC0415

    task, runs = cifar10.task(places["cifar10_dir"]), RUNS / f"seed{seed}"
    report = read_report(runs / "chains" / CHAINS[-1] / "report.json")
    baseline = runs / "cifar10" / report.rows[0].model_file
    files = {"ResNet-56, float32": baseline} | {chain: runs / "chains" / chain / "model.onnx" for chain in CHAINS}
    peers = {
        "onnxruntime, quantize_static, defaults": lambda place: by_onnxruntime(baseline, task, None, place),
        "onnxruntime, quantize_static, tuned": lambda place: by_onnxruntime(baseline, task, "Percentile", place),
        "NNCF, quantize": lambda place: by_nncf(baseline, task, "mixed", place),
    }
    for name, make in peers.items():
        place = runs / "peers" / name.replace(", ", "_").replace(" ", "_")
        files[name] = place / "model.onnx"
        if not (place / "done").exists():
            place.mkdir(parents=True, exist_ok=True)
            make(place)
            (place / "done").touch()
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


def tables(result: Mapping[str, Any]) -> str:
    """The README's results: the demo, MNIST beside Deep Compression, CIFAR-10 in parts and beside peers."""
    demo = read_report(RESULTS / "pipeline_digits.json")
    _, headline, table, *_ = to_markdown(demo).split("\n\n")
    facts = result["environment"]
    versions = ", ".join(f"{name} {facts['versions'][name]}" for name in ("torch", "onnxruntime"))
    hours = sum(found["seconds"] for found in runs_of(result)) / 3600
    provenance = (
        f"<sub>`{result['command']}`, {result['date']}: seeds {', '.join(map(str, result['seeds']))}, mean ± standard "
        f"deviation; {hours:.1f} hours of stages on one thread each. {facts['cores']} cores of {facts['cpu']} "
        f"({', '.join(facts['cpu_flags'])}), {versions}; all of it in "
        "[headline.json](benchmarks/results/headline.json), each run in pipeline_*.json beside it.</sub>"
    )
    return "\n\n".join([f"**{demo.pipeline}**: {headline}", table, *of_mnist(result), *of_cifar10(result), provenance])


def runs_of(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Every run whose stages were all its own; those of parts are among those of the whole chain."""
    mnist = [run for runs in result["mnist"].values() for run in runs]
    return [*mnist, *(found[CHAINS[-1]] for found in result["cifar10"])]


def of_mnist(result: Mapping[str, Any]) -> list[str]:
    """MNIST beside what was published."""
    lines = [
        "| MNIST | smaller | faster | accuracy before | after | Deep Compression |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, runs in result["mnist"].items():
        published = PUBLISHED[name]
        smaller = [run["size_ratio"] for run in runs]
        lines.append(
            f"| {published['network']} | {min(smaller):.0f}x to {max(smaller):.0f}x | "
            f"{span([run['latency']['ratio'] for run in runs])} | "
            f"{spread([run['baseline_accuracy'] for run in runs])} | {spread([run['accuracy'] for run in runs])} | "
            f"{published['smaller']}x, {100 * published['accuracy']:.2f} % before |"
        )
    return ["\n".join(lines)]


def of_cifar10(result: Mapping[str, Any]) -> list[str]:
    """CIFAR-10: each technique alone, every pair, both orders, and peers, in one session."""
    rows = result["cifar10_session"]["rows"]
    first = next(iter(rows.values()))
    lines = ["| CIFAR-10, ResNet-56 | size | smaller | faster | accuracy |", "|---|--:|--:|--:|--:|"]
    for name, row in rows.items():
        found = [seed[name]["accuracy"] for seed in result["cifar10"] if name in seed]
        latency = row["latency"]
        faster = f"{latency['ratio']:.2f}x [{latency['ratio_low']:.2f}, {latency['ratio_high']:.2f}]"
        lines.append(
            f"| {' → '.join(WORDS[part] for part in name) if name in CHAINS else name} | {size(row['size_bytes'])} | "
            f"{first['size_bytes'] / row['size_bytes']:.2f}x | {faster} | {spread(found or [row['accuracy']])} |"
        )
    return ["\n".join(lines)]


WORDS = {"D": "distillation", "P": "pruning", "Q": "int8 (QAT)"}


def spread(shares: Sequence[float]) -> str:
    """Mean and standard deviation of shares, in percent."""
    mean = f"{100 * statistics.fmean(shares):.2f}"
    return f"{mean} ± {100 * statistics.stdev(shares):.2f} %" if len(shares) > 1 else f"{mean} %"


def span(ratios: Sequence[float]) -> str:
    """The smallest and the largest of some ratios."""
    return f"{min(ratios):.2f}x to {max(ratios):.2f}x" if len(ratios) > 1 else f"{ratios[0]:.2f}x"


if __name__ == "__main__":
    main()
