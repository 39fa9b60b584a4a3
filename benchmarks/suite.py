"""The headline results: `python benchmarks/suite.py MNIST_DIR CIFAR10_DIR WEIGHTS_DIR [--seeds 0 1 2] [--only NAME …]`.

Runs the demo, the pipelines of MNIST and CIFAR-10 with each seed, and with the first one that of CIFAR-10 also in
parts, each technique alone and every pair, and with pruning first. All stages are kept under runs/headline, and the
same command goes on from there. When every model is made, pipelines are timed again with nothing else running, and the
parts in one session beside the int8 that onnxruntime and NNCF (`pip install '.[peers]'`) make of the same teacher.
The first seed's reports and the figures of all go to benchmarks/results, tables to docs/results.md; `make docs` then
writes README's. With `--only` the other pipelines keep the figures that are committed, which must come from the same
machine and versions.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "pipelines"), str(ROOT / "benchmarks")]  # the examples' data, and the peers

from headline import DEEP_COMPRESSION, NETWORKS, PRUNED_FIRST, WHOLE, table
from publish import RESULTS, publish, today

from compressor.measure.latency import time_models
from compressor.onnx_files.inputs import random_inputs
from compressor.records.environment import environment
from compressor.records.report import Report
from compressor.report.json import read_report, to_json
from compressor.task import Task

RUNS = ROOT / "runs" / "headline"
SEEDS = [0, 1, 2]
SAME_MACHINE = ("cpu", "cpu_flags", "cores", "architecture", "python", "versions")


def main() -> None:
    """Run what has not been run, then time, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("mnist_dir", type=Path)
    parser.add_argument("cifar10_dir", type=Path)
    parser.add_argument("weights_dir", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=list(NETWORKS), metavar="NAME")
    arguments = parser.parse_args()
    places = {
        name: os.path.relpath(getattr(arguments, name), ROOT) for name in ("mnist_dir", "cifar10_dir", "weights_dir")
    }
    import nncf  # noqa: PLC0415  # an extra; better to lack it before hours of work than after

    facts = environment()
    facts["versions"] |= {"nncf": nncf.__version__}
    networks = kept(arguments.seeds, arguments.only, facts)
    first = arguments.seeds[0]
    chosen = {name: runs for name, runs in pipelines(arguments.seeds, places).items() if name in arguments.only}
    jobs: list[Callable[[], object]] = [run for runs in chosen.values() for run in runs]
    if "cifar10_parts" in arguments.only:
        shared = chosen.get("cifar10", [])[:1]  # one directory, in which one run works at a time
        jobs = [partial(cifar10_parts, first, places), partial(pruned_first, first, places), *jobs[len(shared) :]]
    make_all(jobs)
    for name, runs in chosen.items():
        reports = [run() for run in runs]  # from what is kept, and timed alone
        (RESULTS / f"pipeline_{name}.json").write_text(to_json(reports[0]))
        networks[name] = {"date": today(), "runs": [of_run(report) for report in reports]}
    if "mnist_300_100" in chosen:
        networks["mnist_300_100"]["bounds"] = bounds(first)
    if "cifar10_parts" in arguments.only:
        networks["cifar10_parts"] = {"date": today(), **timed_together(first, places)}
    seeds = "" if arguments.seeds == SEEDS else f" --seeds {' '.join(map(str, arguments.seeds))}"
    result = {"seeds": arguments.seeds, "networks": networks, "environment": facts}
    publish("headline", f"python benchmarks/suite.py MNIST_DIR CIFAR10_DIR WEIGHTS_DIR{seeds}", result, table)


def kept(seeds: Sequence[int], names: Container[str], facts: Mapping[str, Any]) -> dict[str, Any]:
    """The committed figures of the networks that are not among `names`.

    Raises RuntimeError if they cannot stand beside new ones, found with these seeds where these are the facts.
    """
    others = [name for name in NETWORKS if name not in names]
    if not others:
        return {}
    committed = json.loads((RESULTS / "headline.json").read_text())
    changed = [fact for fact in SAME_MACHINE if committed["environment"][fact] != facts[fact]]
    changed += [] if committed["seeds"] == seeds else ["seed"]
    if changed:
        found = ", ".join(changed)
        msg = f"the figures of {', '.join(others)} must have been found here, got another {found}; run without --only"
        raise RuntimeError(msg)
    return {name: committed["networks"][name] for name in others}


