"""A report or a benchmark as JSON text, and a report back."""

import reprlib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from compressor.errors import InputError
from compressor.records.benchmark import Benchmark
from compressor.records.report import Report
from compressor.text.figures import list_names

MOST_BYTES = 64 << 20
"""Of a report: much more than any run writes."""


class _Header(BaseModel):
    schema_version: Any = None


def to_json(record: Report | Benchmark) -> str:
    """Indented JSON; `read_report` gives an equal report back."""
    return record.model_dump_json(indent=1) + "\n"


def read_report(path: Path) -> Report:
    """Read a report that `to_json` wrote.

    Raises InputError if the file cannot be read, has another schema version, or is not exactly such a report.
    """
    try:
        with path.open("rb") as file:  # a pipe as well: a shell makes one of the output of `git show`
            text = file.read(MOST_BYTES + 1)
        if len(text) > MOST_BYTES:
            msg = f"{path} must be a report, of at most {MOST_BYTES >> 20} MiB, got more; `compress run` writes one"
            raise InputError(msg)
        written = _Header.model_validate_json(text).schema_version
        ours = Report.model_fields["schema_version"].default
        if type(written) is not int or written != ours:  # True and 1.0 equal 1
            got = reprlib.repr(written)
            msg = f"{path} must have schema_version {ours}, got {got}; read it with the release that wrote it"
            raise InputError(msg)
        return Report.model_validate_json(text, strict=True)
    except OSError as error:
        msg = f"{path} must be a readable report: {error.strerror}; `compress run` writes one"
        raise InputError(msg) from error
    except ValidationError as error:
        msg = f"{path} must be a report as `compress run` writes it; run it again. Found: {_faults(error)}"
        raise InputError(msg) from error


def _faults(error: ValidationError, most: int = 5) -> str:
    faults = error.errors(include_url=False, include_context=False, include_input=False)
    told = [f"{'.'.join(map(str, fault['loc'])) or 'the file'}: {fault['msg']}" for fault in faults]
    return list_names(told, most=most, separator="; ")
