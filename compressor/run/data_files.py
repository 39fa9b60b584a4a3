"""Whether the data files that a run has read are as they were, told without reading the data again."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeAlias

Signature: TypeAlias = list[int | str]
"""Of a file its size, the time of its last change and, if it is small, a hash; of a directory a hash of its names."""

_MOST_HASHED = 1000
"""Files of which the content is looked at; of more, size and time must do."""
_SMALL_BYTES = 1 << 20


def sign(paths: Iterable[Path]) -> dict[str, Signature]:
    """The signature of each file and directory that is there."""
    signed: dict[str, Signature] = {}
    for path in sorted(paths):
        if (signature := _sign(path, hashed=len(signed) < _MOST_HASHED)) is not None:
            signed[str(path)] = signature
    return signed


def changed(signed: Mapping[str, Signature]) -> list[str]:
    """The files and directories that are no longer as they were signed, in order."""
    return [path for path, signature in signed.items() if not _is_same(Path(path), signature)]


def tree(directory: Path) -> set[Path]:
    """A directory with all that lies in it; a file alone."""
    return {directory, *directory.rglob("*")} if directory.is_dir() else {directory}


def _is_same(path: Path, signature: Signature) -> bool:
    now = _sign(path, hashed=len(signature) != 2)  # size and time
    if now is None or len(now) != len(signature):
        return False
    # a file that was touched, or copied back, is the same if its content is
    return now == signature or (len(now) == 3 and [now[0], now[2]] == [signature[0], signature[2]])


def _sign(path: Path, *, hashed: bool) -> Signature | None:
    try:
        if path.is_dir():
            names = sorted(one.name for one in path.iterdir() if not one.name.startswith((".", "__pycache__")))
            return [hashlib.sha256("\0".join(names).encode("utf-8", "surrogateescape")).hexdigest()]
        if not path.is_file():
            return None
        found = path.stat()
        if not hashed or found.st_size > _SMALL_BYTES:
            return [found.st_size, found.st_mtime_ns]
        return [found.st_size, found.st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest()]
    except OSError:
        return None
