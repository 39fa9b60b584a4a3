"""`run`, the loop: each step is taken from the store or computed, measured and stored; then all are timed together."""

import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compressor.artifact import Artifact, OnnxModel, TorchModel
from compressor.config import Pipeline
from compressor.disk import host_errors, memory_errors, write_atomically
from compressor.errors import InputError, StageError
from compressor.export import to_onnx
from compressor.latency import time_models
from compressor.measure import measure
from compressor.outcome import record_end, recorded
from compressor.plan import Step, data_fingerprints, remember, steps
from compressor.plugins import beside, user_errors
from compressor.preflight import check_model, check_reference, check_task
from compressor.report.environment import environment
from compressor.report.gate import exit_code, judge
from compressor.report.json import to_json
from compressor.report.markdown import to_markdown
from compressor.report.records import Measurement, MetricInfo, Report, Row
from compressor.stage import StageContext
from compressor.store import Entry, Store
from compressor.task import Task

logger = logging.getLogger("compressor")


def run(pipeline: Pipeline, directory: Path, *, device: torch.device) -> Report:
    """Carry out `pipeline` in `directory`, reusing what earlier runs stored there, and report on every model.

    Leaves the delivered model, `report.json`, `report.md` and `outcome.json` in `directory`. Raises InputError for
    user code or data at fault, StageError, HostError, and LockedError while another run holds the directory.
    """
    store = Store(directory)
    with store.lock(), recorded(directory), beside(pipeline.directory), user_errors(), memory_errors():
        task = check_task(pipeline.task.call())
        data = data_fingerprints(task)
        chain = steps(pipeline, data=data, device=device.type)
        remember(store, data, chain)
        this = _Run(pipeline, task, store, device)
        report = _report(_obtain(chain, this), this)
        _deliver(directory / report.rows[-1].model_file, directory)
        write_atomically(directory / "report.md", to_markdown(report))
        write_atomically(directory / "report.json", to_json(report))
        record_end(directory, exit_code(report.verdicts))
    return report


@dataclass(frozen=True)
class _Run:
    pipeline: Pipeline
    task: Task
    store: Store
    device: torch.device


@dataclass(frozen=True)
class _Obtained:
    step: Step
    entry: Entry
    reused: bool


def _obtain(chain: Sequence[Step], run: _Run) -> tuple[_Obtained, ...]:
    """Take each step from the store or compute it."""
    obtained: list[_Obtained] = []
    for step in chain:
        entry = run.store.find(step.key)
        reused = entry is not None
        if entry is None:
            if all(before.reused for before in obtained):
                _check_models(run)
            entry = _compute(step, [before.entry for before in obtained], run)
        logger.info("%s: %s", step.name, "taken from the store" if reused else f"{entry.facts['seconds']:.1f} s")
        obtained.append(_Obtained(step, entry, reused))
    return tuple(obtained)


def _check_models(run: _Run) -> None:
    """Build every model that the pipeline names, so that one that does not fit is refused before any training."""
    model = TorchModel.build(run.pipeline.model, seed=run.pipeline.seed)
    check_model(model, run.task)
    for reference in run.pipeline.references:
        check_reference(reference, model, run.task, seed=run.pipeline.seed)


def _compute(step: Step, before: Sequence[Entry], run: _Run) -> Entry:
    logger.info("%s: running", step.name)
    with run.store.draft() as draft:
        work_dir, artifact_dir = draft / "work", draft / "artifact"
        work_dir.mkdir()
        artifact_dir.mkdir()
        start = time.perf_counter()
        artifact = _apply(step, before, run, work_dir)
        seconds = time.perf_counter() - start
        artifact.save(artifact_dir)
        shutil.rmtree(work_dir)
        if isinstance(artifact, TorchModel):
            onnx = to_onnx(artifact.module, run.task, draft / "model.onnx")
        else:
            onnx = OnnxModel.load(artifact_dir)
        facts = {
            "stage": step.name,
            "parts": step.parts,
            "artifact": type(artifact).__name__,
            "model_file": str(onnx.path.relative_to(draft)),
            "measurement": measure(onnx.path, run.task).model_dump(mode="json"),
            "seconds": seconds,
        }
        return run.store.commit(draft, step.key, facts)


def _apply(step: Step, before: Sequence[Entry], run: _Run, work_dir: Path) -> Artifact:
    """Give the step the model that the store holds, so that a resumed run computes from the same bytes."""
    model = _load(before[-1], run) if before else TorchModel.build(run.pipeline.model, seed=run.pipeline.seed)
    if step.stage is None:
        return model
    reference = _load(before[0], run) if before else model
    if not isinstance(reference, TorchModel):
        msg = f"the baseline must be a TorchModel, got {type(reference).__name__}"
        raise StageError(msg)

    def log(line: str) -> None:
        logger.info("%s: %s", step.name, line)

    artifact: Artifact = step.stage.apply(
        model, run.task, StageContext(reference, run.device, run.pipeline.seed, work_dir, log)
    )
    return artifact


def _load(entry: Entry, run: _Run) -> Artifact:
    directory = entry.directory / "artifact"
    if entry.facts["artifact"] == OnnxModel.__name__:
        return OnnxModel.load(directory)
    return TorchModel.load(directory, among=[run.pipeline.model, *run.pipeline.references])


def _model_file(entry: Entry) -> Path:
    file: Path = entry.directory / entry.facts["model_file"]
    if not file.resolve().is_relative_to(entry.directory.resolve()):
        msg = f"the model file of {entry.directory} must lie in it, got {entry.facts['model_file']!r}"
        raise InputError(msg)
    return file


def _report(obtained: Sequence[_Obtained], run: _Run) -> Report:
    pipeline, task = run.pipeline, run.task
    files = [_model_file(one.entry) for one in obtained]
    logger.info("timing %d models side by side", len(files))
    inputs = [tensor[:1].numpy() for tensor in task.example_inputs]
    latencies, session = time_models(files, inputs=inputs)
    of_the_model: list[dict[str, Any]] = [{}] if obtained[0].step.stage is None else []
    stage_settings = of_the_model + pipeline.settings["stages"]
    rows = tuple(
        Row(
            stage=one.step.name,
            settings=settings,
            key=one.step.key,
            model_file=file.relative_to(run.store.root).as_posix(),
            measurement=Measurement.model_validate(one.entry.facts["measurement"]),
            latency=latency,
            seconds=one.entry.facts["seconds"],
            reused=one.reused,
        )
        for one, settings, file, latency in zip(obtained, stage_settings, files, latencies, strict=True)
    )
    report = Report(
        pipeline=pipeline.name,
        settings=pipeline.settings,
        overrides=pipeline.overrides,
        metrics=tuple(
            MetricInfo(name=metric.name, unit=metric.unit, higher_is_better=metric.higher_is_better)
            for metric in task.metrics
        ),
        rows=rows,
        latency_session=session,
        environment={**environment(), "device": run.device.type, "seed": run.pipeline.seed},
        verdicts=(),
    )
    return report if pipeline.gate is None else report.model_copy(update={"verdicts": judge(pipeline.gate, report)})


def _deliver(model_file: Path, directory: Path) -> None:
    """Copy the last model out of the store, external data first, each file replaced in one step."""
    with host_errors(directory):
        for file in reversed(OnnxModel(model_file).files):
            part = directory / f".{file.name}.part"
            try:
                shutil.copyfile(file, part)
                part.replace(directory / file.name)
            finally:
                part.unlink(missing_ok=True)
