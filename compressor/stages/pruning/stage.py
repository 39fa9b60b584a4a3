"""Channels of small magnitude are removed, and the model recovers by distillation from the baseline."""

from collections.abc import Callable
from typing import final

from pydantic import Field

from compressor.artifact import TorchModel, structural_edits
from compressor.stage import Stage, StageContext
from compressor.stages.pruning.recovery import Recovery, check_recovery, recover
from compressor.task import Task


@final
class MagnitudePruning(Stage[TorchModel, TorchModel]):
    """Remove the channels of smallest L2 magnitude from every group of coupled layers, then recover."""

    pruning_ratio: float = Field(gt=0, lt=1)
    """Share of channels that each group loses; parameters fall by about its complement squared."""
    round_to: int = Field(default=8, gt=0)
    """Channels are kept in multiples of this: kernels run whole vectors, so latency falls in steps."""
    recovery: Recovery | None = None

    def rehearse(self, model: TorchModel, reference: TorchModel, task: Task) -> TorchModel:
        """Cut the model, and compare what it is with what recovery asks."""
        smaller = self._pruned(model, task, log=lambda _line: None)
        check_recovery(smaller, reference, self.recovery, task)
        return smaller

    def apply(self, model: TorchModel, task: Task, context: StageContext) -> TorchModel:
        """Return a model with fewer channels. Raises StageError if it cannot be cut as asked."""
        smaller = self._pruned(model, task, log=context.log)
        return smaller if self.recovery is None else recover(smaller, self.recovery, task, context)

    def _pruned(self, model: TorchModel, task: Task, *, log: Callable[[str], None]) -> TorchModel:
        # Torch-Pruning and its graph tools are not needed by a run that finds this stage in the store.
        from compressor.structured_pruning import prune_channels  # noqa: PLC0415

        pruned = prune_channels(
            model.module, task.example_inputs, pruning_ratio=self.pruning_ratio, round_to=self.round_to
        )
        kept, had = (sum(counts) for counts in zip(*pruned.channels.values(), strict=True))
        sizes = [sum(p.numel() for p in module.parameters()) for module in (model.module, pruned.module)]
        log(
            f"removed {had - kept} of {had} channels ({1 - kept / had:.0%}, asked {self.pruning_ratio:.0%}) "
            f"in {len(pruned.channels)} groups; parameters {sizes[0]} -> {sizes[1]}"
        )
        return model.with_module(pruned.module, *structural_edits(model.module, pruned.module))
