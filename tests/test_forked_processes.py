"""What tests start by `processes` ends, prints and dies as an interpreter of its own does."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from processes import run_python, start_python

SELF = (
    "import json, os, sys\n"
    "json.dump({'arguments': sys.argv, 'directory': os.getcwd(), 'environment': dict(os.environ), "
    "'main': __name__, 'torch': 'torch' in sys.modules}, sys.stdout)"
)


def test_a_process_has_its_own_arguments_directory_and_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("OF_THE_TESTS", "1")
    found = json.loads(run_python("-c", SELF, "a b", cwd=tmp_path, torch=False, OF_THIS="2").stdout)
    assert (found["arguments"], found["directory"]) == (["-c", "a b"], str(tmp_path))
    assert (found["environment"]["OF_THE_TESTS"], found["environment"]["OF_THIS"]) == ("1", "2")
    assert "OPENBLAS_NUM_THREADS" not in found["environment"]
    assert (found["main"], found["torch"]) == ("__main__", False)


@pytest.mark.parametrize(
    "code",
    [
        "print('done')",
        "import sys; sys.exit(3)",
        "import sys; sys.exit('said')",
        "1 / 0",
        "import atexit; atexit.register(print, 'last'); print('first')",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "import os, signal; os.kill(os.getpid(), signal.SIGINT)",
        "import threading; threading.Timer(0.05, print, ['late']).start()",
        "import missing_module",
    ],
)
def test_a_process_ends_and_prints_as_an_interpreter_does(code, tmp_path):
    alone = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    forked = run_python("-c", code, cwd=tmp_path, torch=False)
    assert (forked.returncode, forked.stdout) == (alone.returncode, alone.stdout)
    assert forked.stderr.splitlines()[-1:] == alone.stderr.splitlines()[-1:]


def test_output_that_cannot_be_written_ends_a_process_as_it_ends_an_interpreter():
    command = ["-c", "print('lost')"]
    with Path("/dev/full").open("w") as full:
        alone = subprocess.run([sys.executable, *command], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        forked = run_python(*command, stdout=full.fileno(), torch=False)
    assert forked.returncode == alone.returncode > 0
    assert "No space left on device" in forked.stderr


def test_a_script_and_a_module_find_what_lies_beside_them(tmp_path):
    (tmp_path / "beside.py").write_text("FOUND = 'found'")
    (tmp_path / "main.py").write_text("import sys\nfrom beside import FOUND\nprint(FOUND, *sys.argv[1:])")
    for arguments in ([tmp_path / "main.py"], ["-m", "main"]):
        assert run_python(*arguments, "x", cwd=tmp_path, torch=False).stdout == "found x\n"


def test_processes_run_side_by_side_and_take_signals():
    wait = "import sys, time; print('started', file=sys.stderr, flush=True); time.sleep(60)"
    children = [start_python("-c", wait, torch=False) for _ in range(3)]
    for child in children:
        assert child.stderr.readline() == "started\n"
    assert run_python("-c", "print('meanwhile')", torch=False).stdout == "meanwhile\n"
    for number, child in zip((signal.SIGTERM, signal.SIGKILL, signal.SIGINT), children, strict=True):
        child.send_signal(number)
    assert [child.finish().returncode for child in children] == [-signal.SIGTERM, -signal.SIGKILL, -signal.SIGINT]