def pipelines(seeds: Sequence[int], places: Mapping[str, str]) -> dict[str, list[Callable[[], Report]]]:
    """What runs each pipeline, with each seed; the longest first."""
    return {
        "cifar10": [partial(cifar10_report, seed, places) for seed in seeds],
        **{name: [partial(mnist_report, name, seed, places) for seed in seeds] for name in DEEP_COMPRESSION},
        "digits": [digits_report],
    }


def make_all(jobs: Iterable[Callable[[], object]]) -> None:
    """Make every model, a job on each core, with one thread, so that any number of cores gives equal sums."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            for finished in as_completed([pool.submit(job) for job in jobs]):
                finished.result()
        finally:
            pool.shutdown(cancel_futures=True)  # where one failed, those that wait are not begun


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


def cifar10_report(seed: int, places: Mapping[str, str]) -> Report:
    """The pipeline of CIFAR-10."""
    file = ROOT / "pipelines" / "cifar10.yaml"
    return compressed(f"cifar10 {seed}", file, RUNS / f"seed{seed}", cifar10_overrides(file, seed, places))


def cifar10_parts(seed: int, places: Mapping[str, str]) -> None:
    """Make every part of the pipeline of CIFAR-10, the whole among them; they share the stages they begin with."""
    runs = RUNS / f"seed{seed}"
    for label, settings in parts().items():
        model = part_file(label, seed)
        model.parent.mkdir(parents=True, exist_ok=True)
        file = model.with_name("cifar10.yaml")
        file.write_text(json.dumps(settings))  # JSON is YAML
        report = compressed(f"{label} {seed}", file, runs, cifar10_overrides(file, seed, places))
        shutil.copy(runs / "cifar10" / report.rows[-1].model_file, model)


def part_file(label: str, seed: int) -> Path:
    """Where the ONNX file of a part is kept."""
    return RUNS / f"seed{seed}" / "parts" / label.replace(" ", "_") / "model.onnx"


def parts() -> dict[str, dict[str, Any]]:
    """Settings of the small network as it came, of each technique alone, of every pair and of the whole."""
    settings = YAML(typ="safe").load(ROOT / "pipelines" / "cifar10.yaml")
    stage = {one["stage"]: one for one in settings["stages"]}
    distillation, pruning = [stage["soft_labels"], stage["distillation"]], [stage["magnitude_pruning"]]
    export = [stage["onnx_export"]]
    int8 = [stage["int8_qat"], *export]
    chains = {
        "distillation": distillation,
        "pruning": pruning,
        "int8 (PTQ)": [{"stage": "int8_ptq", "target": stage["int8_qat"]["target"]}, *export],
        "int8 (QAT)": int8,
        "distillation → pruning": [*distillation, *pruning],
        "distillation → int8 (QAT)": [*distillation, *int8],
        "pruning → int8 (QAT)": [*pruning, *int8],
        WHOLE: [*distillation, *pruning, *int8],
    }
    shared = {key: value for key, value in settings.items() if key != "gate"}
    student = {**shared, "model": stage["distillation"]["student"], "stages": export}
    return {"ResNet-20 as it came": student} | {label: {**shared, "stages": chain} for label, chain in chains.items()}


def pruned_first(seed: int, places: Mapping[str, str]) -> Report:
    """The chain that prunes the large network itself, down to the parameters of the whole."""
    file = ROOT / "pipelines" / "cifar10_pruned_first.yaml"
    return compressed(f"{file.stem} {seed}", file, RUNS / f"seed{seed}", cifar10_overrides(file, seed, places))


def cifar10_overrides(file: Path, seed: int, places: Mapping[str, str]) -> dict[str, object]:
    """The seed, and where data and weights lie, for a pipeline of CIFAR-10."""
    settings = YAML(typ="safe").load(file)
    references = {"model": settings["model"]} | {
        f"stages.{index}.{role}": stage[role]
        for index, stage in enumerate(settings["stages"])
        for role in ("student", "teacher")
        if role in stage
    }
    weights = {
        f"{path}.weights_path": f"{places['weights_dir']}/{Path(reference['weights_path']).name}"
        for path, reference in references.items()
    }
    return {"seed": seed, "task.data_dir": places["cifar10_dir"], **weights}


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

    from compressor.measure.model import measure  # noqa: PLC0415

    task, runs = cifar10.task(ROOT / places["cifar10_dir"]), RUNS / f"seed{seed}"
    rows = read_report(runs / "cifar10_pruned_first" / "report.json").rows
    baseline, last = (runs / "cifar10_pruned_first" / row.model_file for row in (rows[0], rows[-1]))
    files = {"float32": baseline} | {label: part_file(label, seed) for label in parts()} | {PRUNED_FIRST: last}
    files |= by_peers(baseline, task, runs / "peers")
    found = {label: measure(file, task).measurement for label, file in files.items()}
    times, session = time_models(tuple(files.values()), inputs=[task.example_inputs[0][:1].numpy()])
    rows = {
        label: {
            "size_bytes": found[label].size_bytes,
            "parameters": found[label].parameters,
            "accuracy": found[label].metrics["accuracy"],
            "latency": latency.model_dump(),
        }
        for label, latency in zip(files, times, strict=True)
    }
    return {"rows": rows, "session": session.model_dump()}


def by_peers(baseline: Path, task: Task, place: Path) -> dict[str, Path]:
    """The int8 that others make of the baseline: ONNX files by label, like ours without traces of their makers."""
    from compressor.onnx_files.writing import compact, write  # noqa: PLC0415
    from quantization import by_nncf, by_onnxruntime  # noqa: PLC0415

    peers: dict[str, Callable[[Path], object]] = {
        "onnxruntime, defaults (PTQ)": lambda place: by_onnxruntime(baseline, task, None, place),
        "onnxruntime, per channel, MinMax (PTQ)": lambda place: by_onnxruntime(baseline, task, "MinMax", place),
        "NNCF, preset mixed (PTQ)": lambda place: by_nncf(baseline, task, "mixed", place),
    }
    files = {}
    for label, make in peers.items():
        own = place / label.replace(" ", "_")
        own.mkdir(parents=True, exist_ok=True)
        make(own)
        files[label] = own / "without_metadata.onnx"
        write(compact(onnx.load(own / "model.onnx")), files[label])
    return files


def bounds(seed: int) -> dict[str, Any]:
    """What bounds the speed on LeNet-300-100: files that compute next to nothing, and the model at a batch of 32."""
    runs = RUNS / f"seed{seed}" / "mnist_300_100"
    rows = read_report(runs / "report.json").rows
    baseline, delivered = (runs / row.model_file for row in (rows[0], rows[-1]))
    weight = numpy_helper.from_array(np.full((784, 10), 0.01, dtype=np.float32), "weight")
    layer = [helper.make_node("Flatten", ["x"], ["flat"]), helper.make_node("Gemm", ["flat", "weight"], ["y"])]
    one_layer = written(RUNS / "one_layer.onnx", layer, ["batch", 10], [weight])
    copy = written(RUNS / "copy.onnx", [helper.make_node("Identity", ["x"], ["y"])], ["batch", 1, 28, 28], [])
    (_, *of_bounds), _ = time_models((baseline, one_layer, copy))
    (_, of_32), _ = time_models((baseline, delivered), inputs=random_inputs(baseline, batch_size=32))
    found = {"one_layer": of_bounds[0], "copy": of_bounds[1], "batch_32": of_32}
    return {name: latency.model_dump() for name, latency in found.items()}


def written(
    file: Path, nodes: Sequence[onnx.NodeProto], shape: Sequence[str | int], weights: Sequence[onnx.TensorProto]
) -> Path:
    """Write an ONNX file that maps `x`, (batch, 1, 28, 28), to `y`."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 1, 28, 28])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)
    graph = helper.make_graph(nodes, file.stem, [x], [y], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), file)
    return file


if __name__ == "__main__":
    main()
