"""What pruning keeps because it cannot be followed: why, and told in one line with one pattern for layers alike."""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

from compressor.models.layers import matching
from compressor.text.figures import count, list_names

Kept: TypeAlias = Mapping[str, str]
"""Why a layer, or all within a module, keeps what it has: by path."""

_MOST_LINES = 6


def list_reasons(kept: Kept, paths: Sequence[str]) -> list[str]:
    """One line for all that is kept for one reason; `paths` are those of all layers that a pattern may match."""
    return [f"{_name(patterns)}: {reason}" for patterns, reason in _merge(kept, paths)]


def list_lines(kept: Kept, paths: Sequence[str]) -> list[str]:
    """What is told of a model that is pruned all the same: `list_reasons`, and how to have it as a setting."""
    lines = [
        f"kept whole: {_name(patterns)}: {reason}"
        + (f"; `protect: [{', '.join(patterns)}]` keeps the same without this line" if patterns else "")
        for patterns, reason in _merge(kept, paths)
    ]
    more = len(lines) - _MOST_LINES
    return lines[:_MOST_LINES] + ([f"kept whole for {count(more, 'other reason')}: more layers"] if more > 0 else [])


def _merge(kept: Kept, paths: Sequence[str]) -> list[tuple[list[str], str]]:
    """Patterns and reason; reasons that differ in numbers alone are one: those name layers of a stack."""
    alike: dict[str, list[str]] = defaultdict(list)
    for path, reason in kept.items():
        alike[_without_numbers(reason)].append(path)
    return [(list_patterns([name for name in names if name], paths), kept[names[0]]) for names in alike.values()]


def _name(patterns: Sequence[str]) -> str:
    return list_names(patterns, most=4) or "all that is not named here"


def list_patterns(names: Sequence[str], paths: Sequence[str]) -> list[str]:
    """Patterns of `paths` that name all of `names`, and nothing else where it can be said with `*` for numbers."""
    alike: dict[str, list[str]] = defaultdict(list)
    for name in names:
        alike[_without_numbers(name)].append(name)
    return [pattern for found in alike.values() for pattern in _narrow(found, paths)]


def _narrow(names: Sequence[str], paths: Sequence[str]) -> Iterator[str]:
    pattern = _without_numbers(names[0])
    if len(names) > 1 and set(matching(paths, pattern)) <= set(names):
        yield pattern
    else:
        yield from names


def _without_numbers(text: str) -> str:
    return re.sub(r"\d+", "*", text)
