"""One or more teachers that answer the same question, and what the losses of responses make of their answers."""

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, final

import torch
from torch import Tensor, nn

from compressor.distillation.course import value_at
from compressor.distillation.losses import Losses, ResponseLoss
from compressor.distillation.pairs import widen
from compressor.distillation.response import TopClasses, tail_bucket_loss
from compressor.models.ensemble import Ensemble, Mean, combine_logits

Answer: TypeAlias = Tensor | TopClasses
"""Logits, (N, C, …), or of very many classes the most likely ones."""

Combine: TypeAlias = Mean | Literal["separate"]
"""How several teachers teach: as one that answers with the weighted mean of their probabilities, softened by the
temperature, or of their logits; or each with losses of its own, of which the weighted mean counts."""


@final
@dataclass(frozen=True)
class Panel:
    """Weights of the teachers, which sum to 1, and how their answers are combined."""

    weights: tuple[float, ...]
    combine: Combine

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

    `student_logits` and each of `answers` are (N, C, …); `targets`, (L, …), belong to the first L samples.
    """
    values = {}
    with torch.autocast(student_logits.device.type, enabled=False):  # half precision is for layers, not for losses
        logits = widen(student_logits)
        for name, loss in losses.of_responses.items():
            values[name] = _values(loss, logits, answers, panel, targets=targets, progress=progress)
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
    temperature = value_at(loss.temperature, progress)
    count = len(targets) if loss.needs_targets else len(student_logits)
    weighted = []
    for answer, weight in panel.voices(answers, temperature):
        if isinstance(answer, TopClasses):  # `distil` lets only `kd` at temperature 1 read them
            value = tail_bucket_loss(student_logits, answer)
        else:
            value = loss.compare(student_logits[:count], answer[:count], targets, temperature)
        weighted.append(value if weight == 1 else weight * value)
    return functools.reduce(operator.add, weighted)
