"""What `compress bench` says of the demo's first and last model: `python benchmarks/bench.py runs/digits`."""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from publish import cpu, link, publish

from compressor.records.benchmark import Benchmark
from compressor.report.benchmark_tables import to_table
from compressor.report.json import read_report

COMMAND = "compress bench teacher.onnx int8.onnx --batch-size 1 --batch-size 8"


def main() -> None:
    """Time the two files, then print and write what was found."""
    directory = Path(sys.argv[1])
    rows = read_report(directory / "report.json").rows
    with tempfile.TemporaryDirectory() as name:
        for row, file in ((rows[0], "teacher.onnx"), (rows[-1], "int8.onnx")):
            shutil.copyfile(directory / row.model_file, Path(name) / file)
        command = [sys.executable, "-m", "compressor", *COMMAND.split()[1:], "--json"]
        found = subprocess.run(command, cwd=name, check=True, capture_output=True, text=True)
    publish("bench", "python benchmarks/bench.py runs/digits", json.loads(found.stdout), table)


def table(result: Mapping[str, Any]) -> str:
    """What the command prints, and where."""
    found = Benchmark.model_validate({name: part for name, part in result.items() if name not in ("command", "date")})
    facts = found.environment
    source = (
        f"<sub>`{result['command']}`, {result['date']}: {facts['cores']} cores of {cpu(facts)}, load average "
        f"{facts['load_average'][0]:.1f}; onnxruntime {facts['versions']['onnxruntime']}; all of it in "
        f"{link('bench')}.</sub>"
    )
    return f"```\n$ {COMMAND}\n{to_table(found)}\n```\n\n{source}"


if __name__ == "__main__":
    main()
