"""What distillation costs beside plain training: `python benchmarks/distillation_cost.py DATA_DIR WEIGHTS_FILE`.

Time: one process trains ResNet-8 for an epoch on the labels and from the soft labels of ResNet-56, in turns and with
the same augmentation; each round gives the ratio to plain training of that round, and every fourth round also that of
ResNet-56 run live. The second of two epochs is timed: reading the data once more to check that the soft labels belong
to it comes before the first.

Memory: processes of their own write soft labels of 1,000 classes and two views and distil
from them for one epoch, on data that lies on disk, at two sizes; the peak is that of memory which is not a mapped file.
"""

import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "pipelines")]  # the example's models and data

import cifar10
from publish import cpu, link, publish

from compressor.measure.latency import ratio_interval
from compressor.models.artifact import TorchModel
from compressor.records.environment import environment
from compressor.records.measurements import Latency
from compressor.references.reference import Reference
from compressor.stage import StageContext
from compressor.stages.distillation import Distillation
from compressor.stages.soft_labels import SoftLabels
from compressor.stages.training import Training
from compressor.task import Augmentation, Samples, Task
from compressor.text import figures

ROUNDS, SAMPLES, SIZES, CLASSES = 16, 2560, (5_000, 20_000), 1000
LIMIT = 1.05
"""What an epoch from soft labels may take of a plain one."""
STUDENT = Reference(factory="cifar10:resnet8")


@dataclass(frozen=True)
class OnDisk:
    """Images that stay in a file, (N, 3, 32, 32) uint8, until they are asked for."""

    pixels: np.memmap

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.from_numpy(self.pixels[index].astype(np.float32)) / 255, index % CLASSES


def main() -> None:
    """Measure, print and write the result; `memory SIZE FILE` is what this program asks of itself."""
    torch.set_num_threads(1)  # one core: the other may be busy
    if sys.argv[1] == "memory":
        print(peak_of(int(sys.argv[2]), Path(sys.argv[3])))
        return
    data_dir, weights_file = map(Path, sys.argv[1:])
    ratios = epoch_ratios(cifar10.task(data_dir), weights_file)
    memory = {size: peak_in_a_process(size) for size in SIZES}
    result = {
        "epoch_over_plain_epoch": ratios,
        "rounds": ROUNDS,
        "steps_per_epoch": SAMPLES // 128,
        "peak_anonymous_bytes_by_samples": memory,
        "soft_label_bytes_by_samples": {size: 2 * CLASSES * 2 * size for size in SIZES},
        "environment": environment(),
    }
    for name, found in ratios.items():
        low, high = found["interval_95"]
        found["within_limit"] = "met" if high <= LIMIT else "not met" if low > LIMIT else "undecided"
        print(
            f"epoch from {name} / plain epoch: {found['ratio']:.3f}, 95 % interval {low:.3f} to {high:.3f}; "
            f"at most {LIMIT}: {found['within_limit']}"
        )
    for size, peak in memory.items():
        print(f"{size} samples: peak of {peak / 1e6:.1f} MB, soft labels of {2 * CLASSES * 2 * size / 1e6:.0f} MB")
    publish("distillation_cost", "python benchmarks/distillation_cost.py DATA_DIR WEIGHTS_FILE", result, table)


def table(result: Mapping[str, Any]) -> str:
    """The result in two sentences: what an epoch takes beside a plain one, and how memory grows with the data."""
    stored, live = (interval_speed(result["epoch_over_plain_epoch"][name]) for name in ("soft_labels", "live_teacher"))
    few, many = result["peak_anonymous_bytes_by_samples"].items()
    facts = result["environment"]
    return (
        f"An epoch that learns from soft labels is {stored} than one that learns from labels alone. An epoch with "
        f"ResNet-56 as a live teacher is {live}. Peak memory is {figures.size(few[1])} with {int(few[0]):,} samples "
        f"and {figures.size(many[1])} with {int(many[0]):,}.\n\n<sub>`{result['command']}`, {result['date']}: "
        f"ResNet-8, one thread, {result['rounds']} rounds. {cpu(facts)}, torch {facts['versions']['torch']}; all of "
        f"it in {link('distillation_cost')}.</sub>"
    )


