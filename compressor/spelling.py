"""The known name that a misspelt one most likely means."""

from collections.abc import Iterable
from difflib import get_close_matches


def closest(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` is most likely meant to be, whatever its case; None if no known name is close."""
    by_lower_case = {candidate.lower(): candidate for candidate in known}
    matches = get_close_matches(name.lower(), by_lower_case, n=1)
    return by_lower_case[matches[0]] if matches else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: `; did you mean 'epochs'?`, or nothing if no known name is close."""
    match = closest(name, known)
    return f"; did you mean {match!r}?" if match else ""
