"""Which files the process has read while the code of a pipeline ran: what was read counts, however it was."""

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

_read: dict[Path, set[str]] = {}
"""By directory of the pipeline file."""
_watched: list[Path] = []

_PREFIXES = (sys.prefix, sys.base_prefix, sys.exec_prefix, Path(__file__).parents[1])
_INSTALLED = (
    *("/proc/", "/sys/", "/dev/", "/etc/", "/usr/"),
    *(f"{place}/" for prefix in _PREFIXES for place in (prefix, os.path.realpath(prefix))),
)


@contextmanager
def watch(directory: Path) -> Iterator[None]:
    """Until the block is left, note the files and directories that are read, for the pipeline in `directory`."""
    _install()
    _read.setdefault(directory, set())
    _watched.append(directory)
    try:
        yield
    finally:
        _watched.remove(directory)


@contextmanager
def pause() -> Iterator[None]:
    """Until the block is left, note nothing: what is read is neither the user's code nor data, and counts elsewhere."""
    watched, _watched[:] = list(_watched), []
    try:
        yield
    finally:
        _watched[:] = watched


def code_read(directory: Path) -> frozenset[Path]:
    """Python files of the user's that were read or imported for the pipeline in `directory`, by any means."""
    files = (_source(path) for path in _of_user(directory) if path.endswith((".py", ".pyc")))
    return frozenset(Path(file) for file in files if file is not None)


def data_read(directory: Path) -> frozenset[Path]:
    """Other files of the user's, and directories that were listed, that were read for the pipeline in `directory`.

    Files that a library reads without Python, as those of HDF5 and safetensors do, are not seen.
    """
    return frozenset(Path(path) for path in _of_user(directory) if not path.endswith((".py", ".pyc")))


def is_installed(file: Path) -> bool:
    """Whether a file belongs to Python, to a package that was installed, to this one, or to the system."""
    return f"{file}/".startswith(_INSTALLED) or bool({"site-packages", "dist-packages"} & set(file.parts))


def _of_user(directory: Path) -> Iterator[str]:
    return (path for path in tuple(_read.get(directory, ())) if not is_installed(Path(path)))


def _source(path: str) -> str | None:
    """The source of a compiled file; None if there is none."""
    if path.endswith(".py"):
        return path
    with suppress(ValueError, NotImplementedError):
        source = importlib.util.source_from_cache(path)
        return source if Path(source).exists() else None
    return None


@cache
def _install() -> None:
    sys.addaudithook(_listen)  # once for a process: it cannot be taken away again


def _listen(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watched or event not in {"open", "os.listdir", "os.scandir"}:
        return
    path, *others = arguments
    writes = event == "open" and isinstance(others[0], str) and not {"r", "+"} & set(others[0])
    if writes or not isinstance(path, str | os.PathLike):
        return
    with suppress(OSError, ValueError, TypeError):
        # the file itself and the name it goes by: a link may be turned to another file
        name = os.path.abspath(path)  # noqa: PTH100  # `Path` would take ten times as long for each file
        for directory in _watched:
            _read[directory].add(name)
