"""What GitHub Actions reads: the commands that a log may hold, and the Markdown of a step's summary."""

import itertools
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, final

from compressor.errors import Problem
from compressor.records.report import Verdict
from compressor.system.disk import output_errors

SUMMARY_BYTES = 1024 * 1024
"""A larger summary of a step is dropped whole."""

_CUT = "\n*The rest is left out: the summary of a step holds at most 1 MiB.*\n"

_COMMAND = re.compile(r"((?:^|[\r\n])\s*:)(?=:)|(##)(?=\[)")
"""Where a runner sees a command: `::` where a line begins, and `##[` anywhere."""

_DATA = {"%": "%25", "\r": "%0D", "\n": "%0A"}
_PROPERTY = {**_DATA, ":": "%3A", ",": "%2C"}


def inert(text: str) -> str:
    """`text` with a space in whatever a runner would take for a command: it may hold names that anyone chose."""
    return _COMMAND.sub(lambda match: f"{match[0]} ", text)


@final
class InertFormatter(logging.Formatter):
    """Lines of a log as `inert` text: stages name layers in theirs."""

    def format(self, record: logging.LogRecord) -> str:
        """The whole record, with what was raised."""
        return inert(super().format(record))


def annotation(level: Literal["warning", "error"], message: str, **properties: str | int | None) -> str:
    """The command that shows `message` beside the log and, given `file`, `line` and `col`, beside the code."""
    given = [f"{name}={_escape(str(found), _PROPERTY)}" for name, found in properties.items() if found is not None]
    return f"::{level}{' ' if given else ''}{','.join(given)}::{_escape(message, _DATA)}"


def problem_annotation(problem: Problem, workspace: Path) -> str:
    """The command for a fault of a file; files are named relative to `workspace`, the checkout."""
    file = None if problem.file is None else _relative(problem.file, workspace)
    return annotation("error", problem.message, file=file, line=problem.line, col=problem.column)


def verdict_annotations(verdicts: Sequence[Verdict]) -> list[str]:
    """One command for each limit that is not met or not decided."""
    return [
        annotation("warning" if one.level == "warn" else "error", f"{one.status}: {one.message}", title=one.metric)
        for one in verdicts
        if one.status != "met"
    ]


def append_summary(markdown: str, path: Path) -> None:
    """Add `markdown` to the summary of a step, or what of it there is room for. Raises HostError."""
    with output_errors(path), path.open("a", encoding="utf-8") as stream:
        stream.write(fit_in(markdown, SUMMARY_BYTES - (stream.tell() if stream.seekable() else 0)))


def fit_in(markdown: str, room: int) -> str:
    """`markdown` in at most `room` bytes.

    If it is longer, its last sections are left out, and a sentence says so. If not even one section fits, it is cut at
    the end of a line. It is empty if there is no room for the sentence.
    """
    if _size(markdown) <= room:
        return markdown
    left = room - _size(_CUT)
    sections = _first(re.split(r"(?m)^(?=## )", markdown), left)
    kept = sections if len(sections) > 1 else _first(markdown.splitlines(keepends=True), left)
    return "".join(kept) + _CUT if left >= 0 else ""


def _first(parts: Sequence[str], room: int) -> list[str]:
    """The first of `parts`, as many as `room` bytes hold."""
    ends = itertools.accumulate(map(_size, parts))
    return [part for part, end in zip(parts, ends, strict=True) if end <= room]


def _relative(file: Path, workspace: Path) -> str:
    try:
        return os.path.relpath(file, workspace)
    except FileNotFoundError:  # where the working directory is gone, nothing is relative to it
        return str(file)


def _size(text: str) -> int:
    return len(text.encode())


def _escape(text: str, replacements: Mapping[str, str]) -> str:
    return "".join(replacements.get(character, character) for character in text)
