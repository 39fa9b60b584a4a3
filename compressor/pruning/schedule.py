"""How far pruning goes at each step, and how many epochs of recovery follow it."""

from typing import Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from compressor.errors import StageError

Shape: TypeAlias = Literal["linear", "cubic"]


class Schedule(BaseModel):
    """Pruning in steps with an epoch of recovery between them, where one step takes all at once."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    shape: Shape = "cubic"
    """`cubic` takes much at first, while little is lost, and little at the end (Zhu and Gupta 2017)."""
    steps: int = Field(ge=2)
    """At most about a quarter of the epochs of recovery: most of them are needed after the last step."""


def check_schedule(schedule: Schedule | None, epochs: int | None) -> None:
    """Raise ValueError, for settings to show, if a schedule has not one epoch of recovery for each step.

    `epochs` are those of the recovery; None without one.
    """
    if schedule is None:
        return
    if epochs is None:
        msg = "schedule needs a recovery, which trains between its steps"
        raise ValueError(msg)
    divide_epochs(epochs, schedule.steps)


def list_levels(final: float, steps: int, shape: Shape, *, start: float = 0.0) -> tuple[float, ...]:
    """What is reached after each of `steps` steps from `start`, the last of them `final`.

    `cubic` is final + (start - final) * (1 - t)^3 with t from 1/steps to 1 (Zhu and Gupta 2017, arXiv 1710.01878).
    Raises StageError for no step.
    """
    if steps < 1:
        msg = f"steps must be at least 1, got {steps}"
        raise StageError(msg)
    power = 3 if shape == "cubic" else 1
    before = (final + (start - final) * (1 - step / steps) ** power for step in range(1, steps))
    return (*before, final)


def divide_epochs(epochs: int, steps: int) -> tuple[int, ...]:
    """Epochs of recovery after each step: one after each but the last, all others after the last.

    Raises ValueError, for settings to show, if there are fewer epochs than steps.
    """
    if epochs < steps:
        msg = f"recovery must have an epoch for each of {steps} steps, got {epochs} epochs"
        raise ValueError(msg)
    return (*[1] * (steps - 1), epochs - steps + 1)
