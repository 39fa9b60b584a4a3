"""What the teacher says about a batch: run live on the student's own view, or read from soft labels."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, final

import torch
from torch import Tensor, nn

from compressor.distillation.panel import Answer
from compressor.distillation.response import TopClasses
from compressor.models.artifact import TorchModel
from compressor.models.ensemble import members_of
from compressor.models.layers import capture_outputs
from compressor.models.soft_label_file import SoftLabelFile
from compressor.training.sampling import TrainingBatch


@dataclass(frozen=True)
class Answers:
    """What one or more teachers say about a batch.

    `responses` of each teacher; `features` by path of the layer, each (N, …).
    """

    responses: Sequence[Answer]
    features: Mapping[str, Tensor]


class Teacher(Protocol):
    """Where answers come from."""

    def __call__(self, batch: TrainingBatch, /) -> Answers:
        """Answer without gradient, on the device of the batch."""


@final
@dataclass(frozen=True)
class LiveTeacher:
    """A frozen copy of the teacher that is run on every batch."""

    module: nn.Module
    layers: tuple[str, ...]

    @classmethod
    def of(cls, model: TorchModel, layers: Sequence[str], device: torch.device) -> "LiveTeacher":
        """Copy the teacher to `device`, in evaluation mode."""
        return cls(copy.deepcopy(model.module).to(device).eval().requires_grad_(False), tuple(layers))

    def __call__(self, batch: TrainingBatch) -> Answers:
        """Run every member of an ensemble, or the one model there is."""
        # In full precision, as soft labels are made.
        device = batch.inputs[0].device.type
        with (
            torch.no_grad(),
            torch.autocast(device, enabled=False),
            capture_outputs(self.module, self.layers) as features,
        ):
            logits = [member(*batch.inputs).float() for member, _ in members_of(self.module)]
        return Answers(logits, features)


@final
@dataclass(frozen=True)
class StoredTeacher:
    """Soft labels in the place of the teacher: read, never computed."""

    labels: SoftLabelFile

    def __call__(self, batch: TrainingBatch) -> Answers:
        """Read the rows of the batch."""
        device = batch.inputs[0].device
        stored = {name: part.to(device) for name, part in self.labels.read(batch.rows, batch.views).items()}
        if self.labels.origin.top_k is None:
            return Answers(stored["logits"].unbind(1), {})
        parts = (stored[name].unbind(1) for name in ("log_probabilities", "classes", "tail"))
        return Answers([TopClasses(*one) for one in zip(*parts, strict=True)], {})


def absent_teacher(_batch: TrainingBatch) -> Answers:
    """No answers, for losses that ask no teacher."""
    return Answers((), {})
