"""Print, for people, for programs and for the runners of GitHub; only the command line does."""

import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from compressor.errors import HostError, Problem
from compressor.records.report import Verdict
from compressor.report.github import append_summary, inert, problem_annotation, verdict_annotations
from compressor.text.figures import printable

IN_ACTIONS = os.environ.get("GITHUB_ACTIONS") == "true"
"""Whether a runner of GitHub reads what is printed."""


def for_people(text: str) -> str:
    """A text in which a runner finds no command."""
    return inert(text) if IN_ACTIONS else text


def say(text: str, *, err: bool = False) -> None:
    """Print a text and the end of its line; nothing happens if its reader has left.

    Raises HostError if standard output cannot take it for another reason.
    """
    try:
        click.echo(text.removesuffix("\n"), err=err)
    except OSError as error:
        # what is still in the buffer would end the process with an exit code of its own
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), (sys.stderr if err else sys.stdout).fileno())
        if not err and error.errno != errno.EPIPE:
            msg = f"standard output must take what is printed: {error.strerror}; send it to another place"
            raise HostError(msg) from error


def complain(text: str) -> None:
    """Print an error, which may quote names from a file that is not trusted."""
    say(for_people("\n".join(map(printable, text.removesuffix("\n").split("\n")))), err=True)


def tell(text: str, markdown: str, verdicts: Sequence[Verdict] = ()) -> None:
    """Print a text; in GitHub Actions annotate what is not met, and add `markdown` to the summary of the step.

    Where one of them cannot be written, which raises HostError, the others still are.
    """
    try:
        say(text)
    finally:
        if IN_ACTIONS:
            _annotate(verdict_annotations(verdicts))
            if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
                append_summary(markdown, Path(summary))


def annotate_problems(problems: Sequence[Problem]) -> None:
    """In GitHub Actions, show faults of files at their lines."""
    if IN_ACTIONS:
        workspace = Path(os.environ.get("GITHUB_WORKSPACE", "."))
        _annotate([problem_annotation(problem, workspace) for problem in problems])


def _annotate(commands: Sequence[str]) -> None:
    for command in commands:
        say(command, err=True)  # a runner reads both streams, and standard output may be JSON
