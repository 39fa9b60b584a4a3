"""The store keeps whole entries or none, whatever happens to the process, the bytes or the disk."""

import errno
import json
import logging
import math
import os
import random
import signal
import socket
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from compressor.errors import HostError, InputError, LockedError, StageError
from compressor.run.store import Entry, Store, content_key, differences
from compressor.system.disk import host_errors, write_atomically

KEY = content_key({"stage": "training", "seed": 0})
OTHER_KEY = content_key({"stage": "training", "seed": 1})
FACTS = {
    "stage": "training",
    "parts": {"rate": 1e-3, "sizes": [1, 2], "name": "größe ✓"},
    "seconds": 0.25,
    "none": None,
}


def fill(directory: Path) -> None:
    (directory / "artifact").mkdir()
    (directory / "artifact" / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    (directory / "model.onnx").write_bytes(b"onnx" * 100)


def commit(store: Store, key: str = KEY) -> Entry:
    with store.draft() as draft:
        fill(draft)
        return store.commit(draft, key, FACTS)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "a run, naïve ✓")
    with store.lock():
        yield store


def script(body: str, *arguments: object) -> list[str]:
    """A command that runs `body` with the names of this module at hand, in a process without torch."""
    preamble = (
        "import os, resource, signal, sys, time\n"
        "from pathlib import Path\n"
        "from compressor.run.store import Store, content_key\n"
        "from compressor.errors import CompressorError\n"
        f"KEY, FACTS = {KEY!r}, {FACTS!r}\n"
        "def fill(directory):\n"
        "    (directory / 'artifact').mkdir()\n"
        "    (directory / 'artifact' / 'model.safetensors').write_bytes(bytes(range(256)) * 40)\n"
        "    (directory / 'model.onnx').write_bytes(b'onnx' * 100)\n"
    )
    return [sys.executable, "-c", preamble + body, *map(str, arguments)]


def test_committed_entry_is_found_with_its_files_and_facts(store: Store):
    committed = commit(store)
    found = store.find(KEY)
    assert found == committed
    assert found.facts == FACTS
    assert contents(found.directory).keys() == {"manifest.json", "model.onnx", "artifact/model.safetensors"}


def test_facts_come_back_from_commit_as_they_will_be_read(store: Store):
    with store.draft() as draft:
        fill(draft)
        committed = store.commit(draft, KEY, {"shape": (1, 2), "by_number": {10: "a", 9: "b"}})
    assert committed.facts == {"shape": [1, 2], "by_number": {"10": "a", "9": "b"}}
    assert store.find(KEY) == committed


def test_key_that_was_never_committed_is_not_found(store: Store):
    assert store.find(OTHER_KEY) is None
    assert store.peek(OTHER_KEY) is None


@pytest.mark.parametrize("key", ["", "../escape", "A" * 64, KEY + "/.."])
def test_key_that_is_no_hash_is_refused(store: Store, key: str):
    with pytest.raises(ValueError, match="hexadecimal"):
        store.find(key)


def test_valid_entry_is_never_overwritten(store: Store):
    first = commit(store)
    before = contents(first.directory)
    with store.draft() as draft:
        (draft / "model.onnx").write_bytes(b"another result")
        second = store.commit(draft, KEY, {"seconds": 9.0})
    assert second == first
    assert contents(first.directory) == before
    assert not list((store.root / "drafts").iterdir())


def test_file_names_with_spaces_and_any_bytes_are_kept(store: Store):
    names = ["a b.txt", "größe ✓.onnx", os.fsdecode(b"latin-\xff.bin")]
    with store.draft() as draft:
        for name in names:
            (draft / name).write_text(name, errors="surrogateescape")
        store.commit(draft, KEY, {})
    found = store.find(KEY)
    assert found is not None
    assert contents(found.directory).keys() == {*names, "manifest.json"}


def test_large_file_is_hashed_in_chunks(store: Store):
    with store.draft() as draft:
        with (draft / "model.onnx").open("wb") as stream:
            stream.truncate(64 << 20)
        tracemalloc.start()
        store.commit(draft, KEY, {})
        found = store.find(KEY)
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert found is not None
    assert peak_bytes < 4 << 20


def flip_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def append(file: Path, more: bytes) -> None:
    file.write_bytes(file.read_bytes() + more)


