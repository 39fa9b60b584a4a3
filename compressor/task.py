"""What the user brings beside the model: data splits, loss, metrics, example inputs."""

import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import default_collate

from compressor.errors import InputError
from compressor.records.measurements import MetricInfo

Inputs: TypeAlias = tuple[Tensor, ...]

OutputKind: TypeAlias = Literal["classes", "labels", "values"]
"""What a model's outputs are: logits of classes that exclude each other, logits of independent labels, or numbers."""

IGNORED = -100
"""The class index of a sample or token that does not count, as in `torch.nn.functional.cross_entropy`."""

EVALUATION_BATCH = 256

_MANY_VALUES = 100_000
"""More values than this are no classes; nobody needs to know them all."""
_FEW_VALUES = 64
"""So many new values are looked for one by one."""


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


@dataclass(frozen=True)
class SplitFacts:
    """What reading every sample of a split once has shown.

    `fingerprint` is a SHA-256 over every sample, in order: equal data gives an equal one. `first` has each value that
    occurs among the targets with the first sample that has it, up to so many values that they are no classes.
    """

    fingerprint: str
    first: Mapping[float, int]
    is_complete: bool
    """Whether `first` has all values."""
    is_uniform: bool
    """Whether all samples have equal shapes and types."""


def survey(split: Split) -> SplitFacts:
    """Read every sample of `split`, in order. Raises what the split and collating its samples raise."""
    digest = hashlib.sha256(str(len(split)).encode())
    first: dict[float, int] = {}
    read, complete, signatures = 0, True, set[str]()
    for batch in [Batch(split.inputs, split.targets)] if isinstance(split, Samples) else batches(split, batch_size=256):
        for tensor in (*batch.inputs, batch.targets):
            digest.update(f"{tensor.dtype}{tuple(tensor.shape[1:])}".encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().data if tensor.numel() else b"")
        signatures.add(" ".join(f"{part.dtype}{tuple(part.shape[1:])}" for part in (*batch.inputs, batch.targets)))
        if complete:
            for value, sample in _first_samples(batch.targets, first).items():
                first.setdefault(value, read + sample)
            complete = len(first) <= _MANY_VALUES
        read += len(batch.targets)
    return SplitFacts(digest.hexdigest(), first, complete, len(signatures) < 2)


def fingerprint(split: Split) -> str:
    """SHA-256 over every sample of `split`, in order: equal data gives an equal fingerprint."""
    return survey(split).fingerprint


def _first_samples(targets: Tensor, known: Collection[float]) -> dict[float, int]:
    """Each value among `targets`, (N, …), that is not `known`, with the first of the N that has it."""
    found: dict[float, int] = {}
    for start in range(0, len(targets), EVALUATION_BATCH):
        rows = targets[start : start + EVALUATION_BATCH]
        for value, row in _first_rows(rows, {*known, *found}).items():
            found.setdefault(value, start + row)
        if len(found) > _MANY_VALUES:
            break
    return found


def _first_rows(rows: Tensor, known: Collection[float]) -> dict[float, int]:
    whole = rows.flatten().long()
    if whole.numel() and bool((whole == rows.flatten()).all()) and int(whole.max() - whole.min()) <= _MANY_VALUES:
        # counting is ten times as fast as sorting, and masks of images have very many targets
        least = int(whole.min())
        values = [float(one + least) for one in (whole - least).bincount().nonzero().flatten().tolist()]
        new = [value for value in values if value not in known]
        if len(new) <= _FEW_VALUES:
            return {
                value: int((rows == value).flatten(1).any(dim=1).nonzero()[0])
                if rows.ndim > 1
                else int((rows == value).nonzero()[0])
                for value in new
            }
    values, order = torch.unique(rows, return_inverse=True)
    samples = torch.arange(rows.numel()) // max(1, rows[:1].numel())
    firsts = torch.full((len(values),), len(rows)).scatter_reduce(0, order.flatten(), samples, "amin")
    found: dict[float, int] = {}
    for value, row in zip(values.tolist(), firsts.tolist(), strict=True):
        key = float(value) if value == value else math.nan  # noqa: PLR0124  # one NaN for all
        found[key] = min(row, found.get(key, row))
    return found


