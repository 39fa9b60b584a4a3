"""What commands cost before they do their work: `python benchmarks/startup.py RUN_DIRECTORY PIPELINE [--set …]`.

Prints and writes the CPU time of the commands that answer at once, whether they import torch, and the time that a run
takes beyond its latency session when the store already has every stage. The pipeline must have been run before.
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from publish import publish

from compressor.records.environment import environment

REPEATS = 5
PROBE = """
import atexit, sys
from compressor.cli.main import main
atexit.register(lambda: print("torch" in sys.modules, file=sys.stderr))
main()
"""


def cost(arguments: list[str]) -> tuple[float, float, bool]:
    """CPU seconds and wall seconds of one `compress` command, and whether torch was imported."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    command = [sys.executable, "-c", PROBE, *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return cpu, wall, finished.stderr.splitlines()[-1] == "True"


def main() -> None:
    """Measure, print and write the result."""
    directory, pipeline, *overrides = sys.argv[1:]
    runs = str(Path(directory).parent)
    commands = {
        "--help": ["--help"],
        "stages": ["stages"],
        "report": ["report", directory],
        "check": ["check", pipeline, "--runs", runs, *overrides],
    }
    result: dict[str, object] = {}
    for name, arguments in commands.items():
        costs = [cost(arguments) for _ in range(REPEATS)]
        seconds = [cpu for cpu, _, _ in costs]
        imports_torch = any(torch for _, _, torch in costs)
        result[name] = {
            "cpu_seconds": statistics.median(seconds),
            "cpu_seconds_range": [min(seconds), max(seconds)],
            "imports_torch": imports_torch,
        }
        print(f"compress {name}: {statistics.median(seconds):.2f} s of CPU, torch imported: {imports_torch}")
    beyond = []
    for _ in range(REPEATS):
        _, wall, _ = cost(["run", pipeline, "--runs", runs, *overrides])
        report = json.loads((Path(directory) / "report.json").read_text())
        if not all(row["reused"] for row in report["rows"]):
            sys.exit("the pipeline must be in the store: run it once before")
        beyond.append(wall - report["latency_session"]["seconds"])
    result["cached run"] = {
        "seconds_beyond_latency_session": statistics.median(beyond),
        "seconds_range": [min(beyond), max(beyond)],
    }
    print(f"cached run: {statistics.median(beyond):.2f} s beyond its latency session")
    command = "python benchmarks/startup.py RUN_DIRECTORY PIPELINE"
    publish("startup", command, {**result, "environment": environment()})


if __name__ == "__main__":
    main()
