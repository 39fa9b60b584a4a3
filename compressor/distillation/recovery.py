"""Training after pruning, by distillation from the baseline."""

from compressor.distillation.distil import Student, distil
from compressor.distillation.distillation_settings import DistillationSettings
from compressor.distillation.setup import check_fit
from compressor.models.artifact import TorchModel
from compressor.stage import StageContext
from compressor.task import Task


def recover(
    model: TorchModel,
    settings: DistillationSettings,
    task: Task,
    context: StageContext,
    *,
    epochs: int | None = None,
    first_epoch: int = 0,
) -> TorchModel:
    """Return `model` trained for `epochs`, those of `settings` unless given; its zeros stay.

    Between steps of pruning `first_epoch` counts the epochs before, so that samples come in ever new views. Raises
    what `distil` raises.
    """
    asked = settings if epochs is None else settings.model_copy(update={"epochs": epochs})
    student = Student.of(model)
    return model.with_module(distil(student, context.reference, task, asked, context, first_epoch=first_epoch))


def check_recovery(model: TorchModel, reference: TorchModel, settings: DistillationSettings | None, task: Task) -> None:
    """Raise InputError for what would stop the recovery of `model` before its first step."""
    if settings is not None:
        check_fit(model, reference, task, settings)