@dataclass(frozen=True)
class Augmentation:
    """A random change of training inputs, written as a pure function so that any view can be replayed.

    `apply(inputs, uniform)` takes the inputs of a batch and `uniform`, (N, `numbers`) in [0, 1), and gives inputs.
    """

    numbers: int
    apply: Callable[[Inputs, Tensor], Inputs]


def uniform_numbers(
    seed: int, view: int | NDArray[np.int64], indices: Sequence[int] | NDArray[np.int64], numbers: int
) -> Tensor:
    """Uniform float32 in [0, 1), (len(indices), `numbers`): a function of seed, view and sample index alone.

    `view` is one for all samples, or one for each.

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
    state = mix(state + golden * (np.atleast_1d(np.asarray(view, dtype=np.uint64)) + np.uint64(1)))
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

    @property
    def info(self) -> MetricInfo:
        """What a report needs to show and judge values of this metric."""
        return MetricInfo(name=self.name, unit=self.unit, higher_is_better=self.higher_is_better)


def _hits_and_count(logits: Tensor, targets: Tensor) -> Tensor:
    hits = (logits.argmax(dim=1) == targets).sum()
    return torch.stack([hits, (targets != IGNORED).sum()]).double()


accuracy = Metric("accuracy", _hits_and_count, lambda sums: float(sums[0] / sums[1]), unit="%")
"""Top-1 accuracy of logits (N, C, …) against class indices (N, …)."""


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each sample, in nats: logits (N, C, …), class indices (N, …); returns (N, …)."""
    return F.cross_entropy(logits, targets, reduction="none")


def evaluate(metrics: Sequence[Metric], predict: Callable[[Inputs], Tensor], split: Split) -> dict[str, float]:
    """Value of each metric of `predict` on `split`. Raises InputError if the split is empty."""
    pairs = ((predict(batch.inputs), batch.targets) for batch in batches(split, EVALUATION_BATCH))
    return evaluate_outputs(metrics, pairs)


def evaluate_outputs(metrics: Sequence[Metric], pairs: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Value of each metric over `pairs`, the outputs and targets of one batch each. Raises InputError without any."""
    sums: list[Tensor] | None = None
    for outputs, targets in pairs:
        statistics = [metric.statistics(outputs, targets) for metric in metrics]
        sums = statistics if sums is None else [total + more for total, more in zip(sums, statistics, strict=True)]
    if sums is None:
        msg = "a split to evaluate on must have samples, got 0"
        raise InputError(msg)
    return {metric.name: metric.value(total) for metric, total in zip(metrics, sums, strict=True)}


SPLITS = ("train", "validation", "test", "calibration", "unlabeled")
"""Names of the splits of a task."""


@dataclass(frozen=True)
class Task:
    """Everything about the problem that is not the model.

    `train`, `validation` and `calibration` may be used to choose; `test` only ever to report. `calibration` must share
    no sample with `test`. From `unlabeled` distillation learns too, whatever its targets. `loss(outputs, targets)`
    returns one value per sample, (N,), or per token. `metrics[0]` is the one that gates call accuracy. `example_inputs`
    have a batch dimension of at least 2. `dynamic_axes` names, per input, the dimensions that may change after export;
    the batch alone unless given. `outputs` says what a model gives: logits of classes that exclude each other, logits
    of independent labels, or values; unless given, the loss, the metrics and the targets tell. `labels` and
    `preprocessing` travel in the exported file.
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
    outputs: OutputKind | None = None
    labels: tuple[str, ...] = ()
    preprocessing: Mapping[str, object] = field(default_factory=dict)

    @cached_property
    def surveys(self) -> Mapping[str, SplitFacts]:
        """Facts of each split that is there, by name; every sample is read, once for all who ask."""
        splits = {name: getattr(self, name) for name in SPLITS}
        return {name: survey(split) for name, split in splits.items() if split is not None}

    @property
    def fingerprints(self) -> Mapping[str, str]:
        """Fingerprint of each split that is there, by name."""
        return {name: facts.fingerprint for name, facts in self.surveys.items()}


def evenly_spaced(samples: Sized, count: int) -> list[int]:
    """Indices of `count` samples, or of all if there are fewer, evenly over samples that may be sorted by class."""
    count = min(count, len(samples))
    return [position * len(samples) // count for position in range(count)]
