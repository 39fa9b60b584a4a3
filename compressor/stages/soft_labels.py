"""The teacher answers once, and every later student reads its answers."""

from typing import ClassVar, final

from pydantic import Field

from compressor.distillation.answering import answer, check_replayable, data_of, origin_of
from compressor.errors import InputError
from compressor.models.artifact import TorchModel
from compressor.models.output_kind import outputs_of_model
from compressor.models.soft_label_file import SoftLabelFile
from compressor.stage import Stage, StageContext
from compressor.task import Task

_MANY_CLASSES = 4000
"""Beyond this many classes, all logits of a sample take more room than the sample."""


@final
class SoftLabels(Stage[TorchModel, TorchModel]):
    """Run the model once over the training and unlabeled samples; later stages learn from its stored answers."""

    keeps_model: ClassVar[bool] = True
    attaches = (SoftLabelFile,)

    views: int | None = Field(default=None, gt=0)
    """Augmented views of each sample that are answered; a student sees them in turns, where a live teacher answers
    a new one every epoch. 4 unless given, or 1 if the task augments nothing."""
    top_k: int = Field(default=64, gt=0)
    """Of more than 4,000 classes, how many of the most likely are kept; the others count together."""

    def rehearse(self, model: TorchModel, reference: TorchModel, task: Task) -> TorchModel:  # noqa: ARG002  # not used
        """Check that views differ, and can be shown again."""
        if task.augmentation is None and self.views not in {None, 1}:
            msg = f"views must be 1 for a task without augmentation, got {self.views}: all would be the same"
            raise InputError(msg)
        classes = _count_classes(model, task)
        if classes > _MANY_CLASSES and self.top_k >= classes:
            msg = f"top_k must be less than the {classes} classes of the model, got {self.top_k}"
            raise InputError(msg)
        check_replayable(data_of(task, seed=0))
        return model

    def apply(self, model: TorchModel, task: Task, context: StageContext) -> TorchModel:
        """Return the same model with its soft labels.

        Raises InputError for views of a task that does not augment, StageError for logits that float16 cannot hold.
        """
        self.rehearse(model, model, task)
        views = self.views or (1 if task.augmentation is None else 4)
        top_k = self.top_k if _count_classes(model, task) > _MANY_CLASSES else None
        origin = origin_of(model, task, seed=context.seed, views=views, top_k=top_k)
        labels = answer(
            model,
            data_of(task, seed=context.seed),
            origin,
            context.work_dir,
            device=context.device,
            log=context.log,
            outputs=outputs_of_model(model, task),
        )
        size = labels.path.stat().st_size
        context.log(f"{origin.samples} samples in {views} {'view' if views == 1 else 'views'}: {size / 1e6:.1f} MB")
        return model.with_attachment(labels)


def _count_classes(model: TorchModel, task: Task) -> int:
    """Classes among which an answer chooses; 0 for labels and values, of which none is less likely for another."""
    outputs = outputs_of_model(model, task)
    return model.predict(task.example_inputs).shape[outputs.dimension] if outputs.kind == "classes" else 0
