"""What a training step sees: which samples, in which order, through which view of the augmentation."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compressor.errors import InputError
from compressor.task import IGNORED, Augmentation, Inputs, Split, gather, uniform_numbers


class TrainingBatch(NamedTuple):
    """Samples, each as one view shows it: inputs, each (N, …), and the targets, (L, …), of the first L ≤ N.

    The other samples have no label. `counted`, (N, …), is False for a sample or token that does not count; None if all
    do. `rows`, (N,), number the samples: first those of the training split, then those of the unlabeled one. `rows` and
    `views`, (N,), together name what was drawn, whatever batch it falls in.
    """

    inputs: Inputs
    targets: Tensor
    counted: Tensor | None
    rows: NDArray[np.int64]
    views: NDArray[np.int64]


@dataclass(frozen=True)
class TrainingData:
    """Samples to learn from: a labeled split, and one without labels that fills `unlabeled_share` of each batch.

    `augmentation` shows a sample in another view each time it is drawn; `seed` chooses the views. With `views` there
    are so many of them, which take turns. `first_epoch` epochs of samples count as seen: order and views go on from
    there. In `unlabeled` only targets of -100 mean anything: those tokens do not count.
    """

    labeled: Split
    unlabeled: Split | None = None
    unlabeled_share: float = 0.0
    augmentation: Augmentation | None = None
    seed: int = 0
    views: int | None = None
    first_epoch: int = 0

    def __len__(self) -> int:
        return len(self.labeled) + (0 if self.unlabeled is None else len(self.unlabeled))

    def view(self, inputs: Inputs, rows: NDArray[np.int64], view: int | NDArray[np.int64]) -> Inputs:
        """Return `inputs`, those of the samples `rows`, as `view` shows them: one for all, or one for each.

        The same view of a sample is the same every time.
        """
        if self.augmentation is None:
            return inputs
        return self.augmentation.apply(inputs, uniform_numbers(self.seed, view, rows, self.augmentation.numbers))

    def inputs(self, rows: NDArray[np.int64]) -> Inputs:
        """Inputs of the samples `rows`, in ascending order, without augmentation."""
        first = len(self.labeled)
        parts = [gather(self.labeled, rows[rows < first]).inputs] if (rows < first).any() else []
        if self.unlabeled is not None and (rows >= first).any():
            parts.append(gather(self.unlabeled, rows[rows >= first] - first).inputs)
        return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True)) if len(parts) > 1 else parts[0]


@dataclass(frozen=True)
class Draws:
    """How many labeled and unlabeled samples a batch has, and how many batches make an epoch."""

    labeled: int
    unlabeled: int
    steps: int


def divide_batch(data: TrainingData, batch_size: int, processes: int) -> Draws:
    """Divide a global batch of `batch_size` among the splits; with fewer samples the batch is smaller.

    An epoch draws as many samples as there are, and leaves out the last batch if it is incomplete.
    Raises InputError if a split is empty, a share gives no sample, or a part does not divide among the processes.
    """
    if len(data.labeled) == 0:
        msg = "the split to train on must have samples, got 0"
        raise InputError(msg)
    size = min(batch_size, len(data))
    unlabeled = 0 if data.unlabeled is None else round(size * data.unlabeled_share)
    if data.unlabeled is not None and not 0 < unlabeled < size:
        msg = (
            f"a batch must have labeled and unlabeled samples, but an unlabeled_share of {data.unlabeled_share} makes "
            f"{unlabeled} of {size} unlabeled; choose another share or a larger batch_size"
        )
        raise InputError(msg)
    if size % processes or unlabeled % processes:
        parts = f"{size} samples" + (f", {unlabeled} of them unlabeled" if unlabeled else "")
        msg = f"a batch must divide among {processes} processes, got {parts}; choose another batch_size"
        raise InputError(msg)
    return Draws(size - unlabeled, unlabeled, len(data) // size)


def training_batches(
    data: TrainingData,
    drawn: Draws,
    *,
    epochs: int,
    seed: int,
    process: int = 0,
    processes: int = 1,
) -> Iterator[TrainingBatch]:
    """Yield this process's share of each batch of each epoch; `seed` chooses the order.

    Every epoch draws each split in another order. If an epoch needs more samples than the split has, it goes through
    the split again, in yet another order. The first `data.first_epoch` epochs are passed over.
    """
    generator = torch.Generator().manual_seed(seed)
    first = len(data.labeled)
    for epoch in range(data.first_epoch + epochs):
        labeled = _order(first, drawn.steps * drawn.labeled, epoch, generator)
        unlabeled = _order(len(data) - first, drawn.steps * drawn.unlabeled, epoch, generator)
        if epoch < data.first_epoch:
            continue
        for step in range(drawn.steps):
            rows, views = labeled[:, step * drawn.labeled : (step + 1) * drawn.labeled][:, process::processes]
            batch = gather(data.labeled, rows)
            inputs = batch.inputs
            counted = _mark_counted(batch.targets, always=processes > 1)
            if data.unlabeled is not None:
                others = unlabeled[:, step * drawn.unlabeled : (step + 1) * drawn.unlabeled][:, process::processes]
                added = gather(data.unlabeled, others[0])
                inputs = tuple(torch.cat(pair) for pair in zip(inputs, added.inputs, strict=True))
                rows, views = np.concatenate([rows, others[0] + first]), np.concatenate([views, others[1]])
                more = _mark_counted(added.targets, always=processes > 1)
                counted = _join(counted, more, batch.targets, added.targets)
            views = views if data.views is None else views % data.views
            yield TrainingBatch(data.view(inputs, rows, views), batch.targets, counted, rows, views)


def _order(samples: int, count: int, epoch: int, generator: torch.Generator) -> NDArray[np.int64]:
    """Draw `count` of the numbers below `samples`; row 0 has them, row 1 how often each was drawn before.

    The numbers are whole permutations, one after another; the last one is cut off. Each earlier epoch took as many.
    """
    passes = -(-count // max(1, samples))
    orders = [torch.randperm(samples, generator=generator).numpy() for _ in range(passes)]
    views = np.repeat(epoch * passes + np.arange(passes), samples)
    return np.stack([np.concatenate([np.empty(0, dtype=np.int64), *orders]), views])[:, :count]


def _mark_counted(targets: Tensor, *, always: bool) -> Tensor | None:
    """Mark the samples or tokens that count; None if all do, but with `always` a mask even then."""
    if targets.is_floating_point():
        return None
    ignored = targets == IGNORED
    return ~ignored if always or ignored.any() else None


def _join(counted: Tensor | None, more: Tensor | None, targets: Tensor, others: Tensor) -> Tensor | None:
    """Join what counts of labeled and of unlabeled samples.

    All unlabeled samples count if their targets are not shaped like those of labeled samples.
    """
    if more is not None and more.shape[1:] != targets.shape[1:]:
        more = None
    if targets.is_floating_point() or (counted is None and more is None):
        return None
    labeled = torch.ones_like(targets, dtype=torch.bool) if counted is None else counted
    return torch.cat([labeled, labeled.new_ones(len(others), *labeled.shape[1:]) if more is None else more])
