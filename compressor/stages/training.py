"""Train the model on the labels alone: one that comes without weights, or to fine-tune."""

from typing import ClassVar, final

from pydantic import Field

from compressor.models.artifact import TorchModel
from compressor.models.kept_zeros import zeros_of
from compressor.records.findings import EpochLosses
from compressor.stage import Stage, StageContext
from compressor.system.processes import launched
from compressor.task import Task
from compressor.training.fit import LabelLoss, Optimizer, fit
from compressor.training.sampling import TrainingData, draws


@final
class Training(Stage[TorchModel, TorchModel]):
    """Train the model on the labels alone; as the first stage, its result is what the report compares with."""

    makes_baseline: ClassVar[bool] = True

    epochs: int = Field(gt=0)
    batch_size: int = Field(default=128, gt=0)
    optimizer: Optimizer = Optimizer()

    def rehearse(self, model: TorchModel, reference: TorchModel, task: Task) -> TorchModel:  # noqa: ARG002
        """Return the model."""
        draws(TrainingData(task.train), self.batch_size, launched)
        return model

    def apply(self, model: TorchModel, task: Task, context: StageContext) -> TorchModel:
        """Return the model with trained weights."""
        trained = fit(
            model.module,
            LabelLoss(task.loss),
            TrainingData(task.train, augmentation=task.augmentation, seed=context.seed),
            epochs=self.epochs,
            batch_size=self.batch_size,
            optimizer=self.optimizer,
            seed=context.seed,
            device=context.device,
            log=context.log,
            record=lambda means: context.report(EpochLosses(means=means)),
            zeros=zeros_of(model),
        )
        return model.with_module(trained)
