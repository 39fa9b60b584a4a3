"""`run`, the loop: each step is taken from the store or computed, measured and stored; then all are timed together."""

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from compressor.config.pipeline_file import Pipeline
from compressor.errors import InputError, StageError
from compressor.measure.latency import time_models
from compressor.measure.quality import MOST_LISTED_CLASSES
from compressor.models.artifact import Artifact, OnnxModel, TorchModel
from compressor.records.environment import environment
from compressor.records.measurements import Measurement, MetricInfo
from compressor.records.report import Preparation, Report, Row
from compressor.records.sensitivity_curves import FILE_NAME, SensitivityCurves, read_sensitivity
from compressor.references.reference import prefer_modules_in, user_errors
from compressor.report import sensitivity_map
from compressor.report.json import to_json
from compressor.report.markdown import to_markdown
from compressor.report.page.html import to_html
from compressor.run.keys import Step, data_fingerprints, remember, steps
from compressor.run.outcome import record_end, record_outcome
from compressor.run.preflight import check_model, check_reference, check_task
from compressor.run.step import Obtained, Run, assist, compute
from compressor.run.store import Entry, Store
from compressor.system.disk import host_errors, memory_errors, write_atomically
from compressor.system.processes import broadcast, processes
from compressor.verdicts.gate import exit_code, judge

logger = logging.getLogger("compressor")


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
        assisted: Report = _assist(pipeline, store, device)
        return assisted
    with store.lock(), record_outcome(directory), prefer_modules_in(pipeline.directory), user_errors(), memory_errors():
        obtained, this = _carry_out(pipeline, store, device)
        for file in _sensitivity_files(obtained)[-1:]:
            _show_sensitivity(file, directory)
        report = _report(obtained, this)
        _deliver(directory / report.rows[-1].model_file, directory)
        write_atomically(directory / "report.md", to_markdown(report))
        write_atomically(directory / "report.html", to_html(report))
        write_atomically(directory / "report.json", to_json(report))
        record_end(directory, exit_code(report.verdicts))
    broadcast(report)
    return report


def run_sensitivity(pipeline: Pipeline, directory: Path, *, device: torch.device) -> SensitivityCurves:
    """Carry out `pipeline`, which ends with a stage that measures sensitivity, as `run` does, and return what it found.

    Leaves `sensitivity.md` and `sensitivity.svg` in `directory`; nothing is timed, reported or delivered. Raises what
    `run` raises, and works under torchrun as it does.
    """
    store = Store(directory)
    if not processes(device).is_main_process:
        assisted: SensitivityCurves = _assist(pipeline, store, device)
        return assisted
    with store.lock(), prefer_modules_in(pipeline.directory), user_errors(), memory_errors():
        obtained, _ = _carry_out(pipeline, store, device)
        found = _show_sensitivity(_sensitivity_files(obtained)[-1], directory)
    broadcast(found)
    return found


def _assist(pipeline: Pipeline, store: Store, device: torch.device) -> Any:
    with prefer_modules_in(pipeline.directory), user_errors(), memory_errors():
        return assist(Run(pipeline, check_task(pipeline.task.call()), store, device))


def _carry_out(pipeline: Pipeline, store: Store, device: torch.device) -> tuple[tuple[Obtained, ...], Run]:
    task = check_task(pipeline.task.call())
    data = data_fingerprints(task)
    chain = steps(pipeline, data=data, device=device.type)
    remember(store, data, chain)
    this = Run(pipeline, task, store, device)
    return _obtain(chain, this), this


def _obtain(chain: Sequence[Step], run: Run) -> tuple[Obtained, ...]:
    """Take each step from the store or compute it."""
    obtained: list[Obtained] = []
    run.store.clear_workspaces(keep={step.key for step in chain})
    for step in chain:
        entry = run.store.find(step.key)
        reused = entry is not None
        if entry is None:
            if all(before.reused for before in obtained):
                _check_models(run)
            entry = compute(step, obtained, run)
        logger.info("%s: %s", step.name, "taken from the store" if reused else f"{entry.facts['seconds']:.1f} s")
        obtained.append(Obtained(step, entry, reused))
    return tuple(obtained)


def _check_models(run: Run) -> None:
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


def _model_file(entry: Entry) -> Path:
    file: Path = entry.directory / entry.facts["model_file"]
    if not file.resolve().is_relative_to(entry.directory.resolve()):
        msg = f"the model file of {entry.directory} must lie in it, got {entry.facts['model_file']!r}"
        raise InputError(msg)
    return file


def _report(obtained: Sequence[Obtained], run: Run) -> Report:
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


def _sensitivity_files(obtained: Sequence[Obtained]) -> list[Path]:
    files = [one.entry.directory / "artifact" / FILE_NAME for one in obtained]
    return [file for file in files if file.exists()]


def _show_sensitivity(file: Path, directory: Path) -> SensitivityCurves:
    """Write the table and the picture of a stored sensitivity, and return it."""
    found = read_sensitivity(file)
    write_atomically(directory / "sensitivity.svg", sensitivity_map.to_svg(found))
    write_atomically(directory / "sensitivity.md", sensitivity_map.to_markdown(found, picture="sensitivity.svg"))
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
