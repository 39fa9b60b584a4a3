"""Goals instead of ratios: the smallest cut with which a measured quantity is what was asked."""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

from torch import nn

from compressor.errors import StageError
from compressor.export.to_onnx import to_onnx
from compressor.measure.latency import time_models
from compressor.models.artifact import OnnxModel
from compressor.onnx_files.facts import count_parameters
from compressor.onnx_files.macs import count_macs
from compressor.onnx_files.reading import load_graph
from compressor.pruning.channels import Pruned
from compressor.pruning.groups import Removal
from compressor.task import Task

Quantity: TypeAlias = Literal["parameters", "macs", "size_bytes", "latency_ratio"]
"""Each as the report shows it for the model's ONNX form."""

Measure: TypeAlias = Callable[[nn.Module], float]

TIMING_SECONDS = 4.0
"""Most seconds that each model of a pair is timed."""
_TIMING_PRECISION = 0.01
"""Half width of the interval of a ratio at which its timing ends: 0.01 = 1 %."""
LARGEST = 1 - 1e-9
"""The ratio that leaves every group at its smallest."""
_RESOLUTION = 1e-9
"""Ratios nearer than this count as equal. Plans of two groups of 10,000 units each follow one another by 1e-8."""


@dataclass(frozen=True)
class Goal:
    """What a quantity must be after pruning: `parameters`, `macs` and `size_bytes` at most, `latency_ratio` at least.

    `latency_ratio` is the baseline's time divided by that of the pruned model: 2 = twice as fast.
    """

    quantity: Quantity
    asked: float

    def is_met(self, achieved: float) -> bool:
        """Whether `achieved` is what was asked or better."""
        return achieved >= self.asked if self.quantity == "latency_ratio" else achieved <= self.asked

    def is_met_closely(self, achieved: float) -> bool:
        """Whether the goal is met and no better search is possible: times have errors, counts do not."""
        tolerance = _TIMING_PRECISION if self.quantity == "latency_ratio" else 0
        return self.is_met(achieved) and abs(achieved - self.asked) <= tolerance * self.asked

    def __str__(self) -> str:
        bound = "at least" if self.quantity == "latency_ratio" else "at most"
        return f"{self.quantity} must be {bound} {self.show(self.asked)}"

    def show(self, value: float) -> str:
        """Write `value` with as many digits as mean something."""
        return f"{value:.3g}" if self.quantity == "latency_ratio" else f"{value:,.0f}"


@dataclass(frozen=True)
class GoalResult:
    """The pruned module that meets a goal, and the cut that it took."""

    pruned: Pruned
    removal: Removal
    pruning_ratio: float
    """What was asked of the allocation to get `removal`; `pruned.pruning_ratio` is the share that left."""
    achieved: float


def reach(
    goal: Goal,
    module: nn.Module,
    *,
    removal_of: Callable[[float], Removal],
    cut: Callable[[Removal], Pruned],
    measure: Measure,
    log: Callable[[str], None],
) -> GoalResult:
    """Find the smallest cut of `module` that meets `goal`, by bisection over the pruning ratio.

    `removal_of` takes a ratio in (0, 1); for a larger ratio it must give the same units and more. No removal is
    measured twice. The result met the goal when it was measured, and the next smaller removal did not. A
    `latency_ratio` ends the search sooner if it is at most 1 % above what was asked: times are measured no better than
    that.

    Raises StageError if `module` meets the goal uncut, or if the largest cut does not meet it; the message says what
    was found.
    """
    check_unmet(goal, measure(module))

    def cut_and_measure(pruning_ratio: float, removal: Removal) -> GoalResult:
        pruned = cut(removal)
        result = GoalResult(pruned, removal, pruning_ratio, measure(pruned.module))
        values = f"{goal.quantity} {goal.show(goal.asked)} asked, {goal.show(result.achieved)} achieved"
        log(f"{values} with {pruned.pruning_ratio:.1%} of the channels removed")
        return result

    best = cut_and_measure(LARGEST, _removing(removal_of(LARGEST)))
    check_reachable(goal, best.achieved)
    low, too_little = 0.0, _removing({})
    while best.pruning_ratio - low > _RESOLUTION and not goal.is_met_closely(best.achieved):
        middle = (low + best.pruning_ratio) / 2
        removal = _removing(removal_of(middle))
        if removal == too_little:
            low = middle
        elif removal == best.removal:
            best = replace(best, pruning_ratio=middle)
        elif goal.is_met((result := cut_and_measure(middle, removal)).achieved):
            best = result
        else:
            low, too_little = middle, removal
    return best


def check_unmet(goal: Goal, uncut: float) -> None:
    """Raise StageError if `uncut`, what the whole model achieves, meets the goal."""
    if goal.is_met(uncut):
        msg = f"{goal}, which the model meets uncut with {goal.show(uncut)}; ask for more, or leave out the pruning"
        raise StageError(msg)


def check_reachable(goal: Goal, best: float) -> None:
    """Raise StageError unless `best`, what the largest cut achieves, meets the goal."""
    if not goal.is_met(best):
        msg = (
            f"{goal}, but the best reachable is {goal.show(best)}, with every group of channels at its smallest; ask "
            "for less, protect fewer layers or lower round_to"
        )
        raise StageError(msg)


def _removing(removal: Removal) -> Removal:
    """`removal` without the groups that stay whole, so that equal cuts are equal removals."""
    return {path: units for path, units in removal.items() if units}


@contextmanager
def measure_of(quantity: Quantity, reference: nn.Module, task: Task) -> Iterator[Measure]:
    """Give a function that exports a module and measures `quantity`; its files are gone afterwards.

    Counts are for the first example input. For `latency_ratio` the module and `reference`, the baseline, take turns in
    one session on one thread. That ends when the ratio's interval is ± 1 %, or after `TIMING_SECONDS` for each model.
    """
    inputs = [tensor[:1].numpy() for tensor in task.example_inputs]
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)

        def export(module: nn.Module) -> OnnxModel:
            return to_onnx(module, task, directory / "candidate.onnx")

        def latency_ratio(module: nn.Module) -> float:
            paths = (baseline.path, baseline.path if module is reference else export(module).path)
            (_, latency), _ = time_models(paths, inputs=inputs, precision=_TIMING_PRECISION, max_seconds=TIMING_SECONDS)
            return latency.ratio

        if quantity == "latency_ratio":
            baseline = to_onnx(reference, task, directory / "baseline.onnx")
            yield latency_ratio
        else:
            counts: Mapping[str, Callable[[OnnxModel], int]] = {
                "parameters": lambda model: count_parameters(load_graph(model.path), directory)[0],
                "macs": lambda model: count_macs(load_graph(model.path), inputs, directory),
                "size_bytes": lambda model: sum(file.stat().st_size for file in model.files),
            }
            yield lambda module: counts[quantity](export(module))
