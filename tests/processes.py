"""Python processes for the tests, forked from one that has imported torch: that costs seconds of CPU each time.

A forked process has its own arguments, directory, environment, standard streams, signals and exit code. It shares
the seed of hashes with all others of its server. Where a test is about that, or about the start of the command, it
starts an interpreter.
"""

import atexit
import contextlib
import functools
import gc
import json
import logging
import os
import runpy
import selectors
import socket
import subprocess
import sys
import tempfile
import types
import warnings
from importlib import import_module
from pathlib import Path
from typing import IO, final

READERS = ("compressor.config.pipeline_file", "compressor.report.page.html", "compressor.run.store", "onnx")
"""What a command imports that reads files and answers: no torch."""
TRAINERS = (
    *READERS,
    "accelerate",
    "compressor.config.chain",
    "compressor.distillation.losses",
    "compressor.export.operators",
    "compressor.models.edits",
    "compressor.models.module_factory",
    "compressor.models.soft_label_file",
    "compressor.pruning.guesses",
    "compressor.training.descent",
    "compressor.training.sampling",
    "onnxscript",
    "sklearn.datasets",
    "torch_pruning",
)
"""What a run imports, but not onnxruntime, which starts a thread, nor what reads the environment when imported."""


@final
class Child:
    """A forked process; what it writes to its standard error can be read while it runs."""

    def __init__(self, status: IO[str], printed: IO[str], stderr: IO[str]) -> None:
        self._status, self._printed, self.stderr = status, printed, stderr
        self.pid = int(status.readline())

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def finish(self) -> subprocess.CompletedProcess[str]:
        """Wait for the end of the process; the exit code is minus the number of the signal that ended it."""
        with self._status, self._printed, self.stderr:
            errors = self.stderr.read()
            code = int(self._status.readline())
            self._printed.seek(0)
            return subprocess.CompletedProcess([], code, self._printed.read(), errors)


def run_two(*arguments: str | Path, **options) -> list[subprocess.CompletedProcess[str]]:
    """Run two processes of one program, which find each other as those of torchrun do; the main one comes first."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    ranks = [{"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    return [child.finish() for child in [start_python(*arguments, **group, **rank, **options) for rank in ranks]]


def run_python(*arguments: str | Path, **options) -> subprocess.CompletedProcess[str]:
    """Run to its end what `start_python` starts."""
    return start_python(*arguments, **options).finish()


def start_python(
    *arguments: str | Path, cwd: Path | None = None, stdout: int | None = None, torch: bool = True, **environment: str
) -> Child:
    """Start what `python ARGUMENTS` does, with `environment` added to that of the tests.

    It prints to the descriptor `stdout`, if there is one. `torch` says whether it finds torch imported.
    """
    request = {
        "arguments": list(map(str, arguments)),
        "cwd": str(cwd or Path.cwd()),
        "environment": {**os.environ, **environment},
    }
    printed = tempfile.TemporaryFile("w+")  # noqa: SIM115  # the child's owner reads and closes it
    errors, write_errors = os.pipe()
    status, write_status = os.pipe()
    streams = [printed.fileno() if stdout is None else stdout, write_errors, write_status]
    socket.send_fds(_server(TRAINERS if torch else READERS), [json.dumps(request).encode()], streams)
    os.close(write_errors)
    os.close(write_status)
    return Child(os.fdopen(status), printed, os.fdopen(errors))


@functools.cache
def _server(modules: tuple[str, ...]) -> socket.socket:
    """Start a process that imports `modules` and serves requests until this process ends."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["OPENBLAS_NUM_THREADS"] = "1"  # it starts threads when it is imported, and they do not survive a fork
    with theirs:
        command = [sys.executable, __file__, str(theirs.fileno()), *modules]
        server = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
    atexit.register(server.wait)
    atexit.register(ours.close)
    return ours


