"""Train the model on the labels alone: one that comes without weights, or to fine-tune."""

from typing import ClassVar, final

from compressor.models.artifact import TorchModel
from compressor.models.kept_zeros import zeros_of
from compressor.stage import Stage, StageContext
from compressor.system.processes import launched
from compressor.task import Task
from compressor.training.fit import fit
from compressor.training.objective import LabelLoss
from compressor.training.sampling import TrainingData, divide_batch
from compressor.training.settings import TrainingFields


@final
class Training(TrainingFields, Stage[TorchModel, TorchModel]):
    """Train the model on the labels alone; as the first stage, its result is what the report compares with."""

    makes_baseline: ClassVar[bool] = True

    def rehearse(self, model: TorchModel, reference: TorchModel, task: Task) -> TorchModel:  # noqa: ARG002
        """Return the model."""
        divide_batch(TrainingData(task.train), self.batch_size, launched)
        return model

    def apply(self, model: TorchModel, task: Task, context: StageContext) -> TorchModel:
        """Return the model with trained weights."""
        data = TrainingData(task.train, augmentation=task.augmentation, seed=context.seed)
        trained = fit(model.module, LabelLoss(task.loss), data, self, context, zeros=zeros_of(model))
        return model.with_module(trained)
