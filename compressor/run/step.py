"""A step of a run: computed from what the store holds, by all processes together, measured and stored."""

import itertools
import logging
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compressor.config.pipeline_file import Pipeline
from compressor.errors import StageError
from compressor.export.to_onnx import to_onnx
from compressor.measure.model import measure
from compressor.measure.quality import Predictions, classification, comparison
from compressor.models.artifact import Artifact, OnnxModel, TorchModel
from compressor.models.layers import output_channels
from compressor.records.int8 import Quantization
from compressor.records.report import Reached
from compressor.run.keys import Step
from compressor.run.store import Entry, Store
from compressor.stage import StageContext
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


@dataclass(frozen=True)
class Obtained:
    """A step whose result the store holds, and whether an earlier run left it there."""

    step: Step
    entry: Entry
    reused: bool


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
    with run.store.draft() as draft:
        artifact_dir = draft / "artifact"
        artifact_dir.mkdir()
        start = time.perf_counter()
        epochs: list[Mapping[str, float]] = []
        reached: dict[str, Reached] = {}
        quantizations: list[Quantization] = []

        def reach(setting: str, asked: float, achieved: float) -> None:
            reached[setting] = Reached(setting=setting, asked=asked, achieved=achieved)

        order = broadcast(_Order(step, *_inputs(before)))
        artifact = _apply(order, run, work_dir, record=epochs.append, reached=reach, quantized=quantizations.append)
        seconds = time.perf_counter() - start
        artifact.save(artifact_dir)
        facts: dict[str, Any] = {
            "stage": step.name,
            "parts": step.parts,
            "artifact": type(artifact).__name__,
            "zeros": _count_promised_zeros(artifact, before),
            "seconds": seconds,
            "losses": epochs,
            "reached": [one.model_dump() for one in reached.values()],
            "quantization": quantizations[-1].model_dump(mode="json") if quantizations else None,
        }
        if step.gives_model:
            facts |= _measure(artifact, draft, [one.entry for one in before], run)
            _check_zeros(facts["measurement"], facts["zeros"], step.name)
        entry = run.store.commit(draft, step.key, facts)
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
    order: _Order,
    run: Run,
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
    gather_objects(None)  # the main process clears its work directory, from which another one may still be reading
    return artifact


def _load(entry: Entry, run: Run) -> Artifact:
    directory = entry.directory / "artifact"
    if entry.facts["artifact"] == OnnxModel.__name__:
        return OnnxModel.load(directory)
    return TorchModel.load(directory, among=[run.pipeline.model, *run.pipeline.references])


def _measure(artifact: Artifact, draft: Path, before: Sequence[Entry], run: Run) -> dict[str, Any]:
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


def _count_promised_zeros(artifact: Artifact, before: Sequence[Obtained]) -> int:
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
