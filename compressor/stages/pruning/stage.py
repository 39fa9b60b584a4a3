"""Channels, heads and hidden units are removed, and the model recovers by distillation from the baseline."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Literal, Self, final

from pydantic import Field, model_validator
from torch import nn

from compressor.artifact import TorchModel, structural_edits
from compressor.processes import processes, told
from compressor.pruning.allocation import Allocation, StepOf, by_ratios, multiples_of, multiples_that_fit, plan
from compressor.pruning.channels import Cuttable, Pruned, prunable_groups
from compressor.pruning.conv1d import with_linears
from compressor.pruning.criteria import COMPARABLE, Criterion, Scores, scores
from compressor.pruning.goals import LARGEST, Goal, Quantity, Reached, check_reachable, measure_of, reach
from compressor.pruning.groups import Plan
from compressor.pruning.schedule import Schedule, division, ramp
from compressor.pruning.sensitivity import carried_sensitivity, ratios_by_sensitivity
from compressor.pruning.staircase import measured_step
from compressor.stage import Stage, StageContext
from compressor.stages.pruning.recovery import Recovery, check_recovery, recover
from compressor.task import Task

_QUANTITIES: tuple[Quantity, ...] = ("parameters", "macs", "size_bytes", "latency_ratio")


@final
class MagnitudePruning(Stage[TorchModel, TorchModel]):
    """Remove the channels, heads and hidden units that matter least, each with all that depends on it, then recover.

    How many is said by one of `pruning_ratio`, `parameters`, `macs`, `size_bytes` and `latency_ratio`.
    """

    pruning_ratio: float | None = Field(default=None, gt=0, lt=1)
    """Share of the channels that leave; parameters fall by about its complement squared."""
    parameters: int | None = Field(default=None, gt=0)
    """At most so many stay."""
    macs: int | None = Field(default=None, gt=0)
    """At most so many multiply-accumulates for one sample stay. Not a measure of speed."""
    size_bytes: int | None = Field(default=None, gt=0)
    """At most so large is the model, as float32 in ONNX."""
    latency_ratio: float | None = Field(default=None, gt=1)
    """At least so many times as fast as the baseline, measured under ONNX Runtime on this machine."""
    criterion: Criterion = "l2"
    allocation: Allocation | Literal["sensitivity"] = "uniform"
    """`sensitivity`: every group loses as much as costs one common fall on validation, as `- stage: sensitivity`, which
    must come directly before, has measured it."""
    round_to: int | None = Field(default=None, gt=0)
    """Channels are kept in multiples of this, because kernels run whole vectors. Unless given, it is the step in which
    time grows with channels on this machine, or half as much and so on in layers with less than two such steps."""
    protect: tuple[str, ...] = ()
    """Paths of layers that keep all their channels, with all below them; `*` and `**` as in `losses`."""
    schedule: Schedule | None = None
    """With `recovery`: prune in steps, with an epoch of it after each but the last; all at once unless given."""
    recovery: Recovery | None = None

    @model_validator(mode="after")
    def _says_one_thing(self) -> Self:
        names = ("pruning_ratio", *_QUANTITIES)
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) != 1:
            msg = f"give one of {', '.join(names)}, got {' and '.join(given) or 'none'}"
            raise ValueError(msg)
        if self.schedule is not None:
            if self.recovery is None:
                msg = "schedule needs a recovery, which trains between its steps"
                raise ValueError(msg)
            division(self.recovery.epochs, self.schedule.steps)
            if self.allocation == "sensitivity":
                msg = "allocation: sensitivity prunes at once, for it was measured before the first step; drop schedule"
                raise ValueError(msg)
        return self

    @property
    def goal(self) -> Goal | None:
        """What the search is for; None with `pruning_ratio`."""
        asked = {quantity: getattr(self, quantity) for quantity in _QUANTITIES}
        return next((Goal(quantity, float(value)) for quantity, value in asked.items() if value is not None), None)

    def rehearse(self, model: TorchModel, reference: TorchModel, task: Task) -> TorchModel:
        """Cut the model at once, as far as it goes if a goal is asked, and compare it with what recovery asks."""
        model = with_linears(model)
        cuttable = self._cuttable(model, task)
        smaller = cuttable.cut(cuttable.choose(self.pruning_ratio or LARGEST))
        if self.goal is not None and self.goal.quantity != "latency_ratio":  # timing would take too long
            with measure_of(self.goal.quantity, reference.module, task) as measured:
                check_reachable(self.goal, measured(smaller.module))
        rehearsed = _with(model, smaller)
        check_recovery(rehearsed, reference, self.recovery, task)
        return rehearsed

    def apply(self, model: TorchModel, task: Task, context: StageContext) -> TorchModel:
        """Return a smaller model. Raises StageError if it cannot be cut as asked; the message says what can.

        Under torchrun the main process decides what leaves: times and sums may differ between processes.
        """
        decides = processes(context.device).is_main_process
        model = with_linears(model)
        cuttable = self._cuttable(model, task, log=context.log)
        channels, done = cuttable.channels, 0
        for pruning_ratio, epochs in told(self._steps(cuttable, task, context) if decides else None):
            if done:
                cuttable = self._cuttable(model, task)
            chosen = told(
                self._chosen(cuttable, task, context, pruning_ratio=pruning_ratio, channels=channels)
                if decides
                else None
            )
            # else rounding lets a later step begin, or has let an earlier one go as far
            if any(chosen.values()) or (pruning_ratio == self.pruning_ratio and cuttable.channels == channels):
                pruned = cuttable.cut(chosen)
                context.log(_told(cuttable.module, pruned))
                model = _with(model, pruned)
            if self.recovery is not None:
                model = recover(model, self.recovery, task, context, epochs=epochs, first_epoch=done)
                done += epochs
        return model

    def _steps(self, cuttable: Cuttable, task: Task, context: StageContext) -> Sequence[tuple[float | None, int]]:
        """Share of all channels that is gone after each step, None where the goal decides; epochs of recovery then."""
        epochs = 0 if self.recovery is None else self.recovery.epochs
        if self.schedule is None:
            return [(self.pruning_ratio, epochs)]
        goal = self.goal
        end = self._found(cuttable, goal, task, context).pruned.pruning_ratio if goal else self.pruning_ratio or 0
        ratios = ramp(end, self.schedule.steps, self.schedule.shape)[:-1]
        return list(zip([*ratios, self.pruning_ratio], division(epochs, self.schedule.steps), strict=True))

    def _chosen(
        self, cuttable: Cuttable, task: Task, context: StageContext, *, pruning_ratio: float | None, channels: int
    ) -> Plan:
        """Units to remove until a share `pruning_ratio` of the `channels` at the start is gone, or the goal is met."""
        if self.goal is not None and pruning_ratio is None:
            with measure_of(self.goal.quantity, context.reference.module, task) as measured:
                achieved = measured(cuttable.module) if cuttable.channels < channels else None
            if achieved is not None and self.goal.is_met(achieved):  # rounding has let an earlier step go as far
                context.reached(self.goal.quantity, self.goal.asked, achieved)
                return {}
            found = self._found(cuttable, self.goal, task, context)
            context.reached(self.goal.quantity, self.goal.asked, found.achieved)
            return found.plan
        chosen = cuttable.choose(1 - (1 - (pruning_ratio or 0)) * channels / cuttable.channels)
        if pruning_ratio is not None and pruning_ratio == self.pruning_ratio:
            context.reached("pruning_ratio", pruning_ratio, 1 - cuttable.channels_after(chosen) / channels)
        return chosen

    def _cuttable(self, model: TorchModel, task: Task, *, log: Callable[[str], None] = lambda _line: None) -> Cuttable:
        groups = prunable_groups(model.module, task.example_inputs, protect=self.protect, log=log)

        @cache
        def ranking() -> tuple[Scores, StepOf]:
            found = scores(self.criterion, model.module, groups, task)
            return found, multiples_of(self.round_to) if self.round_to else multiples_that_fit(measured_step())

        def choose(pruning_ratio: float) -> Plan:
            found, step_of = ranking()
            if self.allocation == "sensitivity":
                carried = carried_sensitivity(model, groups, criterion=self.criterion)
                shares = ratios_by_sensitivity(carried, groups, pruning_ratio=pruning_ratio)
                return by_ratios(shares, groups, found, step_of=step_of)
            return plan(
                self.allocation,
                model.module,
                groups,
                found,
                comparable=self.criterion in COMPARABLE,
                pruning_ratio=pruning_ratio,
                step_of=step_of,
            )

        return Cuttable(model.module, task.example_inputs, groups, choose)

    def _found(self, cuttable: Cuttable, goal: Goal, task: Task, context: StageContext) -> Reached:
        """The smallest cut that meets `goal`."""
        with measure_of(goal.quantity, context.reference.module, task) as measured:
            return reach(
                goal, cuttable.module, plan_of=cuttable.choose, cut=cuttable.cut, measured=measured, log=context.log
            )


def _with(model: TorchModel, pruned: Pruned) -> TorchModel:
    return model.with_module(pruned.module, *structural_edits(model.module, pruned.module))


def _told(module: nn.Module, pruned: Pruned) -> str:
    had = sum(had for _, had in pruned.channels.values())
    sizes = [sum(parameter.numel() for parameter in one.parameters()) for one in (module, pruned.module)]
    return (
        f"removed {pruned.removed} of {had} channels ({pruned.pruning_ratio:.0%}) in {len(pruned.channels)} groups; "
        f"parameters {sizes[0]} -> {sizes[1]}"
    )
