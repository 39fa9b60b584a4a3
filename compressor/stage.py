"""What a stage is: settings, and a function from one model to another."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from pydantic import BaseModel, ConfigDict

from compressor.models.artifact import Artifact, TorchModel
from compressor.models.attachment import Attachment
from compressor.models.trusted import Trusted
from compressor.records.findings import Finding
from compressor.references.reference import Reference, find_references
from compressor.task import Task

In = TypeVar("In", bound=Artifact, contravariant=True)
Out = TypeVar("Out", bound=Artifact, covariant=True)


@dataclass(frozen=True)
class StageContext:
    """What a stage cannot know by itself.

    `reference` is the baseline: the default teacher. `work_dir` is a directory for files that the stage's result
    consists of; nothing else the stage writes there is kept. It is empty, except that a stage that was cut off finds
    again what it left there. `log` takes one line for people, `report` what the report shows: the losses of an epoch,
    what a setting reached, what int8 did, a document.
    """

    reference: TorchModel
    device: torch.device
    seed: int
    work_dir: Path
    log: Callable[[str], None]
    report: Callable[[Finding], None] = lambda _finding: None


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
    """Whether the result, if the stage comes first, is what the report compares with."""

    keeps_model: ClassVar[bool] = False
    """Whether the model leaves as it entered, with something added; such a stage has no row in the report."""

    attaches: ClassVar[tuple[type[Attachment], ...]] = ()
    """What the stage may add to a model."""

    def rehearse(self, model: In, reference: TorchModel, task: Task) -> Out | None:  # noqa: ARG002  # as few stages do
        """Do what can be done at once, so that a mistake shows before any time is spent.

        `model` and `reference` are built like those that `apply` will get, with other weights. Returns a model built
        like the one that will leave, or None if only the work itself can tell. Raises what `apply` would.
        """
        return None

    @abstractmethod
    def apply(self, model: In, task: Task, context: StageContext) -> Out:
        """Return a new model; `model` is not changed."""


def trust(stages: Iterable[Stage[Any, Any]], *references: Reference) -> Trusted:
    """What loading a stored model may call in a pipeline of `stages` whose file also names `references`."""
    stages = tuple(stages)
    return Trusted(
        references=(*references, *find_references(stages)),
        modules=frozenset(kind.__module__ for stage in stages for kind in type(stage).__mro__ if _is_own(kind)),
        attachments=tuple({kind: None for stage in stages for kind in stage.attaches}),
    )


def _is_own(kind: type) -> bool:
    """Whether a class that a stage inherits from is a stage too; its functions may build submodules as well."""
    return issubclass(kind, Stage) and kind.__module__ != __name__
