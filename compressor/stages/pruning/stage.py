"""Channels of small magnitude are removed, and the model recovers by distillation from the baseline."""

from typing import final

from pydantic import BaseModel, ConfigDict, Field

from compressor.artifact import TorchModel, structural_edits
from compressor.losses import Hard, Kd, Losses, objective
from compressor.stage import Stage, StageContext
from compressor.task import Task
from compressor.training import Optimizer, fit


class Recovery(BaseModel):
    """Training after pruning; it distils from the baseline unless `losses` names `hard` alone."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    epochs: int = Field(gt=0)
    losses: Losses = Losses(kd=Kd(), hard=Hard())
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

    def apply(self, model: TorchModel, task: Task, context: StageContext) -> TorchModel:
        """Return a model with fewer channels. Raises StageError if it cannot be cut as asked."""
        # Torch-Pruning and its graph tools are not needed by a run that finds this stage in the store.
        from compressor.stages.pruning.structured import prune_channels  # noqa: PLC0415

        pruned = prune_channels(
            model.module, task.example_inputs, pruning_ratio=self.pruning_ratio, round_to=self.round_to
        )
        kept, had = (sum(counts) for counts in zip(*pruned.channels.values(), strict=True))
        sizes = [sum(p.numel() for p in module.parameters()) for module in (model.module, pruned.module)]
        context.log(
            f"removed {had - kept} of {had} channels ({1 - kept / had:.0%}, asked {self.pruning_ratio:.0%}) "
            f"in {len(pruned.channels)} groups; parameters {sizes[0]} -> {sizes[1]}"
        )
        smaller = model.with_module(pruned.module, *structural_edits(model.module, pruned.module))
        return smaller if self.recovery is None else self._recover(smaller, self.recovery, task, context)

    def _recover(self, model: TorchModel, recovery: Recovery, task: Task, context: StageContext) -> TorchModel:
        recovered = fit(
            model.module,
            objective(recovery.losses, context.reference, task, context.device),
            task.train,
            weights=recovery.losses.weights,
            epochs=recovery.epochs,
            batch_size=recovery.batch_size,
            optimizer=recovery.optimizer,
            seed=context.seed,
            device=context.device,
            log=context.log,
            augmentation=task.augmentation,
        )
        return model.with_module(recovered)
