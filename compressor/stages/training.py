"""Train the model on the labels alone: for a model that comes without weights."""

from typing import ClassVar, final

from pydantic import Field
from torch import Tensor, nn

from compressor.artifact import TorchModel
from compressor.stage import Stage, StageContext
from compressor.task import Batch, Task
from compressor.training import Optimizer, fit


@final
class Training(Stage[TorchModel, TorchModel]):
    """Train the model on the labels alone; its result is the baseline that the report compares with."""

    makes_baseline: ClassVar[bool] = True

    epochs: int = Field(gt=0)
    batch_size: int = Field(default=128, gt=0)
    optimizer: Optimizer = Optimizer()

    def apply(self, model: TorchModel, task: Task, context: StageContext) -> TorchModel:
        """Return the model with trained weights."""

        def losses(module: nn.Module, batch: Batch) -> dict[str, Tensor]:
            return {"loss": task.loss(module(*batch.inputs), batch.targets)}

        trained = fit(
            model.module,
            losses,
            task.train,
            weights={"loss": 1.0},
            epochs=self.epochs,
            batch_size=self.batch_size,
            optimizer=self.optimizer,
            seed=context.seed,
            device=context.device,
            log=context.log,
            augmentation=task.augmentation,
        )
        return model.with_module(trained)
