"""A progress bar for people at a terminal."""

from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress_bar(
    items: Iterable[Any] | None = None, *, unit: str, total: int | None = None, hidden: bool = False
) -> "tqdm[Any]":
    """A bar over `items`, or over `total` calls of `update`; it is gone when the work is done.

    It shows on a terminal alone, and never if `hidden`: of several processes one has it. Where its `disable` is true
    afterwards, nothing shows, and the caller logs lines instead.
    """
    return tqdm(items, total=total, unit=unit, leave=False, disable=True if hidden else None)
