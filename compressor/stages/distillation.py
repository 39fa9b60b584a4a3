"""A small student learns from the model that enters the stage."""

from typing import final

from pydantic import Field

from compressor.artifact import TorchModel
from compressor.losses import Hard, Kd, Losses, check_same_outputs, objective
from compressor.plugins import Reference
from compressor.stage import Stage, StageContext
from compressor.task import Task
from compressor.training import Optimizer, fit


@final
class Distillation(Stage[TorchModel, TorchModel]):
    """Train a student to give the answers of the model that enters; the student leaves."""

    student: Reference
    epochs: int = Field(gt=0)
    losses: Losses = Losses(kd=Kd(), hard=Hard())
    batch_size: int = Field(default=128, gt=0)
    optimizer: Optimizer = Optimizer()

    def apply(self, model: TorchModel, task: Task, context: StageContext) -> TorchModel:
        """Return the trained student. Raises InputError if its outputs have another shape than the teacher's."""
        student = TorchModel.build(self.student, seed=context.seed)
        check_same_outputs(student, model, task)
        trained = fit(
            student.module,
            objective(self.losses, model, task, context.device),
            task.train,
            weights=self.losses.weights,
            epochs=self.epochs,
            batch_size=self.batch_size,
            optimizer=self.optimizer,
            seed=context.seed,
            device=context.device,
            log=context.log,
            augmentation=task.augmentation,
        )
        return student.with_module(trained)
