"""What a run keeps on disk: entries found by content key, there whole or not at all."""

import contextlib
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import socket
import stat
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, final

from filelock import FileLock, Timeout

from compressor.errors import InputError, LockedError, StageError
from compressor.system.disk import fsync_directory, host_errors, make_directory, write_atomically

logger = logging.getLogger("compressor")

_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Entry:
    """A directory of files that were committed together under one key.

    `facts` is the JSON committed with them. Hashes prove that the bytes are the committed ones, not that whoever
    committed them can be trusted.
    """

    key: str
    directory: Path
    facts: Mapping[str, Any]


@final
@dataclass(frozen=True)
class Store:
    """The entries of one run directory, `root`.

    An entry is written as a draft, every file of it reaches the disk, and one rename makes it visible: a process may
    be killed at any point and leaves whole entries only. An entry is never overwritten. All methods but `peek` and
    `recall` are for the process that holds the lock.
    """

    root: Path

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold `root` for this process alone and remove the drafts that killed processes left.

        The kernel frees the lock of a process that dies. Raises LockedError, naming the holder, if it is held, and
        HostError if `root` cannot be written.
        """
        with host_errors(self.root):
            make_directory(self.root)
            # without fallback: a lock that is a mere file would outlive a killed process
            lock = FileLock(self.root / ".lock", fallback_to_soft=False)
            try:
                lock.acquire(blocking=False)
            except Timeout:
                msg = f"{self.root} is held by {self._holder()}; wait until it ends, or choose another directory"
                raise LockedError(msg) from None
        try:
            self._take_over()
            yield
        finally:
            lock.release()

    def find(self, key: str) -> Entry | None:
        """Return the entry of `key` once every byte of it is checked, or None if there is none.

        A damaged entry, one with a changed, missing, additional or linked file, is moved to `quarantine/`, which is
        logged, and counts as none.
        """
        directory = self._entry_directory(key)
        with host_errors(directory):
            try:
                return _verify(directory)
            except _DamagedError as damage:
                aside = self.root / "quarantine" / f"{key}-{secrets.token_hex(4)}"
                make_directory(aside.parent)
                directory.rename(aside)
                logger.warning("%s is damaged: %s; moved to %s", directory, damage, aside)
                return None

    def peek(self, key: str) -> Entry | None:
        """Return what `find` would, but leave a damaged entry where it is; needs no lock."""
        directory = self._entry_directory(key)
        with host_errors(directory):
            try:
                return _verify(directory)
            except (_DamagedError, FileNotFoundError):  # the holder of the lock may move it away meanwhile
                return None

    @contextlib.contextmanager
    def draft(self) -> Iterator[Path]:
        """Give an empty directory to fill and to commit; it is removed at the end if it was not committed.

        Raises HostError if writing fails because of the machine, as `host_errors` tells.
        """
        draft = self.root / "drafts" / secrets.token_hex(8)
        try:
            with host_errors(draft):
                make_directory(draft)
                yield draft
        finally:
            shutil.rmtree(draft, ignore_errors=True)  # what a broken disk keeps, the next `lock` removes

    def workspace(self, key: str) -> Path:
        """Give the directory for what the next process is to find again if this one is killed on the way to `key`."""
        directory = self.root / "work" / self._entry_directory(key).name
        with host_errors(directory):
            make_directory(directory)
        return directory

    def clear_workspaces(self, *, keep: Collection[str] = ()) -> None:
        """Remove the workspaces of all keys but those in `keep`."""
        with host_errors(self.root):
            for directory in (self.root / "work").glob("*"):
                if directory.name not in keep:
                    shutil.rmtree(directory)

    def commit(self, draft: Path, key: str, facts: Mapping[str, Any]) -> Entry:
        """Turn `draft` into the entry of `key`, or return the entry that is there already.

        `facts` must be JSON. Raises StageError if the draft holds a link or a special file: an entry owns its bytes.
        """
        entry = self.find(key)
        if entry is not None:
            return entry
        directory = self._entry_directory(key)
        stored_facts = json.loads(json.dumps(facts, allow_nan=False))
        with host_errors(draft):
            try:
                hashes = {name: _flush_and_hash(file) for name, file in _files(draft).items()}
            except _DamagedError as damage:
                msg = f"a stored result must consist of files of its own, but {damage}; copy it into the directory"
                raise StageError(msg) from damage
            with (draft / _MANIFEST).open("x") as stream:
                stream.write(_manifest(key, hashes, stored_facts))
                stream.flush()
                os.fsync(stream.fileno())
            for folder, _, _ in os.walk(draft, topdown=False):
                fsync_directory(Path(folder))
            make_directory(directory.parent)
            draft.rename(directory)
            fsync_directory(directory.parent)
        return Entry(key, directory, stored_facts)

    def remember(self, name: str, content: Any) -> None:
        """Keep a piece of JSON under `name`, replacing what was kept under it."""
        write_atomically(self.root / f".{name}.json", json.dumps(content, allow_nan=False))

    def recall(self, name: str) -> Any | None:
        """Return what was remembered under `name`; None if that is nothing, or no longer JSON. Needs no lock."""
        try:
            return json.loads((self.root / f".{name}.json").read_bytes())
        except (FileNotFoundError, ValueError, RecursionError):
            return None

    def _entry_directory(self, key: str) -> Path:
        if not re.fullmatch("[0-9a-f]{32,64}", key):
            msg = f"a key must be 32 to 64 hexadecimal digits, got {key!r}"
            raise ValueError(msg)
        return self.root / "stages" / key

    def _take_over(self) -> None:
        for name in ("stages", "drafts", "work", "quarantine"):
            if (self.root / name).is_symlink():
                msg = f"{self.root / name} must be a directory, but it is a link; remove it"
                raise InputError(msg)
        with host_errors(self.root):
            if (self.root / "drafts").exists():
                shutil.rmtree(self.root / "drafts")  # before anything is written: they may be what fills the disk
        since = datetime.now(UTC).isoformat(timespec="seconds")
        self.remember("holder", {"pid": os.getpid(), "host": socket.gethostname(), "since": since})

    def _holder(self) -> str:
        """Name the process that holds the lock: only its note tells, which may still be that of a killed process."""
        match self.recall("holder"):
            case {"pid": int(pid), "host": str(host), "since": str(since)}:
                return f"process {pid} on {host}, or one that it started, since {since}"
        return "another process"


def content_key(parts: Mapping[str, Any]) -> str:
    """SHA-256 of `parts` as JSON with sorted keys, 64 hexadecimal digits.

    Raises ValueError for a NaN or an infinity, TypeError for what is not JSON.
    """
    canonical = json.dumps(parts, sort_keys=True, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def differences(old_parts: Mapping[str, Any], new_parts: Mapping[str, Any]) -> tuple[str, ...]:
    """Say, one reason each, why a step with `new_parts` in its key cannot reuse what `old_parts` gave."""
    if old_parts.get("stage") != new_parts.get("stage"):
        return (f"stage changed: {old_parts.get('stage')!r} → {new_parts.get('stage')!r}",)
    reasons: list[str] = []
    for name in dict.fromkeys((*new_parts, *old_parts)):
        old, new = _leaves(old_parts.get(name, {})), _leaves(new_parts.get(name, {}))
        changed = [path for path in dict.fromkeys((*new, *old)) if old.get(path, ...) != new.get(path, ...)]
        if not changed:
            continue
        if name == "input":
            reasons.append("an earlier stage runs")
        elif name == "libraries":
            reasons += [f"library {path} {old.get(path)} → {new.get(path)}" for path in changed]
        elif changed == [""]:
            reasons.append(f"{name} changed: {old.get('')!r} → {new.get('')!r}")
        else:
            reasons.append(f"{name} changed: {', '.join(filter(None, changed))}")
    return tuple(reasons)


def _leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Values of nested mappings by dotted path; a value that is no mapping has the empty path."""
    if not isinstance(value, Mapping):
        return {path: value}
    return {
        leaf: content
        for name, part in value.items()
        for leaf, content in _leaves(part, f"{path}.{name}" if path else str(name)).items()
    }