def replace_by_link(file: Path) -> None:
    """Same bytes, behind a link."""
    target = file.parent.parent.parent / "elsewhere"
    file.rename(target)
    file.symlink_to(target)


def claim_another_key(directory: Path) -> None:
    """A manifest whole in itself, of another entry."""
    manifest = json.loads((directory / "manifest.json").read_text())
    body = {"key": OTHER_KEY, "files": manifest["files"], "facts": manifest["facts"]}
    text = json.dumps({**body, "sha256": content_key(body)}, indent=1, sort_keys=True) + "\n"
    (directory / "manifest.json").write_text(text)


def replace_directory_by_link(directory: Path) -> None:
    elsewhere = directory.parent.parent / "elsewhere"
    directory.rename(elsewhere)
    directory.symlink_to(elsewhere)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a flipped bit in the payload": lambda entry: flip_bit(entry / "artifact" / "model.safetensors"),
    "a flipped bit in the manifest": lambda entry: flip_bit(entry / "manifest.json"),
    "a space more in the manifest": lambda entry: append(entry / "manifest.json", b" "),
    "the manifest of another key": claim_another_key,
    "a manifest that is not JSON": lambda entry: (entry / "manifest.json").write_bytes(b"\xff{"),
    "a manifest that is a list": lambda entry: (entry / "manifest.json").write_text("[]"),
    "a manifest nested without end": lambda entry: (entry / "manifest.json").write_text('{"files":' * 100_000),
    "no manifest": lambda entry: (entry / "manifest.json").unlink(),
    "a truncated file": lambda entry: os.truncate(entry / "model.onnx", 10),
    "a missing file": lambda entry: (entry / "model.onnx").unlink(),
    "an additional file": lambda entry: (entry / "artifact" / "notes.txt").write_text("x"),
    "a link in place of a file": lambda entry: replace_by_link(entry / "model.onnx"),
    "an additional link": lambda entry: (entry / "link").symlink_to("/etc/hostname"),
    "a directory behind a link": lambda entry: replace_by_link(entry / "artifact"),
    "a pipe": lambda entry: os.mkfifo(entry / "pipe"),
    "an entry behind a link": replace_directory_by_link,
    "a file in place of the entry": lambda entry: (entry.rename(entry.parent / "x"), entry.write_text("x")),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_entry_is_moved_aside_and_made_anew(
    store: Store, damage: Callable[[Path], object], caplog: pytest.LogCaptureFixture
):
    entry, other = commit(store), commit(store, OTHER_KEY)
    whole = contents(entry.directory)
    damage(entry.directory)

    assert store.peek(KEY) is None
    assert os.path.lexists(entry.directory)  # looking changes nothing
    with caplog.at_level(logging.WARNING, logger="compressor"):
        assert store.find(KEY) is None
    assert not os.path.lexists(entry.directory)
    (aside,) = (store.root / "quarantine").iterdir()
    assert str(aside) in caplog.text

    assert store.find(OTHER_KEY) == other
    assert commit(store) == entry
    assert contents(entry.directory) == whole


def test_draft_with_a_link_is_not_committed(store: Store, tmp_path: Path):
    outside = tmp_path / "outside"
    outside.write_text("weights")
    for link in (Path.symlink_to, Path.hardlink_to):
        with store.draft() as draft:
            link(draft / "model.onnx", outside)
            with pytest.raises(StageError, match=r"model\.onnx is a .*link"):
                store.commit(draft, KEY, {})
    assert store.find(KEY) is None


KILLED_COMMITS = """
def commit(root, steps_left):
    '''Commit once; the process is killed before the step with the number `steps_left`.'''
    def step():
        nonlocal steps_left
        if steps_left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        steps_left -= 1
    fsync = os.fsync
    def counted_fsync(descriptor):
        step()
        fsync(descriptor)
        step()
    os.fsync = counted_fsync
    watched = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"}
    sys.addaudithook(lambda event, _: step() if event in watched else None)
    store = Store(root)
    with store.lock(), store.draft() as draft:
        fill(draft)
        store.commit(draft, KEY, FACTS)
        store.remember("data", FACTS)

parent, killed = Path(sys.argv[1]), True
steps = 0
while killed:
    child = os.fork()
    if child == 0:
        commit(parent / str(steps), steps)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), status
    killed = status != 0
    steps += 1
print(steps - 1)
"""


