"""Which weights become zero: exactly as many as asked, chosen by magnitude, shared out among the layers."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from compressor.errors import StageError
from compressor.models.weights import count_zeros
from compressor.text.figures import list_names

Allocation: TypeAlias = Literal["lamp", "uniform", "global", "erk"]


def smallest(scores: Tensor, count: int) -> Tensor:
    """Mask of the `count` smallest of `scores`, of its shape; of equal ones the first in memory order are taken.

    `scores`: finite or infinite, not NaN. Raises StageError unless `count` is in [0, number of scores].
    """
    if not 0 <= count <= scores.numel():
        msg = f"count must be in [0, {scores.numel()}], the number of scores, got {count}"
        raise StageError(msg)
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    flat = scores.detach().flatten()
    limit = flat.kthvalue(count).values
    mask = flat < limit
    ties = torch.nonzero(flat == limit).flatten()
    mask[ties[: count - int(mask.sum())]] = True
    return mask.view(scores.shape)


def lamp_scores(weight: Tensor) -> Tensor:
    """Square of each weight over the sum of all squares in the layer that are not smaller (Lee et al. 2021).

    Layer-adaptive magnitude, arXiv 2010.07611: how much of what would be left of the layer the weight is. Float64, of
    the shape of `weight`, in [0, 1]; the largest weight has 1, unless all are zero. Equal weights
    have equal scores, where the paper lets their order decide.
    """
    ascending, order = weight.detach().abs().flatten().sort()
    squares = ascending.double().square()
    not_smaller = squares.flip(0).cumsum(0).flip(0)
    sums = not_smaller[torch.searchsorted(ascending, ascending)]  # equal weights have equal scores
    scores = torch.where(squares == 0, 0.0, squares / sums)
    return torch.empty_like(scores).scatter_(0, order, scores).view(weight.shape)


def erk_densities(shapes: Sequence[Sequence[int]], sparsity: float) -> tuple[float, ...]:
    """Share of weights that each layer keeps by Erdős-Rényi-Kernel (Evci et al. 2020, arXiv 1911.11134).

    Proportional to the sum of the layer's dimensions over their product; where that is more than 1 the layer stays
    dense and the others keep fewer, so that all together keep a share of 1 - `sparsity`, in [0, 1].
    """
    sizes = [math.prod(shape) for shape in shapes]
    shares = [float(sum(shape)) for shape in shapes]
    kept = _level(shares, [0] * len(sizes), sizes, (1 - sparsity) * sum(sizes))
    return tuple(part / size for part, size in zip(kept, sizes, strict=True))


def zero_masks(weights: Mapping[str, Tensor], sparsity: float, allocation: Allocation) -> dict[str, Tensor]:
    """Mask by name of the weights that become zero, those that are zero already among them.

    round(`sparsity` * weights) of them in all, `sparsity` in [0, 1], but each tensor keeps its largest weight. Within
    a tensor the smallest go. `uniform` takes the same share of each tensor, `erk` the shares of `erk_densities`,
    `global` the smallest of all, `lamp` the smallest of all `lamp_scores`. Ties go by the order of `weights`, then of
    memory. Raises StageError if more weights than asked are zero already.
    """
    total = sum(weight.numel() for weight in weights.values())
    already = list(map(count_zeros, weights.values()))
    most = sum(weight.numel() - int(weight.any()) for weight in weights.values())
    count = min(round(sparsity * total), most)
    if count < sum(already):
        msg = f"sparsity must be at least {sum(already) / total:.4f}, what the weights have already, got {sparsity}"
        raise StageError(msg)
    if allocation in {"global", "lamp"}:
        return _smallest_of_all(weights, count, lamp_scores if allocation == "lamp" else torch.abs)
    shares = [float(sum(w.shape) if allocation == "erk" else w.numel()) for w in weights.values()]
    most_kept = [weight.numel() - zeros for weight, zeros in zip(weights.values(), already, strict=True)]
    kept = _whole(_level(shares, [min(1, n) for n in most_kept], most_kept, total - count), most_kept, total - count)
    return {
        name: smallest(weight.abs(), weight.numel() - left)
        for (name, weight), left in zip(weights.items(), kept, strict=True)
    }


def pattern_mask(weight: Tensor, n: int, m: int, *, input_dimension: int = 1) -> Tensor:
    """Mask of the m - `n` smallest of each `m` consecutive input channels, of the shape of `weight`.

    A group lies at one output channel and one kernel position, as sparse tensor cores and kernels expect. Of equal
    weights the first go. Raises StageError unless 0 < `n` < `m` and the input channels, those along
    `input_dimension`, are a multiple of `m`.
    """
    channels = weight.shape[input_dimension]
    if not 0 < n < m or channels % m:
        msg = f"{n}:{m} must keep a part of groups of {m}, and input channels be a multiple of it, got {channels}"
        raise StageError(msg)
    channels_last = weight.detach().abs().movedim(input_dimension, -1)
    groups = channels_last.reshape(-1, m)
    order = groups.argsort(dim=1, stable=True)
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order[:, : m - n], True)
    return mask.view(channels_last.shape).movedim(-1, input_dimension)


def pattern_masks(
    weights: Mapping[str, Tensor], input_dimensions: Mapping[str, int], n: int, m: int
) -> dict[str, Tensor]:
    """`pattern_mask` of each weight whose input channels are a multiple of `m`, by name; the others have no mask.

    `input_dimensions` has the dimension of the input channels by name. Raises StageError if no weight fits.
    """
    masks = {
        name: pattern_mask(weight, n, m, input_dimension=input_dimensions[name])
        for name, weight in weights.items()
        if weight.shape[input_dimensions[name]] % m == 0
    }
    if not masks:
        channels = [f"{name} ({weight.shape[input_dimensions[name]]})" for name, weight in weights.items()]
        msg = f"pattern {n}:{m} needs a layer whose input channels are a multiple of {m}, got {list_names(channels)}"
        raise StageError(msg)
    return masks


def share_of_zeros(weights: Collection[Tensor]) -> float:
    """Zeros in `weights`, all together, divided by their numbers: in [0, 1]."""
    return sum(map(count_zeros, weights)) / sum(weight.numel() for weight in weights)


def _smallest_of_all(weights: Mapping[str, Tensor], count: int, score: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    scores = [score(weight.detach()).flatten().double() for weight in weights.values()]
    for one in scores:
        if one.any():
            one[one.argmax()] = math.inf  # a layer without weights would pass nothing on
    together = torch.split(smallest(torch.cat(scores), count), [len(one) for one in scores])
    return {name: mask.view(weights[name].shape) for name, mask in zip(weights, together, strict=True)}


def _level(shares: Sequence[float], least: Sequence[int], most: Sequence[int], total: float) -> list[float]:
    """Numbers proportional to `shares`, but within `least` and `most`, whose sum is `total`."""

    def at(level: float) -> list[float]:
        return [min(max(level * share, low), high) for share, low, high in zip(shares, least, most, strict=True)]

    below, above = 0.0, max(high / share for share, high in zip(shares, most, strict=True))
    while below < (middle := (below + above) / 2) < above:
        below, above = (middle, above) if sum(at(middle)) < total else (below, middle)
    return at(above)


def _whole(numbers: Sequence[float], most: Sequence[int], total: int) -> list[int]:
    """Round `numbers` to integers of the sum `total`: down, then up in the order of what was cut off."""
    whole = [math.floor(number) for number in numbers]
    by_rest = sorted(range(len(whole)), key=lambda i: whole[i] - numbers[i])
    for i in [i for i in by_rest if whole[i] < most[i]][: total - sum(whole)]:
        whole[i] += 1
    return whole
