"""What `fit` costs over the same loop written by hand in plain PyTorch: `python benchmarks/fit.py`.

Both train the same network on scikit-learn's digits, from the same weights, in turns within one process. The loop by
hand gathers batches by indexing tensors, the fastest way there is. A round gives fit / by hand; the figure is the
ratio over all rounds with its 95 % Student-t interval.
"""

import copy
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path[:0] = [str(Path(__file__).parents[1] / "pipelines")]  # the example's model and data

import digits
from publish import publish

from compressor.measure.latency import ratio_interval
from compressor.models.artifact import TorchModel
from compressor.records.environment import environment
from compressor.references.reference import Reference
from compressor.stage import StageContext
from compressor.task import Task, cross_entropy
from compressor.training.fit import fit
from compressor.training.objective import LabelLoss
from compressor.training.sampling import TrainingData
from compressor.training.settings import TrainingSettings

ROUNDS, EPOCHS, BATCH_SIZE = 15, 8, 64
NETWORK = Reference(factory="digits:student")


def by_fit(module: nn.Module, task: Task) -> nn.Module:
    """Train with `fit`."""
    context = StageContext(TorchModel(module, NETWORK), torch.device("cpu"), 0, Path(), lambda _line: None)
    settings = TrainingSettings(epochs=EPOCHS, batch_size=BATCH_SIZE)
    return fit(module, LabelLoss(cross_entropy), TrainingData(task.train), settings, context)


def by_hand(module: nn.Module, task: Task) -> nn.Module:
    """Train with the loop that everybody writes."""
    trained = copy.deepcopy(module).train()
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3)
    (images,), targets = task.train.inputs, task.train.targets
    steps = EPOCHS * (len(targets) // BATCH_SIZE)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(EPOCHS):
        order = torch.randperm(len(targets), generator=generator)
        for start in range(0, len(order) - BATCH_SIZE + 1, BATCH_SIZE):
            rows = order[start : start + BATCH_SIZE]
            loss = F.cross_entropy(trained(images[rows]), targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
    return trained


def seconds(train: Callable[[nn.Module, Task], nn.Module], module: nn.Module, task: Task) -> float:
    """Time of one training."""
    start = time.perf_counter()
    train(module, task)
    return time.perf_counter() - start


def main() -> None:
    """Measure, print and write the result."""
    torch.set_num_threads(1)  # one core each: the other may be busy
    task, module = digits.task(), TorchModel.build(NETWORK, seed=0).module
    for train in (by_fit, by_hand):
        train(module, task)
    ratios = []
    for position in range(ROUNDS):
        order = (by_fit, by_hand) if position % 2 else (by_hand, by_fit)
        taken = {train.__name__: seconds(train, module, task) for train in order}
        ratios.append(taken["by_fit"] / taken["by_hand"])
    interval = ratio_interval([math.log(ratio) for ratio in ratios])
    result = {
        "fit_over_by_hand": interval.value,
        "interval_95": [interval.low, interval.high],
        "ratios": ratios,
        "steps_per_round": EPOCHS * (len(task.train) // BATCH_SIZE),
        "batch_size": BATCH_SIZE,
        "environment": environment(),
    }
    publish("fit", "python benchmarks/fit.py", result)
    print(f"fit / by hand: {interval.value:.3f}, 95 % interval {interval.low:.3f} to {interval.high:.3f}")


if __name__ == "__main__":
    main()
