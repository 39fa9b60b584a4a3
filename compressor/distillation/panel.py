"""One or more teachers that answer the same question, and what the losses of responses make of their answers."""

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, final

import torch
from torch import Tensor, nn

from compressor.distillation.losses import Kd, LogitMse, Losses, ResponseLoss
from compressor.distillation.pairs import widen
from compressor.distillation.response import TopClasses, squared_difference, tail_bucket_loss
from compressor.errors import InputError
from compressor.models.artifact import TorchModel
from compressor.models.ensemble import Ensemble, Mean, combine_logits, members_of
from compressor.models.output_kind import CLASSES, Outputs, outputs_of_model
from compressor.task import Task

Answer: TypeAlias = Tensor | TopClasses
"""Logits, (N, C, …), or of very many classes the most likely ones."""

Combine: TypeAlias = Mean | Literal["separate"]
"""How several teachers teach: as one that answers with the weighted mean of their probabilities, softened by the
temperature, or of their logits; or each with losses of its own, of which the weighted mean counts."""


@final
@dataclass(frozen=True)
class Panel:
    """Weights of the teachers, which sum to 1, how their answers are combined, and what these answers are."""

    weights: tuple[float, ...]
    combine: Combine
    outputs: Outputs = CLASSES

    def __post_init__(self) -> None:
        if self.outputs.kind == "values" and self.combine == "mean_probability" and len(self.weights) > 1:
            msg = (
                "combine must be 'mean_logit' or 'separate' where outputs are values, which have no probabilities, got "
                "'mean_probability'; give it to the ensemble, or to the stage"
            )
            raise InputError(msg)

    def voices(self, answers: Sequence[Answer], temperature: float) -> Sequence[tuple[Answer, float]]:
        """The answers to learn from at `temperature`, each with its weight; top classes are never combined."""
        logits = [answer for answer in answers if isinstance(answer, Tensor)]
        if self.combine == "separate" or len(logits) < 2:
            return list(zip(answers, self.weights, strict=True))
        one = combine_logits(logits, weights=self.weights, combine=self.combine, temperature=temperature)
        return [(one, 1.0)]


def combine_of(module: nn.Module) -> Combine:
    """How the members of an ensemble answer together; of a single model it makes no difference."""
    return module.combine if isinstance(module, Ensemble) else "mean_probability"


def panel_of(teacher: TorchModel, task: Task, losses: Losses, combine: Combine | None) -> Panel:
    """The panel that a model is: the members of an ensemble, combined as it does itself unless `combine` says so.

    Raises InputError for a mean of probabilities where outputs are values.
    """
    outputs = outputs_of_model(teacher, task) if losses.of_responses else CLASSES
    weights = tuple(weight for _, weight in members_of(teacher.module))
    return Panel(weights, combine or combine_of(teacher.module), outputs)


def logit_losses(
    losses: Losses,
    student_logits: Tensor,
    answers: Sequence[Answer],
    panel: Panel,
    targets: Tensor,
    *,
    task_loss: Callable[[Tensor, Tensor], Tensor],
    progress: float,
) -> dict[str, Tensor]:
    """Values of each of `losses` that needs logits alone, by name: (N, …), or (L, …) if it needs the labels.

    `student_logits` and each of `answers` are outputs, (N, …); `targets`, (L, …), belong to the first L samples.
    """
    values = {}
    with torch.autocast(student_logits.device.type, enabled=False):  # half precision is for layers, not for losses
        logits = widen(student_logits)
        ours, theirs = logits, answers
        if losses.of_responses:
            ours = panel.outputs.as_logits(logits)
            theirs = [panel.outputs.as_logits(one) if isinstance(one, Tensor) else one for one in answers]
        for name, loss in losses.of_responses.items():
            values[name] = _values(loss, ours, theirs, panel, targets=targets, progress=progress)
        if losses.hard is not None:
            values["hard"] = task_loss(logits[: len(targets)], targets)
    return values


def _values(
    loss: ResponseLoss,
    student_logits: Tensor,
    answers: Sequence[Answer],
    panel: Panel,
    *,
    targets: Tensor,
    progress: float,
) -> Tensor:
    temperature = loss.temperature_at(progress, panel.outputs.kind)
    count = len(targets) if loss.needs_targets else len(student_logits)
    weighted = []
    for answer, weight in panel.voices(answers, temperature):
        if isinstance(answer, TopClasses):  # `distil` lets only `kd` at temperature 1 read them
            value = tail_bucket_loss(student_logits, answer)
        else:
            ours, theirs = student_logits[:count], answer[:count]
            value = compare(loss, ours, theirs, targets, temperature=temperature, outputs=panel.outputs)
        weighted.append(value if weight == 1 else weight * value)
    return functools.reduce(operator.add, weighted)


def compare(
    loss: ResponseLoss,
    student_logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    *,
    temperature: float,
    outputs: Outputs,
) -> Tensor:
    """What `loss` makes of two answers in the form that `Outputs.as_logits` gives them; one value per sample or token.

    Classes: the loss as it is. Labels: each label is a choice of yes or no, and the mean over the labels counts, as it
    does in binary cross-entropy. Values: the squared difference, where T² of `kd` cancels the temperature.
    """
    if outputs.kind == "classes":
        return loss.compare(student_logits, teacher_logits, targets, temperature)
    if outputs.kind == "labels" and not isinstance(loss, LogitMse):
        each = loss.compare(student_logits, teacher_logits, targets, temperature)
    else:
        pair = student_logits, teacher_logits
        ours, theirs = (one[:, 0] - one[:, 1] if outputs.kind == "labels" else one for one in pair)
        each = squared_difference(ours, theirs)
        each = each if isinstance(loss, Kd) else each / temperature**2
    return each if each.ndim == 1 else each.mean(dim=1)
