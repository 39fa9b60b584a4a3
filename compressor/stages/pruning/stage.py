"""Channels of small magnitude are removed, and the model recovers by distillation from the baseline."""

from collections.abc import Callable
from typing import final

from pydantic import BaseModel, ConfigDict, Field

from compressor.artifact import TorchModel, structural_edits
from compressor.knowledge.distil import distil
from compressor.knowledge.losses import Hard, Kd, Losses
from compressor.knowledge.panel import Combine
from compressor.knowledge.setup import check_fit
from compressor.stage import Stage, StageContext
from compressor.task import Task
from compressor.training import Optimizer


class Recovery(BaseModel):
    """Training after pruning; it distils from the baseline unless `losses` names `hard` alone."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    epochs: int = Field(gt=0)
    losses: Losses = Losses(kd=Kd(), hard=Hard())
    combine: Combine | None = None
    """How the members of an ensemble teach, if the baseline is one; as the ensemble itself answers unless given."""
    unlabeled_share: float | None = Field(default=None, ge=0, lt=1)
    """Part of each batch that comes from the task's unlabeled samples; a half unless given, if the task has any."""
    batch_size: int = Field(default=128, gt=0)
    optimizer: Optimizer = Optimizer()


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
        if self.recovery is not None:
            asked = self.recovery
            share, size = asked.unlabeled_share, asked.batch_size
            check_fit(smaller, reference, task, asked.losses, unlabeled_share=share, batch_size=size)
        return smaller

    def apply(self, model: TorchModel, task: Task, context: StageContext) -> TorchModel:
        """Return a model with fewer channels. Raises StageError if it cannot be cut as asked."""
        smaller = self._pruned(model, task, log=context.log)
        return smaller if self.recovery is None else self._recover(smaller, self.recovery, task, context)

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

    def _recover(self, model: TorchModel, recovery: Recovery, task: Task, context: StageContext) -> TorchModel:
        recovered = distil(
            model.module,
            context.reference,
            task,
            context,
            losses=recovery.losses,
            combine=recovery.combine,
            unlabeled_share=recovery.unlabeled_share,
            epochs=recovery.epochs,
            batch_size=recovery.batch_size,
            optimizer=recovery.optimizer,
        )
        return model.with_module(recovered)
