"""The stages that installed packages offer, found without importing them."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import final

from compressor.errors import HostError
from compressor.references import source_code

STAGES = "compressor.stages"
"""The entry-point group in which a package offers stages."""


@final
@dataclass(frozen=True)
class StageListing:
    """A stage that a pipeline file may name, as its source describes it."""

    name: str
    target: str
    """The class as `module:attribute`."""
    origin: str
    """The package that offers it, with its version."""
    summary: str
    """First line of the class's docstring; empty if its source is not found."""


def stage_names() -> Mapping[str, str]:
    """Map the name of each installed stage to its class, `module:attribute`. Raises HostError if two share a name."""
    return {name: entry.value for name, entry in _stage_entries().items()}


def describe_stages() -> tuple[StageListing, ...]:
    """Describe the installed stages in order of name, from their source alone: nothing is imported."""
    return tuple(
        StageListing(
            name=name,
            target=entry.value,
            origin=f"{entry.dist.name} {entry.dist.version}" if entry.dist else "",
            summary=source_code.summary(entry.module, entry.attr),
        )
        for name, entry in sorted(_stage_entries().items())
    )


def _stage_entries() -> dict[str, EntryPoint]:
    entries: dict[str, EntryPoint] = {}
    for entry in entry_points(group=STAGES):
        other = entries.setdefault(entry.name, entry)
        if other.value != entry.value:
            msg = f"two packages offer a stage {entry.name!r}: {other.value} and {entry.value}; uninstall one of them"
            raise HostError(msg)
    return entries
