"""How much each group of a model matters: the record and its file."""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveInt, ValidationError, model_validator

from compressor.errors import InputError
from compressor.records.measurements import MetricInfo, Record

FILE_NAME = "sensitivity.json"


class GroupCurve(Record):
    """The value of a metric as one group of coupled layers loses channels, and no other does."""

    channels: PositiveInt
    """Of the uncut group."""
    values: tuple[float, ...]
    """One for each ratio."""


class SensitivityCurves(Record):
    """How much each group of a model matters: a metric on the `validation` split while that group alone is cut.

    The channels with the smallest scores leave; nothing is trained again.
    """

    schema_version: Literal[1] = 1
    model: str
    """SHA-256 of the model: its weights and what it is built from."""
    criterion: str
    """What scores the channels."""
    metric: MetricInfo
    samples: PositiveInt
    """Of the validation split, evenly spaced, that were evaluated."""
    ratios: tuple[float, ...] = Field(min_length=1)
    """Shares of its channels that a group lost, in (0, 1), rising."""
    value: float
    """Of the uncut model."""
    groups: Mapping[str, GroupCurve] = Field(min_length=1)
    """By path of the layer that names the group, in the order of the model."""

    @model_validator(mode="after")
    def _check(self) -> "SensitivityCurves":
        rising = all(low < high for low, high in pairwise((0, *self.ratios, 1)))
        if not rising or any(len(curve.values) != len(self.ratios) for curve in self.groups.values()):
            msg = "ratios must rise within (0, 1), and each group must have a value for each"
            raise ValueError(msg)
        return self

    def falls(self, path: str) -> tuple[float, ...]:
        """How much worse than uncut the metric is at each ratio of the group `path`; negative where it is better."""
        sign = 1 if self.metric.higher_is_better else -1
        return tuple(sign * (self.value - found) for found in self.groups[path].values)


def read_sensitivity(path: Path) -> SensitivityCurves:
    """Read a sensitivity. Raises InputError if the file cannot be read or is not exactly one."""
    try:
        return SensitivityCurves.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        msg = f"{path} must be a sensitivity as the stage sensitivity writes it, but: {error}; measure it again"
        raise InputError(msg) from error
