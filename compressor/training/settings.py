"""What every training asks: how long, in which batches, and how the weights move."""

import math
from abc import ABC
from typing import Literal, final

from pydantic import BaseModel, ConfigDict, Field


class Optimizer(BaseModel):
    """How weights move: the algorithm, its step size, and the course of the step size over the whole fit."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    name: Literal["adamw", "sgd"] = "adamw"
    """The algorithm: AdamW (Loshchilov and Hutter 2019), or SGD with momentum."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """The largest step size, reached after `warmup`."""
    weight_decay: float = Field(default=1e-2, ge=0)
    """Applied to matrices and kernels, not to biases and normalization."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Of sgd (Nesterov); beta 1 of adamw."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """From `learning_rate` down to zero, or not at all."""
    warmup: float = Field(default=0.05, ge=0, lt=1)
    """Share of all steps during which the step size grows linearly from zero."""


class TrainingFields(BaseModel, ABC):
    """The settings of everything that trains. A stage inherits them; `TrainingSettings` has no others."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    epochs: int = Field(gt=0)
    """An epoch draws as many samples as there are. Unlabeled samples count where the losses use them."""
    batch_size: int = Field(default=128, gt=0)
    """Samples of one step, over all processes together."""
    optimizer: Optimizer = Optimizer()


@final
class TrainingSettings(TrainingFields):
    """What a caller that is no stage asks of `fit`."""


def learning_rate(optimizer: Optimizer, step: int, steps: int) -> float:
    """Step size of `step` in [0, `steps`)."""
    warmup_steps = optimizer.warmup * steps
    if step < warmup_steps:
        return optimizer.learning_rate * (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1.0, steps - warmup_steps)
    remaining = {"cosine": (1 + math.cos(math.pi * progress)) / 2, "linear": 1 - progress, "constant": 1.0}
    return optimizer.learning_rate * remaining[optimizer.schedule]
