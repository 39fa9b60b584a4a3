"""`run`, the loop: each step is taken from the store or computed, measured and stored; then all are timed together."""

import logging
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from compressor.config.pipeline_file import Pipeline
from compressor.errors import InputError, StageError
from compressor.export.open_axes import open_sizes
from compressor.export.to_onnx import to_onnx
from compressor.measure.latency import time_models
from compressor.measure.quality import MOST_LISTED_CLASSES
from compressor.models.artifact import Artifact, OnnxModel, TorchModel
from compressor.records.environment import environment
from compressor.records.report import Preparation, Report, make_row
from compressor.references.reference import foreign_errors, prefer_modules_in, user_errors
from compressor.report.json import to_json
from compressor.report.markdown import to_markdown
from compressor.report.page.html import to_html
from compressor.run.keys import Step, data_fingerprints, list_steps, note_code, remember
from compressor.run.outcome import record_end, record_outcome
from compressor.run.preflight import check_model, check_reference, check_task
from compressor.run.promises import check_type
from compressor.run.step import Obtained, Run, assist, compute
from compressor.run.store import Store
from compressor.system.disk import host_errors, memory_errors, write_atomically
from compressor.system.processes import broadcast, processes
from compressor.verdicts.gate import exit_code, judge

logger = logging.getLogger("compressor")


def run(pipeline: Pipeline, directory: Path, *, device: torch.device, max_seconds: float = 20.0) -> Report:
    """Carry out `pipeline` in `directory`, reusing what earlier runs stored there, and report on every model.

    Leaves the delivered model, `report.json`, `report.md`, `report.html` and `outcome.json` in `directory`, and the
    documents that stages wrote. Each model is timed for at most `max_seconds`.

    Raises InputError for user code or data at fault, StageError, HostError, and LockedError while another run holds the
    directory.

    Under torchrun every process calls this and gets the report: the main one runs the pipeline, the others take part in
    the stages that it computes.
    """
    store = Store(directory)
    if not processes(device).is_main_process:
        assisted: Report = _assist(pipeline, store, device)
        return assisted
    with store.lock(), record_outcome(directory), prefer_modules_in(pipeline.directory), user_errors(), memory_errors():
        obtained, this = _carry_out(pipeline, store, device)
        report = _report(obtained, this, max_seconds)
        _deliver(directory / report.rows[-1].model_file, directory)
        write_atomically(directory / "report.md", to_markdown(report))
        write_atomically(directory / "report.html", to_html(report))
        write_atomically(directory / "report.json", to_json(report))
        record_end(directory, exit_code(report.verdicts))
    broadcast(report)
    return report


def prepare(pipeline: Pipeline, directory: Path, *, device: torch.device) -> Path:
    """Carry out `pipeline` as `run` does, and return where its last model is stored.

    Leaves the documents of stages in `directory`; nothing is timed, reported or delivered. Raises what `run` raises,
    and works under torchrun as it does.
    """
    store = Store(directory)
    if not processes(device).is_main_process:
        assisted: Path = _assist(pipeline, store, device)
        return assisted
    with store.lock(), prefer_modules_in(pipeline.directory), user_errors(), memory_errors():
        obtained, _ = _carry_out(pipeline, store, device)
    stored = obtained[-1].entry.directory / "artifact"
    broadcast(stored)
    return stored


def _assist(pipeline: Pipeline, store: Store, device: torch.device) -> Any:
    with prefer_modules_in(pipeline.directory), user_errors(), memory_errors():
        return assist(Run(pipeline, check_task(pipeline.task.call()), store, device))


def _carry_out(pipeline: Pipeline, store: Store, device: torch.device) -> tuple[tuple[Obtained, ...], Run]:
    task = check_task(pipeline.task.call())
    data = data_fingerprints(task)
    note_code(pipeline, store)
    chain = list_steps(pipeline, store, data=data, device=device.type)
    remember(pipeline, store, data, chain)
    this = Run(pipeline, task, store, device)
    obtained = _obtain(chain, this)
    for document in (document for one in obtained for document in one.facts.findings.documents):
        write_atomically(store.root / document.name, document.text)
    return obtained, this


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
        one = Obtained(step, entry, reused)
        logger.info("%s: %s", step.name, "taken from the store" if reused else f"{one.facts.seconds:.1f} s")
        obtained.append(one)
    return tuple(obtained)


def _check_models(run: Run) -> None:
    """Build every model and rehearse every stage that the pipeline names: what does not fit is refused at once."""
    model = TorchModel.build(run.pipeline.model, seed=run.pipeline.seed)
    check_model(model, run.task)
    if open_sizes(run.task):  # before any training: a size of the example may be in the exported model
        with tempfile.TemporaryDirectory() as directory:
            to_onnx(model.module, run.task, Path(directory) / "model.onnx")
    for reference in run.pipeline.references:
        check_reference(reference, model, run.task, seed=run.pipeline.seed)
    entering: Artifact | None = model
    for position, planned in enumerate(run.pipeline.stages):
        if entering is None:
            break
        try:
            with foreign_errors(planned.name, type(planned.stage).__module__):
                entering = planned.stage.rehearse(entering, model, run.task)
            if entering is not None:
                check_type(entering, planned.stage, "rehearse")
        except (InputError, StageError) as error:
            msg = f"stages.{position} ({planned.name}): {error}"
            raise type(error)(msg) from error
        if planned.stage.makes_baseline and position == 0 and isinstance(entering, TorchModel):
            model = entering


def _report(obtained: Sequence[Obtained], run: Run, max_seconds: float) -> Report:
    pipeline, task = run.pipeline, run.task
    of_the_model: list[dict[str, Any]] = [{}] if obtained[0].step.stage is None else []
    settings = dict(zip([one.step.key for one in obtained], of_the_model + pipeline.settings["stages"], strict=True))
    models = [one for one in obtained if one.step.gives_model]
    logger.info("timing %d models side by side", len(models))
    inputs = [tensor[:1].numpy() for tensor in task.example_inputs]
    files = [one.model_file for one in models]
    latencies, session = time_models(files, inputs=inputs, max_seconds=max_seconds)
    report = Report(
        pipeline=pipeline.name,
        settings=pipeline.settings,
        overrides=pipeline.overrides,
        metrics=tuple(metric.info for metric in task.metrics),
        labels=tuple(map(str, task.labels)) if len(task.labels) <= MOST_LISTED_CLASSES else (),
        rows=tuple(
            make_row(
                one.facts,
                settings=settings[one.step.key],
                key=one.step.key,
                model_file=one.model_file.relative_to(run.store.root),
                latency=latency,
                reused=one.reused,
            )
            for one, latency in zip(models, latencies, strict=True)
        ),
        preparations=tuple(
            Preparation(
                stage=one.step.name,
                settings=settings[one.step.key],
                key=one.step.key,
                seconds=one.facts.seconds,
                reused=one.reused,
            )
            for one in obtained
            if not one.step.gives_model
        ),
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
