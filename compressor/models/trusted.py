"""What may be called when a stored model is loaded: what the pipeline file names, and nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import final

from compressor.errors import InputError
from compressor.models.attachment import Attachment
from compressor.models.edits import Edit
from compressor.references.reference import Reference, is_path, load


@final
@dataclass(frozen=True)
class Trusted:
    """Callables and classes that a pipeline file names; a directory that is not trusted could name any other."""

    references: tuple[Reference, ...]
    """Factories of models."""
    modules: frozenset[str] = frozenset()
    """Python modules of the stages: the functions in them may build submodules."""
    attachments: tuple[type[Attachment], ...] = ()
    """What the stages attach to models."""

    def factory(self, wanted: Reference, where: Path) -> Reference:
        """Return the factory that is `wanted`, paths aside. Raises InputError if none is."""
        for reference in self.references:
            if reference.strip(is_path) == wanted.strip(is_path):
                return reference
        names = ", ".join(sorted({reference.factory for reference in self.references}))
        msg = f"the factory of {where} must be one that the pipeline names ({names}), got {wanted.factory!r}"
        raise InputError(msg)

    def check_edits(self, edits: Sequence[Edit], where: str) -> None:
        """Raise InputError if an edit calls anything but a function that the module of a stage defines itself."""
        for edit in edits:
            if edit.replacement is None or self._is_own_function(edit.replacement.factory):
                continue
            known = ", ".join(sorted(self.modules)) or "none"
            msg = (
                f"what builds the submodule {edit.path!r} of {where} must be a function that the module of a stage "
                f"defines, one of the stages that the pipeline names ({known}), got {edit.replacement.factory!r}; "
                "define it beside the stage"
            )
            raise InputError(msg)

    def _is_own_function(self, name: str) -> bool:
        # What a module imports is reached through its names too: `stage_module:os.system` would be in it.
        module, _, function = name.partition(":")
        if module not in self.modules or not function.isidentifier():
            return False
        found = load(name)
        return isinstance(found, FunctionType | type) and found.__module__ == module and found.__qualname__ == function

    def attachment(self, name: str, where: str) -> type[Attachment]:
        """Return the class called `name`, `module:Class`. Raises InputError if no stage attaches it."""
        for kind in self.attachments:
            if attachment_name(kind) == name:
                return kind
        known = ", ".join(sorted(map(attachment_name, self.attachments))) or "none"
        msg = (
            f"what {where} carries must be what a stage of the pipeline attaches ({known}), got {name!r}; a stage "
            "names its classes in `attaches`"
        )
        raise InputError(msg)


def attachment_name(kind: type[Attachment]) -> str:
    """Name of a class of attachments as `module:Class`."""
    return f"{kind.__module__}:{kind.__qualname__}"
