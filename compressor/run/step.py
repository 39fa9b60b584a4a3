"""A step of a run: computed from what the store holds, by all processes together, measured and stored."""

import itertools
import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from compressor.config.pipeline_file import Pipeline
from compressor.errors import InputError, StageError
from compressor.export.open_axes import check_rounded_at_open_axes
from compressor.export.to_onnx import to_onnx
from compressor.measure.model import measure
from compressor.measure.quality import Predictions, classification, comparison
from compressor.models.artifact import Artifact, OnnxModel, TorchModel
from compressor.models.kept_zeros import zeros_of
from compressor.models.layers import output_channels
from compressor.models.trusted import Trusted
from compressor.records.findings import Finding
from compressor.records.measurements import Fidelity
from compressor.records.step_facts import ModelFacts, StepFacts, collect_findings
from compressor.references.reference import foreign_errors
from compressor.run.keys import Step, note_code
from compressor.run.promises import check_kept, check_reload, check_type
from compressor.run.store import Entry, Store
from compressor.stage import StageContext, trust
from compressor.system.processes import broadcast, gather_objects
from compressor.task import Task

logger = logging.getLogger("compressor")

_BASELINE_OUTPUTS = "test_outputs.npy"
"""What the baseline says of each test sample, float32 (N, C), in its entry."""


@dataclass(frozen=True)
class Run:
    """What all steps of a run share."""

    pipeline: Pipeline
    task: Task
    store: Store
    device: torch.device

    @property
    def trusted(self) -> Trusted:
        """What loading a stored model may call."""
        return trust((planned.stage for planned in self.pipeline.stages), self.pipeline.model)


@dataclass(frozen=True)
class Obtained:
    """A step whose result the store holds, and whether an earlier run left it there."""

    step: Step
    entry: Entry
    reused: bool

    @cached_property
    def facts(self) -> StepFacts:
        """What is known of the step. Raises InputError if the store holds something else."""
        return _read_facts(self.entry)

    @property
    def model_file(self) -> Path:
        """The ONNX file that was measured. Raises InputError if it does not lie in the entry."""
        assert self.facts.model is not None, self.step.name
        file = self.entry.directory / self.facts.model.file
        if not file.resolve().is_relative_to(self.entry.directory.resolve()):
            msg = f"the model file of {self.entry.directory} must lie in it, got {self.facts.model.file!r}"
            raise InputError(msg)
        return file


@dataclass(frozen=True)
class _Order:
    """A step to compute, from the model that enters and the baseline; nothing enters the first."""

    step: Step
    model: Entry | None
    reference: Entry | None


def compute(step: Step, before: Sequence[Obtained], run: Run) -> Entry:
    """Compute `step` from what the steps before it gave, and store it with every fact about it.

    The main process calls this while the others `assist`. Raises what the stage raises, and StageError if a file has
    lost zeros that its model promised.
    """
    logger.info("%s: running", step.name)
    work_dir = run.store.workspace(step.key)
    told: list[Finding] = []

    def report(finding: Finding) -> None:
        collect_findings([finding])  # a kind that nobody shows is refused at once, not after the work
        told.append(finding)

    with run.store.draft() as draft:
        artifact_dir = draft / "artifact"
        artifact_dir.mkdir()
        start = time.perf_counter()
        order = broadcast(_Order(step, *_inputs(before)))
        artifact = _apply(order, run, work_dir, report=report)
        seconds = time.perf_counter() - start
        artifact.save(artifact_dir)
        check_reload(artifact, artifact_dir, run.task, run.trusted, step.name)
        facts = StepFacts(
            stage=step.name,
            parts=step.parts,
            artifact=type(artifact).__name__,
            zeros=_count_promised_zeros(artifact, before),
            seconds=seconds,
            findings=collect_findings(told),
            model=_measure(artifact, draft, [one.entry for one in before], run) if step.gives_model else None,
        )
        _check_zeros(facts)
        note_code(run.pipeline, run.store)
        entry = run.store.commit(draft, step.key, facts.model_dump(mode="json"))
    run.store.clear_workspaces()
    return entry


