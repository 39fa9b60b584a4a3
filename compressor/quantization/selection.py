"""The layers that a user names, by path or pattern, among those that become int8."""

from collections.abc import Collection, Sequence

from compressor.errors import InputError, did_you_mean
from compressor.models.layers import matching


def select_layers(layers: Sequence[str], patterns: Collection[str]) -> tuple[str, ...]:
    """Those of `layers` that a pattern names, or that lie below a path that it names, in their order.

    Patterns are as in `layers.paths_matching`. Raises InputError for one that names none.
    """
    paths = tuple(dict.fromkeys(above for layer in layers for above in _paths_to(layer)))
    named: set[str] = set()
    for pattern in patterns:
        matches = matching(paths, pattern)
        if not matches:
            msg = (
                f"keep_float must name layers that would become int8, but {pattern!r} names none"
                f"{did_you_mean(pattern, paths)}; they are {', '.join(layers)}"
            )
            raise InputError(msg)
        named.update(matches)
    return tuple(layer for layer in layers if not named.isdisjoint(_paths_to(layer)))


def _paths_to(layer: str) -> list[str]:
    """List the paths at and above a layer: `a`, `a.b` and `a.b.c` for `a.b.c`."""
    names = layer.split(".")
    return [".".join(names[:length]) for length in range(1, len(names) + 1)]
