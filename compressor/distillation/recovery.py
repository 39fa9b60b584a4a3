"""Training after pruning, by distillation from the baseline."""

from pydantic import BaseModel, ConfigDict, Field

from compressor.distillation.distil import distil
from compressor.distillation.losses import Hard, Kd, Losses
from compressor.distillation.panel import Combine
from compressor.distillation.setup import check_fit
from compressor.models.artifact import TorchModel
from compressor.models.kept_zeros import zeros_of
from compressor.stage import StageContext
from compressor.task import Task
from compressor.training.fit import Optimizer


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


def recover(
    model: TorchModel,
    recovery: Recovery,
    task: Task,
    context: StageContext,
    *,
    epochs: int | None = None,
    first_epoch: int = 0,
) -> TorchModel:
    """Return `model` trained for `epochs`, those of `recovery` unless given; its zeros stay.

    Between steps of pruning `first_epoch` counts the epochs before, so that samples come in ever new views. Raises
    what `distil` raises.
    """
    recovered = distil(
        model.module,
        context.reference,
        task,
        context,
        losses=recovery.losses,
        combine=recovery.combine,
        unlabeled_share=recovery.unlabeled_share,
        epochs=recovery.epochs if epochs is None else epochs,
        batch_size=recovery.batch_size,
        optimizer=recovery.optimizer,
        zeros=zeros_of(model),
        first_epoch=first_epoch,
    )
    return model.with_module(recovered)


def check_recovery(model: TorchModel, reference: TorchModel, recovery: Recovery | None, task: Task) -> None:
    """Raise InputError for what would stop the recovery of `model` before its first step."""
    if recovery is not None:
        share, size = recovery.unlabeled_share, recovery.batch_size
        check_fit(model, reference, task, recovery.losses, unlabeled_share=share, batch_size=size)
