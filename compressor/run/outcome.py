"""How a run ended, in `outcome.json`: for programs that cannot see its exit code."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compressor.system.disk import write_atomically


@contextmanager
def record_outcome(directory: Path) -> Iterator[None]:
    """Write that a run is going on and, if an error ends the block, its exit code and message."""
    _write(directory, status="running", exit_code=None, message="")
    try:
        yield
    except BaseException as error:
        _write(directory, status="failed", exit_code=getattr(error, "exit_code", 1), message=str(error))
        raise


def record_end(directory: Path, exit_code: int) -> None:
    """Write that a run reached its end; its exit code tells what became of the gate."""
    _write(directory, status="done", exit_code=exit_code, message="")


def _write(directory: Path, *, status: str, exit_code: int | None, message: str) -> None:
    content = {"status": status, "exit_code": exit_code, "message": message}
    write_atomically(directory / "outcome.json", json.dumps(content, indent=1) + "\n")
