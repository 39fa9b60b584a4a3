"""What a student learns from: losses between its logits, its teacher's logits and the labels."""

import copy
from typing import Self

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from compressor.artifact import TorchModel
from compressor.errors import InputError
from compressor.task import Batch, Task
from compressor.training import Objective


def distillation_loss(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """Divergence of the student's softened classes from the teacher's, times T² so that gradients keep their size.

    T² · KL(softmax(teacher / T) ‖ softmax(student / T)), Hinton et al. 2015 (arXiv 1503.02531), summed over classes.
    `student_logits`, `teacher_logits`: (N, C, …), equal shapes. `temperature` > 0. Returns (N, …), in nats.
    """
    student = F.log_softmax(student_logits / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits / temperature, dim=1)
    return temperature**2 * F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=1)


_SETTINGS = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Kd(BaseModel):
    """`distillation_loss` against the teacher."""

    model_config = _SETTINGS

    temperature: float = Field(default=4.0, gt=0)
    weight: float = Field(default=0.9, gt=0)


class Hard(BaseModel):
    """The task's own loss against the labels, at temperature 1."""

    model_config = _SETTINGS

    weight: float = Field(default=0.1, gt=0)


class Losses(BaseModel):
    """The losses that are added up; one that is left out takes no part."""

    model_config = _SETTINGS

    kd: Kd | None = None
    hard: Hard | None = None

    @model_validator(mode="after")
    def _has_one(self) -> Self:
        if not self.weights:
            msg = "losses must name at least one of kd, hard"
            raise ValueError(msg)
        return self

    @property
    def weights(self) -> dict[str, float]:
        """Weight by name of the losses that take part."""
        return {name: loss.weight for name, loss in (("kd", self.kd), ("hard", self.hard)) if loss is not None}


def objective(losses: Losses, teacher: TorchModel, task: Task, device: torch.device) -> Objective:
    """Return the function that `fit` lowers: it runs the frozen teacher on the student's own view of each batch."""
    frozen = copy.deepcopy(teacher.module).to(device).eval().requires_grad_(False)

    def evaluate(student: nn.Module, batch: Batch) -> dict[str, Tensor]:
        logits = student(*batch.inputs)
        values = {}
        if losses.kd is not None:
            with torch.no_grad():
                teacher_logits = frozen(*batch.inputs)
            values["kd"] = distillation_loss(logits.float(), teacher_logits.float(), temperature=losses.kd.temperature)
        if losses.hard is not None:
            values["hard"] = task.loss(logits, batch.targets)
        return values

    return evaluate


def check_same_outputs(student: TorchModel, teacher: TorchModel, task: Task) -> None:
    """Raise InputError unless both models give outputs of one shape on the example inputs."""
    shapes = [tuple(model.predict(task.example_inputs).shape) for model in (student, teacher)]
    if shapes[0] != shapes[1]:
        msg = f"student and teacher must give outputs of one shape, got {shapes[0]} and {shapes[1]}"
        raise InputError(msg)
