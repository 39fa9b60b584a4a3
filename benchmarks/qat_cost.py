"""What a step of quantization-aware training costs over a float one: `python benchmarks/qat_cost.py`.

`fit` trains ResNet-20 on images of CIFAR-10's size, made of noise, by its labels: once as it is, once as the graph
whose ranges and BatchNorm statistics follow the batches, once as the graph where they stand still. The three take
turns within one process. A round gives each one's time / that of the float model; the figure is the ratio over all
rounds with its 95 % Student-t interval. No teacher runs, which would cost all of them the same.
"""

import math
import sys
import time
from pathlib import Path

import torch
from torch import nn

sys.path[:0] = [str(Path(__file__).parents[1] / "pipelines")]  # the example's model

from cifar10 import ResNet
from publish import publish

from compressor.measure.latency import ratio_interval
from compressor.models.artifact import TorchModel
from compressor.quantization.calibration import calibrate
from compressor.quantization.float_graph import float_graph
from compressor.quantization.int8_plan import plan_int8
from compressor.quantization.simulation import simulate
from compressor.quantization.targets import TARGETS
from compressor.records.environment import environment
from compressor.references.reference import Reference
from compressor.stage import StageContext
from compressor.task import Samples, Task, cross_entropy
from compressor.training.fit import fit
from compressor.training.objective import LabelLoss
from compressor.training.sampling import TrainingData
from compressor.training.settings import TrainingSettings

ROUNDS, STEPS, BATCH_SIZE = 15, 4, 128


def models(task: Task) -> dict[str, nn.Module]:
    """ResNet-20 and its simulations."""
    torch.manual_seed(0)
    module = ResNet(blocks=3).eval()
    graph, plan = plan_int8(float_graph(module, task))
    ranges = calibrate(graph, plan, task.calibration, range(BATCH_SIZE), "minmax")
    limit = TARGETS["portable"].weight_limit
    return {
        "float": module,
        "live": simulate(graph, plan, ranges, limit, live=True),
        "frozen": simulate(graph, plan, ranges, limit, live=False),
    }


def seconds(module: nn.Module, task: Task) -> float:
    """Time of one epoch."""
    network = TorchModel(module, Reference(factory="cifar10:ResNet"))
    context = StageContext(network, torch.device("cpu"), 0, Path(), lambda _line: None)
    settings = TrainingSettings(epochs=1, batch_size=BATCH_SIZE)
    start = time.perf_counter()
    fit(module, LabelLoss(cross_entropy), TrainingData(task.train), settings, context)
    return time.perf_counter() - start


def main() -> None:
    """Measure, print and write the result."""
    torch.set_num_threads(1)  # one core each: the other may be busy
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(STEPS * BATCH_SIZE, 3, 32, 32, generator=generator)
    split = Samples((images,), torch.randint(10, (len(images),), generator=generator))
    task = Task(split, split, split, split, (images[:2],))
    trained = models(task)
    for module in trained.values():
        seconds(module, task)
    ratios: dict[str, list[float]] = {name: [] for name in trained if name != "float"}
    for position in range(ROUNDS):
        order = list(trained) if position % 2 else list(reversed(trained))
        taken = {name: seconds(trained[name], task) for name in order}
        for name, values in ratios.items():
            values.append(taken[name] / taken["float"])
    intervals = {name: ratio_interval([math.log(ratio) for ratio in values]) for name, values in ratios.items()}
    result = {
        "over_float": {name: interval.value for name, interval in intervals.items()},
        "interval_95": {name: [interval.low, interval.high] for name, interval in intervals.items()},
        "ratios": ratios,
        "steps_per_round": STEPS,
        "batch_size": BATCH_SIZE,
        "environment": environment(),
    }
    publish("qat_cost", "python benchmarks/qat_cost.py", result)
    for name, interval in intervals.items():
        print(f"{name} / float: {interval.value:.3f}, 95 % interval {interval.low:.3f} to {interval.high:.3f}")


if __name__ == "__main__":
    main()
