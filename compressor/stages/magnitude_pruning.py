"""Channels, heads and hidden units are removed, and the model recovers by distillation from the baseline."""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Self, final

from pydantic import Field, model_validator
from torch import nn

from compressor.distillation.distillation_settings import DistillationSettings
from compressor.distillation.recovery import check_recovery, recover
from compressor.models.artifact import TorchModel
from compressor.models.edits import structural_edits
from compressor.pruning.allocation import Counts, StepOf, multiples_of, multiples_that_fit
from compressor.pruning.channels import Pruned, prunable_groups
from compressor.pruning.conv1d import with_linears
from compressor.pruning.criteria import Criterion
from compressor.pruning.cuttable import CutAllocation, Cuttable
from compressor.pruning.goals import LARGEST, Goal, Quantity, check_reachable, check_unmet, measure_of, reach
from compressor.pruning.groups import Removal
from compressor.pruning.schedule import Schedule, check_schedule, divide_epochs, list_levels
from compressor.pruning.staircase import measure_step
from compressor.records.findings import Reached
from compressor.stage import Stage, StageContext
from compressor.system.processes import broadcast, processes
from compressor.task import Task

_QUANTITIES: tuple[Quantity, ...] = ("parameters", "macs", "size_bytes", "latency_ratio")


@final
class MagnitudePruning(Stage[TorchModel, TorchModel]):
    """Remove the channels, heads and hidden units that matter least, each with all that depends on it, then recover.

    How many is said by one of `pruning_ratio`, `parameters`, `macs`, `size_bytes` and `latency_ratio`.
    """

    pruning_ratio: float | None = Field(default=None, gt=0, lt=1)
    """Share of the channels that leave; parameters fall to about the square of what stays."""
    parameters: int | None = Field(default=None, gt=0)
    """At most so many stay."""
    macs: int | None = Field(default=None, gt=0)
    """At most so many multiply-accumulates for one sample stay. Not a measure of speed."""
    size_bytes: int | None = Field(default=None, gt=0)
    """At most so large is the model, as float32 in ONNX."""
    latency_ratio: float | None = Field(default=None, gt=1)
    """At least so many times as fast as the baseline, measured under ONNX Runtime on this machine."""
    criterion: Criterion = "l2"
    """What scores the units; the smallest scores leave first. `l2`, `l1`: the norm of all weights that leave with a
    unit; `bn_scale`: the scale of its BatchNorm; `taylor`: what leaving it out changes in the loss, to first order."""
    allocation: CutAllocation = "uniform"
    """How what leaves is divided among the groups. `uniform`: every group loses the same share; `global`: the units
    with the smallest scores of all leave; `isomorphic`: every class of groups built alike loses the same share, those
    with the smallest scores in the class; `sensitivity`: every group loses as much as costs one common fall on
    validation, as `- stage: sensitivity`, which must come directly before, has measured it."""
    round_to: int | None = Field(default=None, gt=0)
    """Channels are kept in multiples of this, because kernels run whole vectors. Unless given, it is the step in which
    time grows with channels on this machine, or half as much and so on in layers with less than two such steps."""
    protect: tuple[str, ...] = ()
    """Paths of layers that keep all their channels, with all below them; `*` and `**` as in `losses`. What cannot be
    followed is kept in any case; the log says what and why."""
    schedule: Schedule | None = None
    """With `recovery`: prune in steps, with an epoch of it after each but the last; all at once unless given."""
    recovery: DistillationSettings | None = None
    """Training after pruning, by distillation from the baseline unless `losses` names `hard` alone."""

    @model_validator(mode="after")
    def _says_one_thing(self) -> Self:
        names = ("pruning_ratio", *_QUANTITIES)
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) != 1:
            msg = f"give one of {', '.join(names)}, got {' and '.join(given) or 'none'}"
            raise ValueError(msg)
        check_schedule(self.schedule, None if self.recovery is None else self.recovery.epochs)
        return self

    @property
    def goal(self) -> Goal | None:
        """What the search is for; None with `pruning_ratio`."""
        asked = {quantity: getattr(self, quantity) for quantity in _QUANTITIES}
        return next((Goal(quantity, float(value)) for quantity, value in asked.items() if value is not None), None)

    def rehearse(self, model: TorchModel, reference: TorchModel, task: Task) -> TorchModel:
        """Cut the model at once, and compare it with what recovery asks; with a goal, cut as far as it goes."""
        model = with_linears(model)
        cuttable = self._cuttable(model, task)
        smaller = cuttable.cut(cuttable.choose(self.pruning_ratio or LARGEST, self._step_of()))
        if self.goal is not None and self.goal.quantity != "latency_ratio":  # timing would take too long
            with measure_of(self.goal.quantity, reference.module, task) as measure:
                check_unmet(self.goal, measure(model.module))
                check_reachable(self.goal, measure(smaller.module))
        rehearsed = _with(model, smaller)
        check_recovery(rehearsed, reference, self.recovery, task)
        # what follows meets a model that a goal has cut less
        return rehearsed if self.goal is None else model

    def apply(self, model: TorchModel, task: Task, context: StageContext) -> TorchModel:
        """Return a smaller model. Raises StageError if it cannot be cut as asked; the message says what can.

        How many units each group loses is decided once, on the model that enters; which ones, again at every step.
        Under torchrun the main process decides: times and sums may differ between processes.
        """
        decides = processes(context.device).is_main_process
        model = with_linears(model)
        cuttable = self._cuttable(model, task, log=context.log)
        courses = broadcast(self._courses(cuttable, task, context) if decides else None)
        done = 0
        for counts, epochs in zip(courses, self._epochs, strict=True):
            if done:
                cuttable = self._cuttable(model, task)
            if any(counts.values()):  # rounding may leave a step nothing to do
                pruned = cuttable.cut(broadcast(cuttable.choose_counts(counts) if decides else None))
                context.log(_describe(model.module, pruned))
                model = _with(model, pruned)
            if self.recovery is not None:
                model = recover(model, self.recovery, task, context, epochs=epochs, first_epoch=done)
                done += epochs
        return model

    @property
    def _epochs(self) -> Sequence[int]:
        """Of recovery, after each step."""
        epochs = 0 if self.recovery is None else self.recovery.epochs
        return (epochs,) if self.schedule is None else divide_epochs(epochs, self.schedule.steps)

    def _courses(self, cuttable: Cuttable, task: Task, context: StageContext) -> Sequence[Counts]:
        """How many units each group loses at each step."""
        removal_of = partial(cuttable.choose, step_of=self._step_of(context.log))
        if self.goal is None:
            ratio = self.pruning_ratio or 0.0
            whole = removal_of(ratio)
            achieved = cuttable.cut(whole).pruning_ratio
            context.report(Reached(setting="pruning_ratio", asked=ratio, achieved=achieved))
        else:
            with measure_of(self.goal.quantity, context.reference.module, task) as measure:
                found = reach(
                    self.goal,
                    cuttable.model.module,
                    removal_of=removal_of,
                    cut=cuttable.cut,
                    measure=measure,
                    log=context.log,
                )
            ratio, whole = found.pruning_ratio, found.removal
            context.report(Reached(setting=self.goal.quantity, asked=self.goal.asked, achieved=found.achieved))
        before = () if self.schedule is None else list_levels(ratio, self.schedule.steps, self.schedule.shape)[:-1]
        totals = [_count(removal) for removal in (*map(removal_of, before), whole)]
        return [total - last for last, total in pairwise([Counter[str](), *totals])]

    def _cuttable(self, model: TorchModel, task: Task, *, log: Callable[[str], None] = lambda _line: None) -> Cuttable:
        groups = prunable_groups(model.module, task.example_inputs, protect=self.protect, log=log)
        return Cuttable(model, task, groups, self.criterion, self.allocation)

    def _step_of(self, log: Callable[[str], None] = lambda _line: None) -> StepOf:
        """How many units of a group leave together: by `round_to`, or as measured on this machine."""
        if self.round_to is not None:
            return multiples_of(self.round_to)
        step = measure_step()
        log(f"channels stay multiples of {step}, the step in which time grows with them on this machine")
        return multiples_that_fit(step)


def _count(removal: Removal) -> Counter[str]:
    return Counter({path: len(units) for path, units in removal.items()})


def _with(model: TorchModel, pruned: Pruned) -> TorchModel:
    return model.with_module(pruned.module, *structural_edits(model.module, pruned.module))


def _describe(module: nn.Module, pruned: Pruned) -> str:
    had = sum(had for _, had in pruned.channels.values())
    sizes = [sum(parameter.numel() for parameter in one.parameters()) for one in (module, pruned.module)]
    return (
        f"removed {pruned.channels_removed} of {had} channels ({pruned.pruning_ratio:.0%}) in groups: "
        f"{len(pruned.channels)}; parameters {sizes[0]} -> {sizes[1]}"
    )