def test_commit_killed_at_any_step_leaves_a_whole_entry_or_none_and_can_be_repeated(tmp_path: Path):
    done = subprocess.run(script(KILLED_COMMITS, tmp_path), capture_output=True, text=True, check=True)
    kills = int(done.stdout)
    assert kills > 30  # the script counts opens, renames and both sides of every fsync
    reference = contents(tmp_path / str(kills) / "stages")  # the one that was left alive
    found_after_kill = set()
    for steps in range(kills):
        store = Store(tmp_path / str(steps))
        visible = list((store.root / "stages").iterdir()) if (store.root / "stages").exists() else []
        assert all(store.peek(entry.name) for entry in visible)
        assert store.recall("data") in (None, FACTS)
        with store.lock():
            found_after_kill.add(store.find(KEY) is not None)
            assert commit(store).facts == FACTS
            store.remember("data", FACTS)
        assert contents(store.root / "stages") == reference
        assert not (store.root / "quarantine").exists()
        assert not list((store.root / "drafts").iterdir())
    assert found_after_kill == {True, False}


WATCHED_COMMIT = """
events = []
fsync = os.fsync
def watched_fsync(descriptor):
    fsync(descriptor)
    events.append(os.fstat(descriptor).st_ino)
os.fsync = watched_fsync
store = Store(Path(sys.argv[1]))
with store.lock(), store.draft() as draft:
    fill(draft)
    (draft / 'artifact' / 'nested').mkdir()
    sys.addaudithook(lambda event, _: events.append(event) if event == 'os.rename' else None)
    entry = store.commit(draft, KEY, FACTS)
renamed = events.index('os.rename')
everything = {path.stat().st_ino for path in (entry.directory, *entry.directory.rglob('*'))}
print(everything <= set(events[:renamed]), entry.directory.parent.stat().st_ino in events[renamed:])
"""


def test_every_file_and_directory_is_on_the_disk_before_the_entry_becomes_visible(tmp_path: Path):
    """What a power loss would show, which no signal can."""
    done = subprocess.run(script(WATCHED_COMMIT, tmp_path / "run"), capture_output=True, text=True, check=True)
    assert done.stdout == "True True\n"


COMMIT_MANY = """
store = Store(Path(sys.argv[1]))
print("started", flush=True)
with store.lock():
    for seed in range(20):
        key = content_key({"seed": seed})
        if store.find(key) is None:
            with store.draft() as draft:
                fill(draft)
                (draft / "large").write_bytes(bytes([seed]) * 1_000_000)
                store.commit(draft, key, {"seed": seed})
"""


