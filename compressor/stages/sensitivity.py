"""Each group of coupled layers is cut alone, to see how much it matters; a later pruning spares those that do."""

from itertools import pairwise
from typing import Annotated, ClassVar, final

from pydantic import Field, field_validator

from compressor.models.artifact import TorchModel
from compressor.pruning.channels import prunable_groups
from compressor.pruning.conv1d import with_linears
from compressor.pruning.criteria import Criterion
from compressor.pruning.group_sensitivity import GroupSensitivity, flat_sensitivity, measure_sensitivity
from compressor.records.findings import Document
from compressor.report.sensitivity_map import documents
from compressor.stage import Stage, StageContext
from compressor.task import Task


@final
class Sensitivity(Stage[TorchModel, TorchModel]):
    """Cut one group of channels at a time and evaluate on validation; `allocation: sensitivity` prunes by it."""

    keeps_model: ClassVar[bool] = True
    attaches = (GroupSensitivity,)

    grid: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        default=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9), min_length=1
    )
    """Shares of its channels that each group loses, rising; each costs an evaluation per group."""
    criterion: Criterion = "l2"
    """What scores the channels, as in the pruning that follows."""
    samples: int = Field(default=2000, gt=0)
    """Of the validation split, at most; they are kept in memory."""
    protect: tuple[str, ...] = ()
    """Paths of layers, or patterns of such, that keep all channels, as in the pruning that follows."""

    @field_validator("grid")
    @classmethod
    def _rises(cls, grid: tuple[float, ...]) -> tuple[float, ...]:
        if any(low >= high for low, high in pairwise(grid)):
            msg = f"must rise, got {list(grid)}"
            raise ValueError(msg)
        return grid

    def rehearse(self, model: TorchModel, reference: TorchModel, task: Task) -> TorchModel:  # noqa: ARG002  # not used
        """Find the groups; the sensitivity of the result is flat."""
        model = with_linears(model)
        groups = prunable_groups(model.module, task.example_inputs, protect=self.protect)
        flat = flat_sensitivity(model, groups, task, criterion=self.criterion, grid=self.grid)
        return model.with_attachment(GroupSensitivity(flat))

    def apply(self, model: TorchModel, task: Task, context: StageContext) -> TorchModel:
        """Return the same model with its sensitivity.

        Raises StageError if the model cannot be pruned, the criterion does not fit it, or the metric is not finite.
        """
        model = with_linears(model)
        curves = measure_sensitivity(
            model,
            prunable_groups(model.module, task.example_inputs, protect=self.protect),
            task,
            criterion=self.criterion,
            grid=self.grid,
            samples=self.samples,
            device=context.device,
            log=context.log,
        )
        for name, text in documents(curves).items():
            context.report(Document(name=name, text=text))
        return model.with_attachment(GroupSensitivity(curves))