def assist(run: Run) -> Any:
    """Take part in every step that the main process computes, until it tells what it found; return that.

    Raises what the stages raise.
    """
    while isinstance(order := broadcast(None), _Order):
        with tempfile.TemporaryDirectory() as work_dir:
            _apply(order, run, Path(work_dir))
    return order


def _inputs(before: Sequence[Obtained]) -> tuple[Entry | None, Entry | None]:
    """The model that enters, and the baseline, with what stages that keep the model have added to it."""
    if not before:
        return None, None
    added = itertools.takewhile(lambda one: not one.step.gives_model, before[1:])
    return before[-1].entry, [before[0], *added][-1].entry


def _apply(
    order: _Order, run: Run, work_dir: Path, *, report: Callable[[Finding], None] = lambda _finding: None
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

    context = StageContext(reference, run.device, run.pipeline.seed, work_dir, log, report)
    with foreign_errors(step.name, type(step.stage).__module__):
        artifact: Artifact = step.stage.apply(model, run.task, context)
    check_type(artifact, step.stage, step.name)
    check_kept(model, artifact, step.stage, run.task, step.name)
    if isinstance(artifact, OnnxModel):
        check_rounded_at_open_axes(artifact, model.predict, run.task)
    if isinstance(artifact, TorchModel):
        artifact.check(run.trusted, f"the model that {step.name} gives")
    gather_objects(None)  # the main process clears its work directory, from which another one may still be reading
    return artifact


def _read_facts(entry: Entry) -> StepFacts:
    try:
        return StepFacts.model_validate(entry.facts)
    except ValidationError as error:
        msg = f"{entry.directory} must hold the facts of a step, but: {error}; remove it"
        raise InputError(msg) from error


def _load(entry: Entry, run: Run) -> Artifact:
    directory = entry.directory / "artifact"
    if _read_facts(entry).artifact == OnnxModel.__name__:
        return OnnxModel.load(directory)
    return TorchModel.load(directory, trusted=run.trusted)


def _measure(artifact: Artifact, draft: Path, before: Sequence[Entry], run: Run) -> ModelFacts:
    """Measure the model in its ONNX form, a file of the draft; the baseline leaves its outputs there as well."""
    if isinstance(artifact, TorchModel):
        onnx = to_onnx(artifact.module, run.task, draft / "model.onnx")
        channels = output_channels(artifact.module, run.task.example_inputs)
    else:
        onnx, channels = OnnxModel.load(draft / "artifact"), {}
    measured = measure(onnx.path, run.task)
    predictions = measured.predictions
    if predictions is not None and not before:
        np.save(draft / _BASELINE_OUTPUTS, predictions.logits)
    return ModelFacts(
        file=str(onnx.path.relative_to(draft)),
        measurement=measured.measurement,
        channels=channels,
        quality=None if predictions is None else classification(predictions),
        fidelity=None if predictions is None or not before else _compare_with_baseline(before[0], predictions),
    )


def _compare_with_baseline(baseline: Entry, predictions: Predictions) -> Fidelity | None:
    file = baseline.directory / _BASELINE_OUTPUTS
    if not file.exists():
        return None
    try:
        baseline_logits = np.load(file, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        msg = f"{file} must hold the outputs of the baseline, but it is damaged; remove {baseline.directory}"
        raise InputError(msg) from error
    return comparison(baseline_logits, predictions) if baseline_logits.shape == predictions.logits.shape else None


def _count_promised_zeros(artifact: Artifact, before: Sequence[Obtained]) -> int:
    """Zeros that the model must have: a file was made from the last module, and none may be lost in it."""
    if isinstance(artifact, TorchModel):
        return sum(zeros_of(artifact).values())
    return before[-1].facts.zeros if before else 0


def _check_zeros(facts: StepFacts) -> None:
    if facts.model is None:
        return
    zeros = facts.model.measurement.parameters - facts.model.measurement.nonzero
    if zeros < facts.zeros:
        msg = (
            f"{facts.stage} must keep the {facts.zeros} zeros that the model was pruned to, but its ONNX file has "
            f"{zeros}, {facts.zeros - zeros} fewer; prune again after it, or leave it out"
        )
        raise StageError(msg)
