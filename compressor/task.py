"""What the user brings beside the model: data splits, loss, metrics, example inputs."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import default_collate

from compressor.errors import InputError

Inputs: TypeAlias = tuple[Tensor, ...]


class Batch(NamedTuple):
    """Inputs in the order of the model's `forward`, each (N, …), and the targets, (N, …)."""

    inputs: Inputs
    targets: Tensor

    def to(self, device: torch.device) -> "Batch":
        """Return the same batch on `device`."""
        return Batch(tuple(tensor.to(device) for tensor in self.inputs), self.targets.to(device))


class Split(Protocol):
    """A map-style data set, such as any `torch.utils.data.Dataset` with a length.

    A sample is `(input, target)`, or `((input, input, …), target)` for a model with several inputs.
    """

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> tuple[Tensor | Inputs, Tensor | int | float]: ...


@dataclass(frozen=True)
class Samples:
    """A split held in memory, gathered a batch at a time: `inputs` each (N, …), `targets` (N, …)."""

    inputs: Inputs
    targets: Tensor

    def __post_init__(self) -> None:
        lengths = [len(tensor) for tensor in (*self.inputs, self.targets)]
        if len(set(lengths)) != 1:
            msg = f"inputs and targets must have one length, got {lengths}"
            raise InputError(msg)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Inputs, Tensor]:
        return tuple(tensor[index] for tensor in self.inputs), self.targets[index]

    def __getitems__(self, indices: Sequence[int] | NDArray[np.int64]) -> Batch:  # the name that DataLoader looks for
        rows = torch.as_tensor(indices)
        return Batch(tuple(tensor[rows] for tensor in self.inputs), self.targets[rows])


def collate(samples: Batch | Sequence[tuple[Tensor | Inputs, Tensor | int | float]]) -> Batch:
    """Stack samples into one batch; a batch that a split gathered itself passes through."""
    if isinstance(samples, Batch):
        return samples
    inputs, targets = default_collate(list(samples))
    return Batch((inputs,) if isinstance(inputs, Tensor) else tuple(inputs), targets)


def gather(split: Split, indices: Sequence[int] | NDArray[np.int64]) -> Batch:
    """The samples of `split` at `indices`, as one batch."""
    return split.__getitems__(indices) if isinstance(split, Samples) else collate([split[int(i)] for i in indices])


def batches(split: Split, batch_size: int) -> Iterator[Batch]:
    """Yield all samples of `split` in order, `batch_size` at a time, the last batch shorter."""
    for start in range(0, len(split), batch_size):
        yield gather(split, range(start, min(start + batch_size, len(split))))


def fingerprint(split: Split) -> str:
    """SHA-256 over every sample of `split`, in order: equal data gives an equal fingerprint."""
    digest = hashlib.sha256(str(len(split)).encode())
    for batch in batches(split, batch_size=len(split) if isinstance(split, Samples) else 256):
        for tensor in (*batch.inputs, batch.targets):
            digest.update(f"{tensor.dtype}{tuple(tensor.shape[1:])}".encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


@dataclass(frozen=True)
class Augmentation:
    """A random change of training inputs, written as a pure function so that any view can be replayed.

    `apply(inputs, uniform)` takes the inputs of a batch and `uniform`, (N, `numbers`) in [0, 1), and gives inputs.
    """

    numbers: int
    apply: Callable[[Inputs, Tensor], Inputs]


def uniform_numbers(seed: int, view: int, indices: Sequence[int] | NDArray[np.int64], numbers: int) -> Tensor:
    """Uniform float32 in [0, 1), (len(indices), `numbers`): a function of seed, view and sample index alone.

    A counter-based generator (SplitMix64 finalizer, Steele et al. 2014), so that a sample gets the same numbers
    whatever batch or process it falls in.
    """

    def mix(state: np.ndarray) -> np.ndarray:
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: np.ndarray = state ^ (state >> np.uint64(31))
        return mixed

    golden = np.uint64(0x9E3779B97F4A7C15)
    state = mix(np.asarray([seed], dtype=np.uint64) + golden)
    state = mix(state + golden * np.asarray([view + 1], dtype=np.uint64))
    rows = mix(state + golden * (np.asarray(indices, dtype=np.uint64) + np.uint64(1)))
    cells = mix(rows[:, None] + golden * np.arange(1, numbers + 1, dtype=np.uint64))
    return torch.from_numpy(((cells >> np.uint64(40)).astype(np.float32)) * np.float32(2**-24))


@dataclass(frozen=True)
class Metric:
    """A figure of merit over a whole split, computed from sums over batches.

    `statistics(outputs, targets)` returns a float64 vector that is added up over batches; `value(sums)` turns the sums
    into the figure. `unit` is shown behind it: "%" means that the value is a share in [0, 1].
    """

    name: str
    statistics: Callable[[Tensor, Tensor], Tensor]
    value: Callable[[Tensor], float]
    higher_is_better: bool = True
    unit: str = ""


def _hits_and_count(logits: Tensor, targets: Tensor) -> Tensor:
    hits = (logits.argmax(dim=1) == targets).sum()
    return torch.stack([hits.double(), torch.tensor(float(targets.numel()), dtype=torch.float64)])


accuracy = Metric("accuracy", _hits_and_count, lambda sums: float(sums[0] / sums[1]), unit="%")
"""Top-1 accuracy of logits (N, C, …) against class indices (N, …)."""


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each sample, in nats: logits (N, C, …), class indices (N, …); returns (N, …)."""
    return F.cross_entropy(logits, targets, reduction="none")


def evaluate(metrics: Sequence[Metric], predict: Callable[[Inputs], Tensor], split: Split) -> dict[str, float]:
    """Value of each metric of `predict` on `split`. Raises InputError if the split is empty."""
    if len(split) == 0:
        msg = "a split to evaluate on must have samples, got 0"
        raise InputError(msg)
    sums: dict[str, Tensor] = {}
    for batch in batches(split, batch_size=256):
        outputs = predict(batch.inputs)
        for metric in metrics:
            statistics = metric.statistics(outputs, batch.targets)
            sums[metric.name] = sums[metric.name] + statistics if metric.name in sums else statistics
    return {metric.name: metric.value(sums[metric.name]) for metric in metrics}


SPLITS = ("train", "validation", "test", "calibration", "unlabeled")
"""Names of the splits of a task."""


@dataclass(frozen=True)
class Task:
    """Everything about the problem that is not the model.

    `train`, `validation` and `calibration` may be used to choose; `test` only ever to report. `calibration` must share
    no sample with `test`. `loss(outputs, targets)` returns one value per sample, (N,), or per token. `metrics[0]` is
    the one that gates call accuracy. `example_inputs` have a batch dimension of at least 2. `dynamic_axes` names, per
    input, the dimensions that may change after export; the batch alone unless given. `labels` and `preprocessing`
    travel in the exported file.
    """

    train: Split
    validation: Split
    test: Split
    calibration: Split
    example_inputs: Inputs
    loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy
    metrics: tuple[Metric, ...] = (accuracy,)
    unlabeled: Split | None = None
    augmentation: Augmentation | None = None
    dynamic_axes: tuple[Mapping[int, str], ...] | None = None
    labels: tuple[str, ...] = ()
    preprocessing: Mapping[str, object] = field(default_factory=dict)
