"""A setting that may change over the training: a number, or a course from one number to another."""

import math
from typing import Annotated, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


class Course(BaseModel):
    """A course from `start` at the first step to `end` at the last."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    start: float = Field(ge=0)
    """Value at the first step."""
    end: float = Field(ge=0)
    """Value at the last step."""
    shape: Literal["linear", "cosine"] = "linear"
    """`cosine` leaves `start` slowly and nears `end` slowly."""


def value_at(setting: float | Course, progress: float) -> float:
    """Value of a setting at `progress` in [0, 1]; a number is constant."""
    if not isinstance(setting, Course):
        return setting
    if progress == 1:  # 0.9 + (0.1 - 0.9) is not 0.1
        return setting.end
    share = progress if setting.shape == "linear" else (1 - math.cos(math.pi * progress)) / 2
    return setting.start + (setting.end - setting.start) * share


def _positive_throughout(setting: float | Course) -> float | Course:
    if isinstance(setting, Course) and min(setting.start, setting.end) <= 0:
        msg = f"start and end must be greater than 0, got {setting.start} and {setting.end}"
        raise ValueError(msg)
    return setting


def _positive_somewhere(setting: float | Course) -> float | Course:
    if isinstance(setting, Course) and setting.start == setting.end == 0:
        msg = "start or end must be greater than 0"
        raise ValueError(msg)
    return setting


_TEMPERATURE = "What logits are divided by before they become probabilities; above 1 these get softer."
_WEIGHT = "How much the loss counts beside the others."
_Positive = Annotated[float, Field(gt=0)]
Temperature: TypeAlias = Annotated[
    _Positive | Course, AfterValidator(_positive_throughout), Field(description=_TEMPERATURE)
]
Weight: TypeAlias = Annotated[_Positive | Course, AfterValidator(_positive_somewhere), Field(description=_WEIGHT)]
