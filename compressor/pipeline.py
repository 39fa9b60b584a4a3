"""`run`, the loop: each step is taken from the store or computed, measured and stored; then all are timed together."""

import itertools
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compressor.artifact import Artifact, OnnxModel, TorchModel
from compressor.config import Pipeline
from compressor.disk import host_errors, memory_errors, write_atomically
from compressor.errors import InputError, StageError
from compressor.export import to_onnx
from compressor.latency import time_models
from compressor.layers import output_channels
from compressor.measure import measure
from compressor.outcome import record_end, recorded
from compressor.plan import Step, data_fingerprints, remember, steps
from compressor.plugins import beside, user_errors
from compressor.preflight import check_model, check_reference, check_task
from compressor.processes import gathered, processes, told
from compressor.quality import MOST_LISTED_CLASSES, Predictions, classification, comparison
from compressor.report import sensitivity
from compressor.report.environment import environment
from compressor.report.gate import exit_code, judge
from compressor.report.json import to_json
from compressor.report.markdown import to_markdown
from compressor.report.measurements import Measurement, MetricInfo
from compressor.report.page import to_html
from compressor.report.quantization import Quantization
from compressor.report.records import Preparation, Reached, Report, Row, Sensitivity
from compressor.stage import StageContext
from compressor.store import Entry, Store
from compressor.task import Task

logger = logging.getLogger("compressor")

_BASELINE_OUTPUTS = "test_outputs.npy"
"""What the baseline says of each test sample, float32 (N, C), in its entry."""


def run(pipeline: Pipeline, directory: Path, *, device: torch.device) -> Report:
    """Carry out `pipeline` in `directory`, reusing what earlier runs stored there, and report on every model.

    Leaves the delivered model, `report.json`, `report.md`, `report.html` and `outcome.json` in `directory`, and
    `sensitivity.md` and `sensitivity.svg` if a stage measured that. Raises InputError for user code or data at fault,
    StageError, HostError, and LockedError while another run holds the directory.

    Under torchrun every process calls this and gets the report: the main one runs the pipeline, the others take part in
    the stages that it computes.
    """
    store = Store(directory)
    if not processes(device).is_main_process:
        assisted: Report = _assisted(pipeline, store, device)
        return assisted
    with store.lock(), recorded(directory), beside(pipeline.directory), user_errors(), memory_errors():
        obtained, this = _carried_out(pipeline, store, device)
        for file in _sensitivity_files(obtained)[-1:]:
            _show_sensitivity(file, directory)
        report = _report(obtained, this)
        _deliver(directory / report.rows[-1].model_file, directory)
        write_atomically(directory / "report.md", to_markdown(report))
        write_atomically(directory / "report.html", to_html(report))
        write_atomically(directory / "report.json", to_json(report))
        record_end(directory, exit_code(report.verdicts))
    told(report)
    return report


def run_sensitivity(pipeline: Pipeline, directory: Path, *, device: torch.device) -> Sensitivity:
    """Carry out `pipeline`, which ends with a stage that measures sensitivity, as `run` does, and return what it found.

    Leaves `sensitivity.md` and `sensitivity.svg` in `directory`; nothing is timed, reported or delivered. Raises what
    `run` raises, and works under torchrun as it does.
    """
    store = Store(directory)
    if not processes(device).is_main_process:
        assisted: Sensitivity = _assisted(pipeline, store, device)
        return assisted
    with store.lock(), beside(pipeline.directory), user_errors(), memory_errors():
        obtained, _ = _carried_out(pipeline, store, device)
        found = _show_sensitivity(_sensitivity_files(obtained)[-1], directory)
    told(found)
    return found


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


def _carried_out(pipeline: Pipeline, store: Store, device: torch.device) -> tuple[tuple[_Obtained, ...], _Run]:
    task = check_task(pipeline.task.call())
    data = data_fingerprints(task)
    chain = steps(pipeline, data=data, device=device.type)
    remember(store, data, chain)
    this = _Run(pipeline, task, store, device)
    return _obtain(chain, this), this


def _obtain(chain: Sequence[Step], run: _Run) -> tuple[_Obtained, ...]:
    """Take each step from the store or compute it."""
    obtained: list[_Obtained] = []
    run.store.clear_workspaces(keep={step.key for step in chain})
    for step in chain:
        entry = run.store.find(step.key)
        reused = entry is not None
        if entry is None:
            if all(before.reused for before in obtained):
                _check_models(run)
            entry = _compute(step, obtained, run)
        logger.info("%s: %s", step.name, "taken from the store" if reused else f"{entry.facts['seconds']:.1f} s")
        obtained.append(_Obtained(step, entry, reused))
    return tuple(obtained)