def _serve(requests: socket.socket) -> dict | None:
    """Fork a process for each request. Returns the request in the forked one, and None here when no more can come."""
    with selectors.DefaultSelector() as selector:
        selector.register(requests, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.data:
                    selector.unregister(key.fileobj)
                    _report(key.fd, *key.data)
                    continue
                message, streams, *_ = socket.recv_fds(requests, 1 << 20, 3)
                if not message:
                    return None
                pid = os.fork()
                if pid == 0:
                    _take(*streams)
                    return json.loads(message)
                stdout, stderr, status = streams
                os.close(stdout)
                os.close(stderr)
                os.write(status, f"{pid}\n".encode())
                selector.register(os.pidfd_open(pid), selectors.EVENT_READ, data=(pid, status))


def _report(process: int, pid: int, status: int) -> None:
    """Write to `status` how the process ended."""
    _, how = os.waitpid(pid, 0)
    os.write(status, f"{os.waitstatus_to_exitcode(how)}\n".encode())
    os.close(status)
    os.close(process)


def _take(stdout: int, stderr: int, status: int) -> None:
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    for stream in (stdout, stderr, status):
        os.close(stream)


def _become(arguments: list[str], cwd: str, environment: dict[str, str]) -> None:
    """Do what `python ARGUMENTS` does."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    if "torch" in sys.modules and "OMP_NUM_THREADS" in environment:
        sys.modules["torch"].set_num_threads(int(environment["OMP_NUM_THREADS"]))
    sys.path[:1] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    match arguments:
        case ["-c", code, *rest]:
            sys.argv, sys.path = ["-c", *rest], ["", *sys.path]
            sys.modules["__main__"] = main = types.ModuleType("__main__")
            exec(code, vars(main))
        case ["-m", module, *rest]:
            sys.argv, sys.path = [module, *rest], [cwd, *sys.path]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case [script, *rest]:
            sys.argv, sys.path = [script, *rest], [str(Path(script).parent), *sys.path]
            runpy.run_path(script, run_name="__main__")


def _export() -> None:
    """Export once: torch makes its tables then, which costs more CPU than all its imports."""
    import torch  # noqa: PLC0415  # not every server has it
    import tqdm  # noqa: PLC0415

    from compressor.export.operator_table import share_operator_table  # noqa: PLC0415

    logging.disable(logging.WARNING)  # that torchvision is missing
    monitor_interval, tqdm.tqdm.monitor_interval = tqdm.tqdm.monitor_interval, 0  # no thread
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 3), torch.nn.BatchNorm2d(1), torch.nn.ReLU()).eval()
    axes = ({0: torch.export.Dim.DYNAMIC},)
    with share_operator_table(), warnings.catch_warnings(action="ignore"):
        program = torch.export.export(network, (torch.ones(2, 1, 8, 8),), dynamic_shapes=axes)
        torch.onnx.export(program, dynamo=True, opset_version=20, verbose=False)
    torch.set_num_threads(threads)
    tqdm.tqdm.monitor_interval = monitor_interval
    logging.disable(logging.NOTSET)


def _leave(codes: list[int]) -> None:
    """End with the code that is known, and leave it to the system to free what torch has made: half a second."""
    with contextlib.suppress(OSError):  # then the interpreter says so
        sys.stdout.flush()
        sys.stderr.flush()
        for code in codes:
            os._exit(code)


def main(number: int, modules: list[str]) -> None:
    """Serve requests that come at the descriptor `number`; in a forked process, carry one out."""
    codes: list[int] = []
    atexit.register(_leave, codes)  # first, so that it is called last
    for module in modules:
        import_module(module)
    if "torch" in sys.modules:
        _export()
    gc.collect()
    gc.freeze()  # no child looks for garbage in what it did not make
    if len(list(Path("/proc/self/task").iterdir())) > 1:
        msg = "the server must have one thread, as no other survives a fork"
        raise RuntimeError(msg)
    with socket.socket(fileno=number) as requests:
        request = _serve(requests)
    if request is None:
        return
    try:
        _become(**request)
        codes.append(0)
    except SystemExit as error:
        codes.append(error.code if isinstance(error.code, int) else int(error.code is not None))
        raise


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
