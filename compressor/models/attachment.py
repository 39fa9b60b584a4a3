"""What a stage adds to a model: it is saved with the model, and says what becomes of it with other weights."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Self

from torch import nn

from compressor.models.edits import Edit


class Attachment(ABC):
    """Something that belongs to a model, such as soft labels; a subclass is final and frozen.

    A model has at most one of each class. The stage that makes it names the class in `Stage.attaches`.
    """

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Write files into an existing `directory`, under names that no other class takes."""

    @classmethod
    @abstractmethod
    def load(cls, directory: Path, module: nn.Module) -> Self:
        """Read what `save` wrote; `module` is the model's. Raises InputError if a file is damaged."""

    @abstractmethod
    def carry_over(self, before: nn.Module, after: nn.Module, edits: tuple[Edit, ...]) -> Self | None:
        """Return what holds for `after`, or None if nothing does.

        `after` is `before`, changed in structure by `edits`, with other weights. Raises StageError if `after` breaks
        what was promised.
        """
