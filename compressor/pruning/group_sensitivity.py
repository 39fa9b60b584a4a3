"""How much each group matters: measured by cutting it alone, and turned into a share that each group may lose."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from compressor.errors import StageError
from compressor.models.artifact import TorchModel
from compressor.models.attachment import Attachment
from compressor.models.edits import Edit
from compressor.pruning.allocation import by_ratios, multiples_of
from compressor.pruning.criteria import Criterion, Scores, scores
from compressor.pruning.groups import Group, without
from compressor.records.sensitivity_curves import FILE_NAME, GroupCurve, SensitivityCurves, read_sensitivity
from compressor.system.copying import copy_module
from compressor.system.processes import gather_objects, processes
from compressor.system.progress import progress_bar
from compressor.task import EVALUATION_BATCH, Batch, Metric, Task, evaluate_outputs, evenly_spaced, gather

_LEAST_SLOPE = 1e-6
"""The least that losing a whole group costs, as a part of the largest fall measured. So groups whose cutting costs
nothing that can be seen lose equal shares."""
_BISECTIONS = 100


@final
@dataclass(frozen=True)
class GroupSensitivity(Attachment):
    """How much each group of coupled layers of a model matters."""

    curves: SensitivityCurves

    def save(self, directory: Path) -> None:
        """Write `sensitivity.json`."""
        (directory / FILE_NAME).write_text(self.curves.model_dump_json(indent=1))

    @classmethod
    def load(cls, directory: Path, module: nn.Module) -> "GroupSensitivity":  # noqa: ARG003  # the file says whose it is
        """Read `sensitivity.json`."""
        return cls(read_sensitivity(directory / FILE_NAME))

    def carry_over(self, before: nn.Module, after: nn.Module, edits: tuple[Edit, ...]) -> None:
        """Other weights leave the sensitivity behind."""


def measure_sensitivity(
    model: TorchModel,
    groups: Sequence[Group],
    task: Task,
    *,
    criterion: Criterion,
    grid: Sequence[float],
    samples: int,
    device: torch.device,
    log: Callable[[str], None],
) -> SensitivityCurves:
    """Evaluate the first metric of `task` with each group alone cut by each ratio of `grid`, nothing trained again.

    At most `samples` of the validation split are used, evenly spaced, and kept in memory. `grid` rises within (0, 1).
    Under torchrun the processes share the groups.

    Raises StageError for a value that is not finite, and what `scores` raises.
    """
    metric = task.metrics[0]
    batches = _validation_batches(task, samples, device)
    channel_scores = scores(criterion, model.module, groups, task)

    def evaluate_module(module: nn.Module, what: str) -> float:
        return _finite(_value(module.to(device), batches, metric), metric, what)

    value = evaluate_module(copy_module(model.module).eval(), "the uncut model")
    team = processes(device)
    own = groups[team.process_index :: team.num_processes]
    curves = {}
    with progress_bar(own, unit="group", hidden=not team.is_main_process) as bar:
        for done, group in enumerate(bar, start=1):
            curves[group.path] = _curve(
                model.module, group, channel_scores, grid, uncut=value, evaluate_module=evaluate_module
            )
            if bar.disable and done * 4 // len(own) > (done - 1) * 4 // len(own):
                log(f"{done * len(groups) // len(own)} of {len(groups)} groups measured")
    every = {path: curve for part in gather_objects(curves) for path, curve in part.items()}
    return SensitivityCurves(
        model=model.digest,
        criterion=criterion,
        metric=metric.info,
        samples=sum(len(batch.targets) for batch in batches),
        ratios=tuple(grid),
        value=value,
        groups={group.path: every[group.path] for group in groups},
    )


def flat_sensitivity(
    model: TorchModel, groups: Sequence[Group], task: Task, *, criterion: Criterion, grid: Sequence[float]
) -> SensitivityCurves:
    """A sensitivity as `measure_sensitivity` gives it, in which no group matters: for rehearsals."""
    flat = (0.0,) * len(grid)
    return SensitivityCurves(
        model=model.digest,
        criterion=criterion,
        metric=task.metrics[0].info,
        samples=1,
        ratios=tuple(grid),
        value=0.0,
        groups={group.path: GroupCurve(channels=_channels(group), values=flat) for group in groups},
    )


def check_sensitivity(model: TorchModel, groups: Sequence[Group], *, criterion: Criterion) -> SensitivityCurves:
    """Return the sensitivity that `model` carries.

    Raises StageError if it has none, or one of another model, criterion or of other groups; it names what differs.
    """
    attached = model.attachment(GroupSensitivity)
    if attached is None:
        msg = (
            "allocation: sensitivity needs a model whose sensitivity was measured, but this one has none; add "
            "`- stage: sensitivity` directly before the pruning"
        )
        raise StageError(msg)
    curves = attached.curves
    faults = []
    if curves.model != model.digest:
        faults.append("it was measured on another model")
    if curves.criterion != criterion:
        faults.append(f"its criterion is {curves.criterion}, not {criterion}")
    theirs = {path: curve.channels for path, curve in curves.groups.items()}
    ours = {group.path: _channels(group) for group in groups}
    if other := [path for path in {**theirs, **ours} if theirs.get(path) != ours.get(path)]:
        faults.append(f"its groups differ in {', '.join(other)}")
    if faults:
        msg = (
            f"the sensitivity must be that of the model and the groups to be pruned, but {'; '.join(faults)}; give "
            "`- stage: sensitivity` the same criterion and protect, and put it directly before the pruning"
        )
        raise StageError(msg)
    return curves


def ratios_by_sensitivity(
    sensitivity: SensitivityCurves, groups: Sequence[Group], *, pruning_ratio: float
) -> Mapping[str, float]:
    """Share of its units that each group loses, by path, so that a share `pruning_ratio` of all channels leaves.

    One fall of the metric is common to all groups, and each loses the share that costs this fall by its own curve.
    Between the ratios that were measured the curve is a straight line; where it rises again it counts as level. The
    last unit of a group stays. A larger `pruning_ratio` gives no group a smaller share. If it asks for more than all
    but the last units, all but these leave.
    """
    curves = _costs(sensitivity, groups)
    ratios = np.array([0.0, *sensitivity.ratios, 1.0])
    most = np.array([1 - 1 / group.units for group in groups])
    channels = np.array([_channels(group) for group in groups])

    def at(cost: float) -> NDArray[np.float64]:
        shares: NDArray[np.float64] = np.minimum([np.interp(cost, curve, ratios) for curve in curves], most)
        return shares

    low, high = 0.0, 1 + _LEAST_SLOPE
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        enough = (at(middle) * channels).sum() >= pruning_ratio * channels.sum()
        low, high = (low, middle) if enough else (middle, high)
    return {group.path: float(ratio) for group, ratio in zip(groups, at(high), strict=True)}


def _costs(sensitivity: SensitivityCurves, groups: Sequence[Group]) -> list[NDArray[np.float64]]:
    """Falls of each group at 0, at each ratio and at 1, rising, as parts of the largest fall of all.

    At 1, where a whole group is gone, the fall is the largest of all.
    """
    slope = _LEAST_SLOPE * np.array([0.0, *sensitivity.ratios, 1.0])
    falls = [np.maximum.accumulate(np.maximum(sensitivity.falls(group.path), 0)) for group in groups]
    worst = max(fall[-1] for fall in falls) or 1.0
    return [np.array([0.0, *(fall / worst), 1.0]) + slope for fall in falls]


def _curve(
    module: nn.Module,
    group: Group,
    channel_scores: Scores,
    grid: Sequence[float],
    *,
    uncut: float,
    evaluate_module: Callable[[nn.Module, str], float],
) -> GroupCurve:
    """The value of the metric at each ratio of `grid`.

    The group is cut physically. This is what pruning will do, also where a normalization averages, and it runs faster.
    """
    removed: tuple[int, ...] = ()
    value, values = uncut, []
    for ratio in grid:
        removal = by_ratios({group.path: ratio}, [group], channel_scores, step_of=multiples_of(1))
        if removal[group.path] != removed:  # else a small group loses no further unit
            removed = removal[group.path]
            what = f"{group.path} cut by {ratio:g}; leave that out of the grid"
            value = evaluate_module(without(module, [group], removal), what)
        values.append(value)
    return GroupCurve(channels=_channels(group), values=tuple(values))


def _validation_batches(task: Task, samples: int, device: torch.device) -> tuple[Batch, ...]:
    # decoded once, as they are evaluated hundreds of times
    rows = evenly_spaced(task.validation, samples)
    starts = range(0, len(rows), EVALUATION_BATCH)
    return tuple(gather(task.validation, rows[start : start + EVALUATION_BATCH]).to(device) for start in starts)


def _value(module: nn.Module, batches: Sequence[Batch], metric: Metric) -> float:
    with torch.no_grad():
        pairs = [(module(*batch.inputs).cpu(), batch.targets.cpu()) for batch in batches]
    return evaluate_outputs([metric], pairs)[metric.name]


def _finite(value: float, metric: Metric, what: str) -> float:
    if not math.isfinite(value):
        msg = f"{metric.name} on validation must be a finite number, got {value} for {what}"
        raise StageError(msg)
    return float(value)


def _channels(group: Group) -> int:
    return group.units * group.channels_per_unit