def test_run_killed_at_random_times_ends_with_the_bytes_of_an_undisturbed_run(tmp_path: Path):
    moments = random.Random(0)
    for _ in range(6):
        with subprocess.Popen(script(COMMIT_MANY, tmp_path / "killed"), stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(moments.uniform(0, 0.05))
            process.kill()
    for name in ("killed", "undisturbed"):
        subprocess.run(script(COMMIT_MANY, tmp_path / name), check=True, stdout=subprocess.DEVNULL)
    assert contents(tmp_path / "killed" / "stages") == contents(tmp_path / "undisturbed" / "stages")
    assert not (tmp_path / "killed" / "quarantine").exists()


def test_atomic_write_killed_halfway_leaves_the_old_text_and_the_next_one_succeeds(tmp_path: Path):
    file = tmp_path / "report.json"
    write_atomically(file, "old")
    body = (
        "from compressor.system.disk import write_atomically\n"
        "os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_atomically(Path(sys.argv[1]), 'new')\n"
    )
    assert subprocess.run(script(body, file), check=False).returncode == -signal.SIGKILL
    assert file.read_text() == "old"
    write_atomically(file, "new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["new"]


def test_atomic_write_does_not_follow_a_planted_link(tmp_path: Path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for name in ("report.json", ".report.json.part"):
        (tmp_path / name).symlink_to(victim)
    write_atomically(tmp_path / "report.json", "new")
    assert (tmp_path / "report.json").read_text() == "new"
    assert victim.read_text() == "precious"


HOLD = """
with Store(Path(sys.argv[1])).lock():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_second_process_is_told_who_holds_the_directory_and_gets_it_once_the_holder_is_killed(tmp_path: Path):
    store = Store(tmp_path / "run")
    with subprocess.Popen(script(HOLD, store.root), stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(LockedError, match=rf"process {holder.pid} on {socket.gethostname()}.* since 20\d\d-"):
            store.lock().__enter__()
        holder.kill()
        holder.wait()
        with store.lock():
            note = store.recall("holder")
    assert note["pid"] == os.getpid()


def test_note_of_a_killed_holder_alone_does_not_lock(tmp_path: Path):
    store = Store(tmp_path)
    store.remember("holder", {"pid": os.getpid(), "host": socket.gethostname(), "since": "2026-01-01"})
    with store.lock():
        pass


@pytest.mark.parametrize("note", ["", "[]", '{"pid": "1"}', "\xff", '{"pid":' * 100_000])
def test_unreadable_note_of_the_holder_still_gives_the_refusal(store: Store, note: str):
    (store.root / ".holder.json").write_text(note, encoding="latin-1")
    with pytest.raises(LockedError, match="another process"):
        Store(store.root).lock().__enter__()


def test_lock_is_free_again_after_an_error(tmp_path: Path):
    store = Store(tmp_path)
    with pytest.raises(KeyError), store.lock():
        raise KeyError
    with store.lock():
        pass


def test_lock_removes_drafts_of_killed_processes(tmp_path: Path):
    stale = tmp_path / "drafts" / "0123"
    stale.mkdir(parents=True)
    fill(stale)
    with Store(tmp_path).lock():
        assert not stale.exists()


@pytest.mark.parametrize("name", ["stages", "drafts", "quarantine"])
def test_directory_whose_parts_lead_elsewhere_is_refused(tmp_path: Path, name: str):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("x")
    root = tmp_path / "run"
    root.mkdir()
    (root / name).symlink_to(elsewhere)
    with pytest.raises(InputError, match=f"{name} must be a directory"):
        Store(root).lock().__enter__()
    assert (elsewhere / "precious").exists()


def test_draft_is_removed_when_its_work_fails(store: Store):
    with pytest.raises(FileNotFoundError), store.draft() as draft:
        (draft / "missing" / "model.onnx").write_bytes(b"x")
    assert not draft.exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB."""
    disk = tmp_path / "small disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "none", disk], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)  # a failed test may still hold a file


WRITERS: dict[str, Callable[[Path], object]] = {
    "plain": lambda directory: (directory / "model.onnx").write_bytes(bytes(5_000_000)),
    "safetensors": lambda directory: save_file({"w": torch.zeros(1_250_000)}, directory / "model.safetensors"),
    "torch": lambda directory: torch.save({"w": torch.zeros(1_250_000)}, directory / "model.pt"),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS.keys())
def test_full_disk_is_an_error_of_the_host_and_leaves_earlier_entries_whole(
    small_disk: Path, write: Callable[[Path], object]
):
    store = Store(small_disk / "run")
    with store.lock():
        entry = commit(store)
        store.remember("data", FACTS)
        with pytest.raises(HostError, match=r"bytes are free.*free some space") as raised, store.draft() as draft:
            write(draft)
        assert str(draft) in str(raised.value)
        del raised  # torch's writer, which the traceback holds, keeps its removed file open
        assert not draft.exists()
        assert store.find(KEY) == entry
        with pytest.raises(HostError, match="5,000,002 are needed"):
            store.remember("data", "x" * 5_000_000)
        assert store.recall("data") == FACTS
        assert commit(store, OTHER_KEY) == store.find(OTHER_KEY)  # the room is free again


def test_draft_of_a_killed_process_that_filled_the_disk_does_not_keep_the_next_run_out(small_disk: Path):
    stale = small_disk / "drafts" / "0123"
    stale.mkdir(parents=True)
    with pytest.raises(OSError, match="No space left"):
        WRITERS["plain"](stale)
    store = Store(small_disk)
    with store.lock():
        assert commit(store) == store.find(KEY)


def test_read_only_disk_is_an_error_of_the_host(small_disk: Path):
    store = Store(small_disk / "run")
    with store.lock():
        commit(store)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(HostError, match="directory that can be written"), store.lock():
        pass
    assert store.peek(KEY) is not None


def test_file_size_limit_is_an_error_of_the_host(tmp_path: Path):
    body = (
        "store = Store(Path(sys.argv[1]))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try:\n"
        "    with store.lock(), store.draft() as draft:\n"
        "        (draft / 'model.onnx').write_bytes(bytes(1_000_000))\n"
        "except CompressorError as error:\n"
        "    sys.exit(f'{type(error).__name__} {error}')\n"
    )
    done = subprocess.run(script(body, tmp_path), capture_output=True, text=True, check=False)
    assert done.stderr.startswith("HostError")
    assert "ulimit -f" in done.stderr
    assert not list((tmp_path / "drafts").iterdir())


def test_directory_of_another_user_is_an_error_of_the_host(tmp_path: Path):
    body = (
        "if os.getuid() == 0:\n"
        "    os.setuid(65534)\n"  # permissions do not bind root
        "try:\n"
        "    Store(Path(sys.argv[1]) / 'run').lock().__enter__()\n"
        "except CompressorError as error:\n"
        "    sys.exit(f'{type(error).__name__} {error}')\n"
    )
    (tmp_path / "closed").mkdir(mode=0o500)
    done = subprocess.run(script(body, tmp_path / "closed"), capture_output=True, text=True, check=False)
    assert done.stderr.startswith("HostError")
    assert "this user may read and write" in done.stderr


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), FileNotFoundError(errno.ENOENT, "no data", "x.npz")])
def test_error_that_is_not_the_hosts_passes_unchanged(tmp_path: Path, error: Exception):
    with pytest.raises(type(error)) as raised, host_errors(tmp_path):
        raise error
    assert raised.value is error


