"""Students that start together and teach each other; nobody needs to be trained beforehand."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self, final

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from compressor.distillation.distillation_settings import DistillationFields
from compressor.distillation.losses import Hard, Kd, Losses
from compressor.distillation.panel import Combine, Panel, logit_losses
from compressor.distillation.setup import check_fit, check_outputs, training_data
from compressor.models.artifact import TorchModel
from compressor.models.output_kind import CLASSES, outputs_of_model
from compressor.references.reference import Reference
from compressor.stage import Stage, StageContext
from compressor.task import Inputs, Task
from compressor.training.fit import fit
from compressor.training.sampling import TrainingBatch


@final
class MutualLearning(DistillationFields, Stage[TorchModel, TorchModel]):
    """Train students that teach each other (deep mutual learning, Zhang et al. 2018); the first one leaves."""

    makes_baseline: ClassVar[bool] = True

    students: tuple[Reference, ...] = Field(min_length=2)
    """Build the students, each from a seed of its own; the model that enters takes no part."""
    losses: Losses = Losses(kd=Kd(temperature=1.0, weight=1.0), hard=Hard(weight=1.0))
    """What each student makes of the labels and of its peers' answers."""
    combine: Combine = "separate"
    """How the peers of a student teach it, if there are several."""

    @model_validator(mode="after")
    def _compares_answers(self) -> Self:
        if self.losses.of_features:
            msg = f"losses must compare answers among peers, got {', '.join(self.losses.of_features)}"
            raise ValueError(msg)
        return self

    def rehearse(self, model: TorchModel, reference: TorchModel, task: Task) -> TorchModel:  # noqa: ARG002  # not used
        """Build the students and return the first."""
        first, *others = self._students(model, task, seed=0)
        check_fit(first, others[0], task, self)
        self._panel(first, task)
        return first

    def apply(self, model: TorchModel, task: Task, context: StageContext) -> TorchModel:
        """Return the first student. Raises InputError if outputs differ in shape from the entering model's."""
        students = self._students(model, task, seed=context.seed)
        panel = self._panel(students[0], task)
        trained = fit(
            Peers([student.module for student in students]),
            MutualObjective(self.losses, panel, task),
            training_data(task, self, seed=context.seed),
            self,
            context,
        )
        return students[0].with_module(trained.get_submodule("students.0"))

    def _panel(self, student: TorchModel, task: Task) -> Panel:
        """The peers of one student."""
        peers = len(self.students) - 1
        outputs = outputs_of_model(student, task) if self.losses.of_responses else CLASSES
        return Panel((1 / peers,) * peers, self.combine, outputs)

    def _students(self, model: TorchModel, task: Task, *, seed: int) -> list[TorchModel]:
        students = [TorchModel.build(one, seed=seed + position) for position, one in enumerate(self.students)]
        for student in students:
            check_outputs(student, model, task, self.losses)
        return students


@final
class Peers(nn.Module):
    """Students that see the same inputs."""

    def __init__(self, students: list[nn.Module]) -> None:
        super().__init__()
        self.students = nn.ModuleList(students)

    def forward(self, inputs: Inputs) -> list[Tensor]:
        """Return the logits of each, (N, C, …)."""
        return [student(*inputs) for student in self.students]


@final
@dataclass(frozen=True)
class MutualObjective:
    """The objective of `Peers`: each learns from the labels and from the others, whose answers stand still for it."""

    settings: Losses
    panel: Panel
    task: Task

    def weights(self, progress: float) -> Mapping[str, float]:
        """Weight by name of each loss: of a mean over students, so that each learns as if it were alone."""
        count = len(self.panel.weights) + 1
        return {name: count * weight for name, weight in self.settings.weights(progress).items()}

    def losses(self, module: nn.Module, batch: TrainingBatch, progress: float) -> Mapping[str, Tensor]:
        """Values by name of each loss, the mean over the students, per sample that it applies to."""
        answers = module(batch.inputs)
        each = []
        for position, logits in enumerate(answers):
            others = [answer.detach().float() for i, answer in enumerate(answers) if i != position]
            values = logit_losses(
                self.settings, logits, others, self.panel, batch.targets, task_loss=self.task.loss, progress=progress
            )
            each.append(values)
        return {name: torch.stack([values[name] for values in each]).mean(dim=0) for name in each[0]}
