"""What a stage is: settings, and a function from one model to another."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

import torch
from pydantic import BaseModel, ConfigDict

from compressor.artifact import Artifact, TorchModel
from compressor.task import Task

In = TypeVar("In", bound=Artifact, contravariant=True)
Out = TypeVar("Out", bound=Artifact, covariant=True)


@dataclass(frozen=True)
class StageContext:
    """What a stage cannot know by itself.

    `reference` is the baseline: the default teacher. `work_dir` is an empty directory for files that the stage's result
    consists of; nothing else the stage writes there is kept. `log` takes one line for people.
    """

    reference: TorchModel
    device: torch.device
    seed: int
    work_dir: Path
    log: Callable[[str], None]


class Stage(BaseModel, ABC, Generic[In, Out]):
    """One step of a pipeline; its settings are its fields, and a subclass is final.

    The annotations of `apply` say which artifacts it takes and gives, and a chain that does not fit is refused before
    any work. Equal settings, input, task and seed must give an equal model: the store relies on it.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    version: ClassVar[int] = 1
    """Raised when the same settings would give another model."""

    makes_baseline: ClassVar[bool] = False
    """Whether the result is what the report compares with; such a stage comes first."""

    @abstractmethod
    def apply(self, model: In, task: Task, context: StageContext) -> Out:
        """Return a new model; `model` is not changed."""
