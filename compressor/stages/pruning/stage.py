"""Channels, heads and hidden units are removed, and the model recovers by distillation from the baseline."""

from collections.abc import Callable, Sequence
from typing import Self, final

from pydantic import Field, model_validator

from compressor.artifact import TorchModel, structural_edits
from compressor.pruning.allocation import Allocation, plan
from compressor.pruning.channels import Pruned, prunable_groups, prune_channels
from compressor.pruning.criteria import Criterion, scores
from compressor.pruning.schedule import Schedule, division, ramp
from compressor.stage import Stage, StageContext
from compressor.stages.pruning.recovery import Recovery, check_recovery, recover
from compressor.task import Task


@final
class MagnitudePruning(Stage[TorchModel, TorchModel]):
    """Remove the channels, heads and hidden units that matter least, each with all that depends on it, then recover."""

    pruning_ratio: float = Field(gt=0, lt=1)
    """Share of the channels that leave; parameters fall by about its complement squared."""
    criterion: Criterion = "l2"
    allocation: Allocation = "uniform"
    round_to: int = Field(default=8, gt=0)
    """Channels are kept in multiples of this: kernels run whole vectors, so latency falls in steps."""
    protect: tuple[str, ...] = ()
    """Paths of layers that keep all their channels, with all below them; `*` and `**` as in `losses`."""
    schedule: Schedule | None = None
    """With `recovery`: prune in steps, with an epoch of it after each but the last; all at once unless given."""
    recovery: Recovery | None = None

    @model_validator(mode="after")
    def _has_epochs_between(self) -> Self:
        if self.schedule is not None:
            if self.recovery is None:
                msg = "schedule needs a recovery, which trains between its steps"
                raise ValueError(msg)
            division(self.recovery.epochs, self.schedule.steps)
        return self

    def rehearse(self, model: TorchModel, reference: TorchModel, task: Task) -> TorchModel:
        """Cut the model at once, and compare what it is with what recovery asks."""
        smaller = self._cut(model, task, self.pruning_ratio, log=lambda _line: None)
        check_recovery(smaller, reference, self.recovery, task)
        return smaller

    def apply(self, model: TorchModel, task: Task, context: StageContext) -> TorchModel:
        """Return a smaller model. Raises StageError if it cannot be cut as asked."""
        left = 1.0
        for pruning_ratio, epochs in self._steps():
            model = self._cut(model, task, 1 - (1 - pruning_ratio) / left, log=context.log)
            left = 1 - pruning_ratio
            if self.recovery is not None:
                model = recover(model, self.recovery, task, context, epochs=epochs)
        return model

    def _steps(self) -> Sequence[tuple[float, int]]:
        """Share of all channels that is gone after each step, and the epochs of recovery after it."""
        epochs = 0 if self.recovery is None else self.recovery.epochs
        if self.schedule is None:
            return [(self.pruning_ratio, epochs)]
        steps = self.schedule.steps
        return list(zip(ramp(self.pruning_ratio, steps, self.schedule.shape), division(epochs, steps), strict=True))

    def _cut(self, model: TorchModel, task: Task, pruning_ratio: float, *, log: Callable[[str], None]) -> TorchModel:
        groups = prunable_groups(model.module, task.example_inputs, protect=self.protect)
        found = scores(self.criterion, model.module, groups, task)
        chosen = plan(self.allocation, model.module, groups, found, pruning_ratio=pruning_ratio, round_to=self.round_to)
        pruned = prune_channels(model.module, task.example_inputs, groups, chosen)
        log(_told(model, pruned))
        return model.with_module(pruned.module, *structural_edits(model.module, pruned.module))


def _told(model: TorchModel, pruned: Pruned) -> str:
    kept, had = map(sum, zip(*pruned.channels.values(), strict=True))
    sizes = [sum(p.numel() for p in module.parameters()) for module in (model.module, pruned.module)]
    return (
        f"removed {had - kept} of {had} channels ({pruned.pruning_ratio:.0%}) in {len(pruned.channels)} groups; "
        f"parameters {sizes[0]} -> {sizes[1]}"
    )
