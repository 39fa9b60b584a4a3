"""The headline results: `python benchmarks/suite.py MNIST_DIR CIFAR10_DIR WEIGHTS_DIR [--seeds 0 1 2]`.

Runs the pipelines of MNIST and CIFAR-10 with each seed, and with the first one that of CIFAR-10 also in parts: each
technique alone, every pair, and both orders of distillation and pruning. All stages are kept under runs/headline, and
the same command goes on from there. When every model is made, pipelines are timed again with nothing else running, and
the parts in one session beside the int8 that onnxruntime and NNCF (`pip install '.[peers]'`) make of the same teacher.
Reports and figures go to benchmarks/results, tables to the README.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

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
    whole: dict[str, list[Callable[[], Report]]] = {
        "cifar10": [partial(cifar10_report, WHOLE, seed, places) for seed in arguments.seeds],
        **{name: [partial(mnist_report, name, seed, places) for seed in arguments.seeds] for name in PUBLISHED},
        "digits": [digits_report],
    }
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # one thread each: stages then give equal models on any machine
        of_parts = pool.submit(cifar10_parts, arguments.seeds[0], places)  # the whole of the first seed is among them
        others = [run for name, runs in whole.items() for run in (runs[1:] if name == "cifar10" else runs)]
        for finished in [pool.submit(run) for run in others]:
            finished.result()
        parts = of_parts.result()
    reports = {name: [run() for run in runs] for name, runs in whole.items()}  # from what is kept, and timed alone
    session = timed_together(arguments.seeds[0], places)
    result = {
        "command": "python benchmarks/suite.py MNIST_DIR CIFAR10_DIR WEIGHTS_DIR"
        + ("" if arguments.seeds == [0, 1, 2] else f" --seeds {' '.join(map(str, arguments.seeds))}"),
        "date": datetime.now(UTC).date().isoformat(),
        "seeds": arguments.seeds,
        "pipelines": {name: [of_run(report) for report in found] for name, found in reports.items()},
        "cifar10_parts": {chain: of_run(report) for chain, report in parts.items()},
        "cifar10_session": session,
        "environment": environment(),
    }
    for name, found in reports.items():
        (RESULTS / f"pipeline_{name}.json").write_text(to_json(found[0]))
    (RESULTS / "headline.json").write_text(json.dumps(result, indent=1) + "\n")
    before, _, rest = README.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(f"{before}{BEGIN}\n{tables(result)}\n{END}{after}")
    print(tables(result))


def compressed(file: Path, runs: Path, overrides: Mapping[str, object]) -> Report:
    """Report of a pipeline file, whose stages are taken from `runs` where they are there."""
    search = os.pathsep.join([str(ROOT), str(ROOT / "pipelines"), os.environ.get("PYTHONPATH", "")])
    settings = [part for path, value in overrides.items() for part in ("--set", f"{path}={value}")]
    finished = subprocess.run(
        [sys.executable, "-m", "compressor", "run", str(file), "--runs", str(runs), *settings],
        cwd=ROOT,
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
    return compressed(ROOT / "pipelines" / "digits.yaml", RUNS, {})


def mnist_report(name: str, seed: int, places: Mapping[str, str]) -> Report:
    """One of the pipelines of MNIST."""
    overrides = {"seed": seed, "task.data_dir": places["mnist_dir"]}
    return compressed(ROOT / "pipelines" / f"{name}.yaml", RUNS / f"seed{seed}", overrides)


def cifar10_report(chain: str, seed: int, places: Mapping[str, str]) -> Report:
    """The pipeline of CIFAR-10, or a part of it, whose report and model are kept by the name of the part."""
    file, runs = ROOT / "pipelines" / "cifar10.yaml", RUNS / f"seed{seed}"
    settings = YAML(typ="safe").load(file)
    by_name = {stage["stage"]: stage for stage in settings["stages"]}
    names = [name for technique in chain for name in TECHNIQUES[technique]]
    kept = runs / "chains" / chain
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
    report = compressed(file, runs, overrides)
    shutil.copy(runs / "cifar10" / "report.json", kept)
    shutil.copy(runs / "cifar10" / report.rows[-1].model_file, kept / "model.onnx")
    return report


def cifar10_parts(seed: int, places: Mapping[str, str]) -> dict[str, Report]:
    """Reports of parts of the pipeline of CIFAR-10; they share the stages they begin with, so the longest go first."""
    return {chain: cifar10_report(chain, seed, places) for chain in (WHOLE, *reversed(PARTS))}


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


def timed_together(seed: int, places: Mapping[str, str]) -> dict[str, Any]:
    """One latency session of all CIFAR-10 models of a seed and of what peers make of its baseline."""
    import cifar10  # noqa: PLC0415  # imports torch

    from compressor.measure import measure  # noqa: PLC0415
    from quantization import by_nncf, by_onnxruntime  # noqa: PLC0415

    task, runs = cifar10.task(ROOT / places["cifar10_dir"]), RUNS / f"seed{seed}"
    report = read_report(runs / "chains" / WHOLE / "report.json")
    baseline = runs / "cifar10" / report.rows[0].model_file
    files = {"ResNet-56, float32": baseline} | {
        chain: runs / "chains" / chain / "model.onnx" for chain in (*PARTS, WHOLE)
    }
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
    provenance = (
        f"<sub>`{result['command']}`, {result['date']}: seeds {', '.join(map(str, result['seeds']))}, mean ± standard "
        f"deviation; stages on one thread each. {facts['cores']} cores of {facts['cpu']} "
        f"({', '.join(facts['cpu_flags'])}), {versions}; all of it in "
        "[headline.json](benchmarks/results/headline.json), each run in pipeline_*.json beside it.</sub>"
    )
    return "\n\n".join([f"**{demo.pipeline}**: {headline}", table, *of_mnist(result), *of_cifar10(result), provenance])


def of_mnist(result: Mapping[str, Any]) -> list[str]:
    """MNIST beside what was published."""
    lines = [
        "| MNIST | smaller | faster | accuracy before | after | Deep Compression |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, published in PUBLISHED.items():
        runs = result["pipelines"][name]
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
        runs = result["pipelines"]["cifar10"] if name == WHOLE else [row]
        latency = row["latency"]
        faster = f"{latency['ratio']:.2f}x [{latency['ratio_low']:.2f}, {latency['ratio_high']:.2f}]"
        chain = " → ".join(WORDS[part] for part in name) if name in (*PARTS, WHOLE) else name
        lines.append(
            f"| {chain} | {size(row['size_bytes'])} | "
            f"{first['size_bytes'] / row['size_bytes']:.2f}x | {faster} | {spread([run['accuracy'] for run in runs])} |"
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