def test_content_key_depends_on_content_and_not_on_order():
    assert content_key({"a": 1, "b": {"c": [0.1, None], "d": "é"}}) == content_key(
        {"b": {"d": "é", "c": (0.1, None)}, "a": 1}
    )
    distinct = [{"a": 1}, {"a": 1.0}, {"a": "1"}, {"a": True}, {"b": 1}, {"a": [1]}, {"a": 1.0000000000000002}, {}]
    assert len({content_key(parts) for parts in distinct}) == len(distinct)


def test_content_key_stays_the_same_between_versions_so_that_stored_results_are_found():
    assert content_key({"a": 0.1, "b": "é"}) == "7ee1e4bf7c78a9fe1c166b3c50d7400ced16d4c3d8e5c6b891c912a90a31dbea"


@pytest.mark.parametrize("parts", [{"a": math.nan}, {"a": math.inf}, {"a": Path("x")}])
def test_content_key_refuses_what_has_no_canonical_json(parts: dict[str, object]):
    with pytest.raises((ValueError, TypeError)):
        content_key(parts)


OLD_PARTS = {
    "stage": "magnitude_pruning",
    "version": 1,
    "settings": {"pruning_ratio": 0.5, "recovery": {"epochs": 10, "rate": None}},
    "input": "a" * 64,
    "data": {"train": "1", "test": "2"},
    "libraries": {"torch": "2.13.0", "onnx": "1.23.2"},
    "seed": 0,
}


@pytest.mark.parametrize(
    ("change", "reasons"),
    [
        ({}, ()),
        ({"settings": {"pruning_ratio": 0.7, "recovery": {"epochs": 9, "rate": None}}},
         ("settings changed: pruning_ratio, recovery.epochs",)),
        ({"settings": {"pruning_ratio": 0.5, "recovery": {"epochs": 10}}}, ("settings changed: recovery.rate",)),
        ({"settings": {}}, ("settings changed: pruning_ratio, recovery.epochs, recovery.rate",)),
        ({"data": {"train": "1", "test": "3"}}, ("data changed: test",)),
        ({"libraries": {"torch": "2.14.0", "onnx": "1.23.2"}}, ("library torch 2.13.0 → 2.14.0",)),
        ({"input": "b" * 64}, ("an earlier stage runs",)),
        ({"seed": 1, "version": 2}, ("version changed: 1 → 2", "seed changed: 0 → 1")),
        ({"code": {"low_rank.py": "c"}}, ("code changed: low_rank.py",)),
        ({"stage": "low_rank", "seed": 1}, ("stage changed: 'magnitude_pruning' → 'low_rank'",)),
    ],
)  # fmt: skip
def test_reasons_to_run_a_step_again_are_named(change: dict[str, object], reasons: tuple[str, ...]):
    assert differences(OLD_PARTS, {**OLD_PARTS, **change}) == reasons


def test_store_needs_no_torch():
    subprocess.run(script("assert 'torch' not in sys.modules"), check=True)