class _DamagedError(Exception):
    """An entry is not what was committed; the message says where."""


def _verify(directory: Path) -> Entry | None:
    """Read an entry and check every byte of it; None if there is none. Raises _DamagedError."""
    if not os.path.lexists(directory):
        return None
    if directory.is_symlink() or not directory.is_dir():
        msg = "it is not a directory"
        raise _DamagedError(msg)
    files = _files(directory)
    if _MANIFEST not in files:
        msg = f"{_MANIFEST} is missing"
        raise _DamagedError(msg)
    hashes, facts = _read_manifest(directory, files.pop(_MANIFEST).read_bytes())
    if files.keys() != hashes.keys():
        msg = f"missing or additional: {', '.join(sorted(files.keys() ^ hashes.keys()))}"
        raise _DamagedError(msg)
    for name, file in files.items():
        with file.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != hashes[name]:
                msg = f"{name} has changed"
                raise _DamagedError(msg)
    return Entry(directory.name, directory, facts)


def _manifest(key: str, hashes: Mapping[str, str], facts: Mapping[str, Any]) -> str:
    body = {"key": key, "files": hashes, "facts": facts}
    return json.dumps({**body, "sha256": content_key(body)}, indent=1, sort_keys=True, allow_nan=False) + "\n"


def _read_manifest(directory: Path, content: bytes) -> tuple[dict[str, str], dict[str, Any]]:
    """Hashes by file name, and facts, of a manifest that is byte for byte what `_manifest` writes."""
    try:
        match json.loads(content):
            case {"files": dict(hashes), "facts": dict(facts)}:
                if _manifest(directory.name, hashes, facts).encode() == content:
                    return hashes, facts
    except (ValueError, RecursionError):  # not UTF-8, not JSON, a NaN, or nested without end
        pass
    msg = f"{_MANIFEST} has changed"
    raise _DamagedError(msg)


def _files(directory: Path, prefix: str = "") -> dict[str, Path]:
    """Every file below `directory` by relative name. Raises _DamagedError for what is neither file nor directory."""
    files: dict[str, Path] = {}
    for path in sorted(directory.iterdir()):
        mode = path.lstat().st_mode
        if stat.S_ISDIR(mode):
            files |= _files(path, f"{prefix}{path.name}/")
        elif stat.S_ISREG(mode):
            files[prefix + path.name] = path
        else:
            msg = f"{prefix}{path.name} is a link or a special file"
            raise _DamagedError(msg)
    return files


def _flush_and_hash(file: Path) -> str:
    """Bring a file to the disk and hash it. Raises _DamagedError if it shares its bytes with another name."""
    with file.open("rb") as stream:
        if os.fstat(stream.fileno()).st_nlink != 1:
            msg = f"{file} is a hard link"
            raise _DamagedError(msg)
        os.fsync(stream.fileno())
        return hashlib.file_digest(stream, "sha256").hexdigest()
