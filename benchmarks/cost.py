"""What each stage costs, and how that grows with the data: `python benchmarks/cost.py MNIST_DIR`.

Runs the chain of `cost.yaml`, one epoch of each training, on 12,500, 25,000 and 50,000 images in turns, each time in a
new process with one thread. Wall time of each stage and peak memory of the process; the smallest of three turns, as
other work on the machine only ever adds.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from publish import cpu, link, publish

from compressor.records.environment import environment
from compressor.report.json import read_report

ROOT = Path(__file__).parents[1]
IMAGES, TURNS = (12_500, 25_000, 50_000), 3
_LEAST_SHOWN = 0.1


def main() -> None:
    """Measure, then print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("mnist_dir", type=Path)
    data_dir = parser.parse_args().mnist_dir.resolve()
    turns = [{images: cost(data_dir, images) for images in IMAGES} for _ in range(TURNS)]
    result = {
        "images": IMAGES,
        "turns": [[turn[images] for images in IMAGES] for turn in turns],
        "environment": environment(),
    }
    publish("cost", "python benchmarks/cost.py MNIST_DIR", result, table)


def cost(data_dir: Path, images: int) -> dict[str, Any]:
    """Seconds of each stage and the peak memory of a run on so many images."""
    with tempfile.TemporaryDirectory() as runs:
        settings = ["--set", f"task.data_dir={data_dir}", "--set", f"task.images={images}"]
        process = subprocess.Popen(
            [sys.executable, "-m", "compressor", "run", "benchmarks/cost.yaml", "--runs", runs, *settings],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), "pipelines"])},
            stdout=subprocess.DEVNULL,
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            msg = f"compress run benchmarks/cost.yaml ended with {process.returncode}"
            raise RuntimeError(msg)
        report = read_report(Path(runs) / "cost" / "report.json")
    steps = (*report.rows, *report.preparations)
    return {"seconds": {step.stage: step.seconds for step in steps}, "peak_bytes": usage.ru_maxrss * 1024}


def table(result: Mapping[str, Any]) -> str:
    """The result as Markdown: seconds and memory, and what they grow by when the data doubles."""
    images, turns = result["images"], result["turns"]
    stages = list(turns[0][0]["seconds"])
    rows = [[f"{stage}, s", *least(turns, lambda run, stage=stage: run["seconds"][stage])] for stage in stages]
    rows.append(["peak memory, MB", *least(turns, lambda run: run["peak_bytes"] / 1e6)])
    lines = [
        f"| one thread | {' | '.join(f'{count:,} images' for count in images)} | twice the data |",
        f"|---|{'--:|' * (len(images) + 1)}",
    ]
    for name, *values in (row for row in rows if max(row[1:]) >= _LEAST_SHOWN):
        growth = (values[-1] / values[0]) ** (1 / (len(values) - 1))
        lines.append(f"| {name} | {' | '.join(f'{value:.1f}' for value in values)} | {growth:.2f}x |")
    spread = max(
        statistics.stdev(column) / statistics.fmean(column)
        for column in ([sum(turn[i]["seconds"].values()) for turn in turns] for i in range(len(images)))
    )
    facts = result["environment"]
    lines += [
        "",
        f"<sub>`{result['command']}`, {result['date']}: MNIST, LeNet-5, one epoch of each training; the smallest of "
        f"{len(turns)} turns, whose sums spread by up to {100 * spread:.0f} % (standard deviation). {facts['cores']} "
        f"cores of {cpu(facts)}, torch {facts['versions']['torch']}; all of it in {link('cost')}.</sub>",
    ]
    return "\n".join(lines)


def least(turns: Sequence[Sequence[Mapping[str, Any]]], figure: Any) -> list[float]:
    """The smallest of a figure over the turns, for each number of images."""
    return [min(figure(turn[i]) for turn in turns) for i in range(len(turns[0]))]


if __name__ == "__main__":
    main()