def _check_models(run: _Run) -> None:
    """Build every model and rehearse every stage that the pipeline names: what does not fit is refused at once."""
    model = TorchModel.build(run.pipeline.model, seed=run.pipeline.seed)
    check_model(model, run.task)
    for reference in run.pipeline.references:
        check_reference(reference, model, run.task, seed=run.pipeline.seed)
    entering: Artifact | None = model
    for position, planned in enumerate(run.pipeline.stages):
        if entering is None:
            break
        try:
            entering = planned.stage.rehearse(entering, model, run.task)
        except (InputError, StageError) as error:
            msg = f"stages.{position} ({planned.name}): {error}"
            raise type(error)(msg) from error
        if planned.stage.makes_baseline and position == 0 and isinstance(entering, TorchModel):
            model = entering


def _compute(step: Step, before: Sequence[_Obtained], run: _Run) -> Entry:
    logger.info("%s: running", step.name)
    work_dir = run.store.workspace(step.key)
    with run.store.draft() as draft:
        artifact_dir = draft / "artifact"
        artifact_dir.mkdir()
        start = time.perf_counter()
        epochs: list[Mapping[str, float]] = []
        reached: dict[str, Reached] = {}
        quantizations: list[Quantization] = []

        def reach(setting: str, asked: float, achieved: float) -> None:
            reached[setting] = Reached(setting=setting, asked=asked, achieved=achieved)

        order = told(_Order(step, *_inputs(before)))
        artifact = _apply(order, run, work_dir, record=epochs.append, reached=reach, quantized=quantizations.append)
        seconds = time.perf_counter() - start
        artifact.save(artifact_dir)
        facts: dict[str, Any] = {
            "stage": step.name,
            "parts": step.parts,
            "artifact": type(artifact).__name__,
            "zeros": _promised_zeros(artifact, before),
            "seconds": seconds,
            "losses": epochs,
            "reached": [one.model_dump() for one in reached.values()],
            "quantization": quantizations[-1].model_dump(mode="json") if quantizations else None,
        }
        if step.gives_model:
            facts |= _measured(artifact, draft, [one.entry for one in before], run)
            _check_zeros(facts["measurement"], facts["zeros"], step.name)
        entry = run.store.commit(draft, step.key, facts)
    run.store.clear_workspaces()
    return entry


def _promised_zeros(artifact: Artifact, before: Sequence[_Obtained]) -> int:
    """Zeros that the model must have: a file was made from the last module, and none may be lost in it."""
    if isinstance(artifact, TorchModel):
        return sum(artifact.zeros.values())
    return before[-1].entry.facts.get("zeros", 0) if before else 0


def _check_zeros(measurement: Mapping[str, Any], promised: int, stage: str) -> None:
    zeros = measurement["parameters"] - measurement["nonzero"]
    if zeros < promised:
        msg = (
            f"{stage} must keep the {promised} zeros that the model was pruned to, but its ONNX file has {zeros}, "
            f"{promised - zeros} fewer; prune again after it, or leave it out"
        )
        raise StageError(msg)


def _measured(artifact: Artifact, draft: Path, before: Sequence[Entry], run: _Run) -> dict[str, Any]:
    """Facts about the model in its ONNX form, a file of the draft, and the widths of the layers that it came from."""
    if isinstance(artifact, TorchModel):
        onnx = to_onnx(artifact.module, run.task, draft / "model.onnx")
        channels = output_channels(artifact.module, run.task.example_inputs)
    else:
        onnx, channels = OnnxModel.load(draft / "artifact"), {}
    measured = measure(onnx.path, run.task)
    return {
        "model_file": str(onnx.path.relative_to(draft)),
        "measurement": measured.measurement.model_dump(mode="json"),
        "channels": channels,
        **_classifier_facts(measured.predictions, before, draft),
    }


def _classifier_facts(predictions: Predictions | None, before: Sequence[Entry], draft: Path) -> dict[str, Any]:
    """Quality and, after the baseline, fidelity to it; the baseline leaves its outputs in its entry for that."""
    if predictions is None:
        return {}
    facts: dict[str, Any] = {"quality": classification(predictions).model_dump(mode="json")}
    if not before:
        np.save(draft / _BASELINE_OUTPUTS, predictions.logits)
    elif (file := before[0].directory / _BASELINE_OUTPUTS).exists():
        baseline_logits = np.load(file, mmap_mode="r", allow_pickle=False)
        if baseline_logits.shape == predictions.logits.shape:
            facts["fidelity"] = comparison(baseline_logits, predictions).model_dump(mode="json")
    return facts


@dataclass(frozen=True)
class _Order:
    """A step to compute, from the model that enters and the baseline; nothing enters the first."""

    step: Step
    model: Entry | None
    reference: Entry | None