def interval_speed(found: Mapping[str, Any]) -> str:
    """A ratio of times with its interval, in words."""
    high, low = (1 / end for end in found["interval_95"])
    return figures.speed(Latency(p50_ms=1.0, ratio=1 / found["ratio"], ratio_low=low, ratio_high=high))


def epoch_ratios(task: Task, weights_file: Path) -> dict[str, Mapping[str, object]]:
    """Time of an epoch over that of a plain one, by what the student learns from."""
    first = Samples(tuple(part[:SAMPLES] for part in task.train.inputs), task.train.targets[:SAMPLES])
    task = replace(task, train=first)
    teacher = TorchModel.build(Reference(factory="cifar10:resnet56", weights_file=str(weights_file)), seed=0)
    student = TorchModel.build(STUDENT, seed=0)
    with tempfile.TemporaryDirectory() as name:
        labeled = SoftLabels(views=2).apply(teacher, task, context(teacher, Path(name), lambda: None))
        plain, distillation = Training(epochs=2), Distillation(student=STUDENT, epochs=2)
        ways = {
            "plain": lambda tick: plain.apply(student, task, context(teacher, Path(name), tick)),
            "soft_labels": lambda tick: distillation.apply(labeled, task, context(teacher, Path(name), tick)),
            "live_teacher": lambda tick: distillation.apply(teacher, task, context(teacher, Path(name), tick)),
        }
        rounds = []
        for position in range(ROUNDS):
            names = sorted(name for name in ways if name != "live_teacher" or position % 4 == 0)
            names = names[::-1] if position % 2 else names
            rounds.append({name: epoch_seconds(ways[name]) for name in names})
    found = {}
    for name in ("soft_labels", "live_teacher"):
        ratios = [one[name] / one["plain"] for one in rounds if name in one]
        interval = ratio_interval([math.log(ratio) for ratio in ratios])
        found[name] = {"ratio": interval.value, "interval_95": [interval.low, interval.high], "ratios": ratios}
    return found


def context(teacher: TorchModel, work_dir: Path, tick: Callable[[], None]) -> StageContext:
    """A context that calls `tick` at the end of each epoch."""
    return StageContext(teacher, torch.device("cpu"), 0, work_dir, lambda _line: None, lambda _finding: tick())


def epoch_seconds(train: Callable[[Callable[[], None]], object]) -> float:
    """Time of the second epoch of `train`."""
    ends: list[float] = []
    train(lambda: ends.append(time.perf_counter()))
    return ends[1] - ends[0]


def peak_in_a_process(size: int) -> int:
    """Peak memory of a process that distils from `size` samples, in bytes."""
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "pixels"
        pixels = np.memmap(file, np.uint8, mode="w+", shape=(size, 3, 32, 32))
        pixels[:] = np.random.default_rng(0).integers(0, 256, pixels.shape, dtype=np.uint8)
        pixels.flush()
        command = [sys.executable, __file__, "memory", str(size), str(file)]
        environ = {**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "0"}
        return int(subprocess.run(command, check=True, capture_output=True, text=True, env=environ).stdout)


def peak_of(size: int, file: Path) -> int:
    """Write soft labels and distil from them for an epoch; return the peak of anonymous memory, in bytes."""
    split = OnDisk(np.memmap(file, np.uint8, mode="r", shape=(size, 3, 32, 32)))
    few = Samples((torch.rand(4, 3, 32, 32),), torch.arange(4))
    task = Task(split, few, few, few, (torch.rand(2, 3, 32, 32),), augmentation=Augmentation(3, cifar10.crop_and_flip))
    student = Reference(factory="cifar10:resnet8", classes=CLASSES)
    model = TorchModel.build(student, seed=0)
    peak, over = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.02):
            status = Path("/proc/self/status").read_text()
            peak = max(peak, int(status.partition("RssAnon:")[2].split()[0]) * 1024)

    watcher = threading.Thread(target=watch)
    watcher.start()
    with tempfile.TemporaryDirectory() as name:
        labeled = SoftLabels(views=2).apply(model, task, context(model, Path(name), lambda: None))
        Distillation(student=student, epochs=1).apply(labeled, task, context(model, Path(name), lambda: None))
    over.set()
    watcher.join()
    return peak


if __name__ == "__main__":
    main()
