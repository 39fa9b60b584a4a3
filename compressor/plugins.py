"""From a name in a pipeline file to the object it names; the only use of importlib."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Reference(BaseModel):
    """A callable named `module:attribute`, with the keyword arguments it is called with.

    Every other key of the YAML mapping is an argument. An argument whose name ends in `_dir`, `_file` or `_path` is a
    path; `config` has made it absolute.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    factory: str = Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$")

    @property
    def arguments(self) -> Mapping[str, Any]:
        """The keyword arguments, paths as `Path`."""
        extra = self.model_extra or {}
        return {
            name: Path(value) if is_path(name) and isinstance(value, str) else value for name, value in extra.items()
        }

    def without(self, argument: str) -> "Reference":
        """Return this reference without one of its arguments."""
        kept = {name: value for name, value in (self.model_extra or {}).items() if name != argument}
        return Reference(factory=self.factory, **kept)

    def call(self) -> Any:
        """Import the callable and call it with the arguments."""
        return load(self.factory)(**self.arguments)


def is_path(argument: str) -> bool:
    """Whether an argument of this name holds a path."""
    return argument.endswith(("_dir", "_file", "_path"))


def load(name: str) -> Any:
    """Import the object named `module:attribute`."""
    module, _, attribute = name.partition(":")
    found: Any = importlib.import_module(module)
    for part in attribute.split("."):
        found = getattr(found, part)
    return found
