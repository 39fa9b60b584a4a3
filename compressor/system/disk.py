"""Writes that survive a kill or a power loss, and errors of disk and memory in words."""

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from compressor.errors import HostError

_REMEDIES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of the quota",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
    errno.EROFS: "choose a directory that can be written",
    errno.EACCES: "choose a directory that this user may read and write",
    errno.EPERM: "choose a directory that this user may read and write",
    errno.EIO: "check the disk",
    errno.ENOSYS: "choose a file system with file locks",
    errno.ENOLCK: "choose a file system with file locks",
}
"""What the user can do about each error number that means that the machine is at fault."""

_FULL_BELOW_BYTES = 1 << 20
"""A disk with less room than this counts as full: torch buffers, so its failed write leaves some room."""


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write `content` to `path` so that what was there or the new is, whole, whenever the process is killed.

    Text is UTF-8. Raises HostError if the machine is at fault. One process at a time may write to a path.
    """
    data = content.encode() if isinstance(content, str) else content
    part = path.with_name(f".{path.name}.part")
    with host_errors(path, needed_bytes=len(data)):
        part.unlink(missing_ok=True)  # of a killed process, or a link that someone planted
        try:
            with part.open("xb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        fsync_directory(path.parent)


def write_output(path: Path, content: str | bytes) -> None:
    """Write to the file that the user chose: atomically, where a link leads; a pipe or a device gets it as it is.

    So does the file that this process prints to, as /dev/stdout names it, behind what is printed.

    Makes the directories. Text is UTF-8. Raises HostError for whatever the system has against it.
    """
    data = content.encode() if isinstance(content, str) else content
    with output_errors(path):
        if path.exists() and (not path.is_file() or _is_printed_to(path)):
            with path.open("ab") as stream:
                stream.write(data)
            return
        target = Path(os.path.realpath(path))
        make_directory(target.parent)
        write_atomically(target, data)


def _is_printed_to(path: Path) -> bool:
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):  # closed
            if os.path.samestat(path.stat(), os.fstat(descriptor)):
                return True
    return False


@contextlib.contextmanager
def host_errors(path: Path, *, needed_bytes: int | None = None) -> Iterator[None]:
    """Turn an error that the machine is at fault for, while files at `path` are used, into a HostError.

    The error number decides. safetensors puts it into its message; torch gives none, so then a full disk decides.
    Every other error passes unchanged.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        free_bytes = _free_bytes(path)
        number = _error_number(error)
        if number is None and free_bytes < _FULL_BELOW_BYTES:
            number = errno.ENOSPC
        if number not in _REMEDIES:
            raise
        place = getattr(error, "filename", None) or path
        room = f"{free_bytes:,} bytes are free" + ("" if needed_bytes is None else f", {needed_bytes:,} are needed")
        msg = f"{place} must be readable and writable: {error}; {room}; {_REMEDIES[number]} and run again"
        raise HostError(msg) from error


@contextlib.contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn whatever the system has against writing to `path`, which the user chose, into a HostError."""
    try:
        with host_errors(path):
            yield
    except OSError as error:
        msg = f"{path} must be a file that can be written: {error.strerror}; choose another"
        raise HostError(msg) from error


@contextlib.contextmanager
def memory_errors() -> Iterator[None]:
    """Turn a failed allocation into a HostError. torch's own on the CPU is a RuntimeError that only its text tells."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        words = str(error)
        if isinstance(error, RuntimeError) and "allocate memory" not in words and "out of memory" not in words:
            raise
        msg = f"the machine must have enough memory, but {words or 'an allocation failed'}; lower batch_size"
        raise HostError(msg) from error


def make_directory(path: Path) -> None:
    """Make a directory and its parents so that they are there after a power loss."""
    if not path.is_dir():
        make_directory(path.parent)
        path.mkdir(exist_ok=True)
        fsync_directory(path.parent)


def fsync_directory(directory: Path) -> None:
    """Bring to the disk which names a directory holds."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _error_number(error: Exception) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))  # how Rust, which safetensors is written in, shows it
    return int(found[1]) if found else None


def _free_bytes(path: Path) -> int:
    # Path.exists raises for a directory that may not be searched
    existing = next(parent for parent in (path, *path.absolute().parents) if os.path.exists(parent))  # noqa: PTH110
    return shutil.disk_usage(existing).free
