"""Every error that compressor raises on purpose, and the exit code that the command line gives it.

* CompressorError
  x ConfigError    exit 2: the pipeline file or the command line is at fault; raised before any work
  x InputError     exit 5: the user's code, data, weights or model file is at fault
  x StageError     exit 6: a stage could not do what it was asked
  x HostError      exit 7: the machine is at fault: disk, memory, a missing package
  x LockedError    exit 8: another run holds the directory

A message says what must hold, what was found, where, and what to do. Gates are results, not errors: `verdicts.gate`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import ClassVar


class CompressorError(Exception):
    """Base of all errors in this file; never raised itself."""

    exit_code: ClassVar[int]


@dataclass(frozen=True)
class Problem:
    """One fault of a pipeline file: what is wrong and where; `line` and `column` count from 1."""

    message: str
    file: Path | None = None
    line: int | None = None
    column: int | None = None

    def __str__(self) -> str:
        place = ":".join(str(part) for part in (self.file, self.line, self.column) if part is not None)
        return f"{place}: {self.message}" if place else self.message


class ConfigError(CompressorError):
    """The pipeline cannot be run as written; `problems` holds every fault found, in file order."""

    exit_code = 2

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = tuple(problems)


class InputError(CompressorError):
    """The user's code, data, weights or model file is at fault."""

    exit_code = 5


class StageError(CompressorError):
    """A stage could not do what it was asked."""

    exit_code = 6


class HostError(CompressorError):
    """The machine is at fault: disk, memory, a missing package."""

    exit_code = 7


class LockedError(CompressorError):
    """Another run holds the directory; the message names it."""

    exit_code = 8


def closest(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` is most likely meant to be, whatever its case; None if no known name is close."""
    by_lower_case = {candidate.lower(): candidate for candidate in known}
    matches = get_close_matches(name.lower(), by_lower_case, n=1)
    return by_lower_case[matches[0]] if matches else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: `; did you mean 'epochs'?`, or nothing if no known name is close."""
    match = closest(name, known)
    return f"; did you mean {match!r}?" if match else ""