def _inputs(before: Sequence[_Obtained]) -> tuple[Entry | None, Entry | None]:
    """The model that enters, and the baseline, with what stages that keep the model have added to it."""
    if not before:
        return None, None
    added = itertools.takewhile(lambda one: not one.step.gives_model, before[1:])
    return before[-1].entry, [before[0], *added][-1].entry


def _assisted(pipeline: Pipeline, store: Store, device: torch.device) -> Any:
    """Take part in every step that the main process computes, until it tells what it found."""
    with beside(pipeline.directory), user_errors(), memory_errors():
        this = _Run(pipeline, check_task(pipeline.task.call()), store, device)
        while isinstance(order := told(None), _Order):
            with tempfile.TemporaryDirectory() as work_dir:
                _apply(order, this, Path(work_dir))
    return order


def _apply(
    order: _Order,
    run: _Run,
    work_dir: Path,
    *,
    record: Callable[[Mapping[str, float]], None] = lambda _means: None,
    reached: Callable[[str, float, float], None] = lambda _setting, _asked, _achieved: None,
    quantized: Callable[[Quantization], None] = lambda _found: None,
) -> Artifact:
    """Give the step the model that the store holds, so that a resumed run computes from the same bytes."""
    step = order.step
    if order.model is None or order.reference is None:
        model: Artifact = TorchModel.build(run.pipeline.model, seed=run.pipeline.seed)
        reference = model
    else:
        model, reference = _load(order.model, run), _load(order.reference, run)
    if step.stage is None:
        return model
    if not isinstance(reference, TorchModel):
        msg = f"the baseline must be a TorchModel, got {type(reference).__name__}"
        raise StageError(msg)

    def log(line: str) -> None:
        logger.info("%s: %s", step.name, line)

    context = StageContext(reference, run.device, run.pipeline.seed, work_dir, log, record, reached, quantized)
    artifact: Artifact = step.stage.apply(model, run.task, context)
    gathered(None)  # the main process clears its work directory, from which another one may still be reading
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
    of_the_model: list[dict[str, Any]] = [{}] if obtained[0].step.stage is None else []
    settings = dict(zip([one.step.key for one in obtained], of_the_model + pipeline.settings["stages"], strict=True))
    models = [one for one in obtained if one.step.gives_model]
    files = [_model_file(one.entry) for one in models]
    logger.info("timing %d models side by side", len(files))
    inputs = [tensor[:1].numpy() for tensor in task.example_inputs]
    latencies, session = time_models(files, inputs=inputs)
    rows = tuple(
        Row(
            stage=one.step.name,
            settings=settings[one.step.key],
            key=one.step.key,
            model_file=file.relative_to(run.store.root).as_posix(),
            measurement=Measurement.model_validate(one.entry.facts["measurement"]),
            quality=one.entry.facts.get("quality"),
            fidelity=one.entry.facts.get("fidelity"),
            latency=latency,
            seconds=one.entry.facts["seconds"],
            reused=one.reused,
            losses=one.entry.facts.get("losses", ()),
            reached=one.entry.facts.get("reached", ()),
            quantization=one.entry.facts.get("quantization"),
            channels=one.entry.facts.get("channels", {}),
        )
        for one, file, latency in zip(models, files, latencies, strict=True)
    )
    preparations = tuple(
        Preparation(
            stage=one.step.name,
            settings=settings[one.step.key],
            key=one.step.key,
            seconds=one.entry.facts["seconds"],
            reused=one.reused,
        )
        for one in obtained
        if not one.step.gives_model
    )
    report = Report(
        pipeline=pipeline.name,
        settings=pipeline.settings,
        overrides=pipeline.overrides,
        metrics=tuple(
            MetricInfo(name=metric.name, unit=metric.unit, higher_is_better=metric.higher_is_better)
            for metric in task.metrics
        ),
        labels=tuple(map(str, task.labels)) if len(task.labels) <= MOST_LISTED_CLASSES else (),
        rows=rows,
        preparations=preparations,
        latency_session=session,
        environment={
            **environment(),
            "device": run.device.type,
            "training_threads": torch.get_num_threads(),
            "seed": run.pipeline.seed,
        },
        verdicts=(),
    )
    return report if pipeline.gate is None else report.model_copy(update={"verdicts": judge(pipeline.gate, report)})


def _sensitivity_files(obtained: Sequence[_Obtained]) -> list[Path]:
    files = [one.entry.directory / "artifact" / sensitivity.FILE_NAME for one in obtained]
    return [file for file in files if file.exists()]


def _show_sensitivity(file: Path, directory: Path) -> Sensitivity:
    """Write the table and the picture of a stored sensitivity, and return it."""
    found = sensitivity.read_sensitivity(file)
    write_atomically(directory / "sensitivity.svg", sensitivity.to_svg(found))
    write_atomically(directory / "sensitivity.md", sensitivity.to_markdown(found, picture="sensitivity.svg"))
    return found


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
