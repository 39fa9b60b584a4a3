"""What a stage tells the report while it works: one frozen record for each kind of finding."""

from collections.abc import Mapping
from typing import Annotated

from pydantic import AfterValidator, StringConstraints

from compressor.records.measurements import Record


class Finding(Record):
    """The base of everything that `StageContext.report` takes."""


class EpochLosses(Finding):
    """What an epoch of training came to."""

    means: Mapping[str, float]
    """Mean of each loss by name."""


class Reached(Finding):
    """What a setting asked of a stage, in numbers, and what came of it."""

    setting: str
    asked: float
    achieved: float


def _check_name(name: str) -> str:
    if name.casefold() in {"report.json", "report.md", "outcome.json"}:
        msg = f"must not be a file that the run writes itself, got {name!r}"
        raise ValueError(msg)
    return name


def _check_text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        msg = f"must be text that UTF-8 can hold, but: {error}"
        raise ValueError(msg) from error
    return text


class Document(Finding):
    """A text that the run leaves beside its report."""

    name: Annotated[
        str,
        StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*\.(csv|json|md|svg|txt)$"),
        AfterValidator(_check_name),
    ]
    """Of the file; a later stage may replace a document of this name."""
    text: Annotated[str, AfterValidator(_check_text)]
