"""How far an activation's codes must reach, from a histogram whose size does not grow with the samples it has seen."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from compressor.quantization.codes import CODES, Range, affine

RangeMethod: TypeAlias = Literal["minmax", "moving_average", "percentile", "entropy", "mse"]

BINS = 4096
"""Bins on each side of zero; the widest value lies in the outer half of its side."""
TAIL = 1e-5
"""Share of the values other than zero that `percentile` clips at each end."""
_MOST_CLIPPED = 0.01  # share of the values that `entropy` may clip
_LEAST_EXPONENT = -126  # of a float32 whose inverse is finite
# The ends that `entropy` and `mse` try, as shares of the widest value: 16 in each halving, down to 1/256.
_SHARES = tuple(2 ** (-step / 16) for step in range(129))


@dataclass(frozen=True)
class Histogram:
    """What was seen of a tensor: but for `sums`, the same in whatever order and batches the samples came."""

    counts: Tensor
    """Values per bin, int64 (2 * BINS - 1,). In units of 2^`exponent` bin k beyond the middle holds [k, k + 1), the
    middle (-1, 1), and those before it mirror those beyond."""
    exponent: int
    """When a value falls outside, bins double their width and two become one. So every value is in the bin in which it
    would be if the widest value had come first."""
    extent: Range
    """Smallest and largest value."""
    sums: Range
    """Sums over batches of the smallest and of the largest value."""
    batches: int

    def __add__(self, other: "Histogram") -> "Histogram":
        """Return the histogram of both together."""
        exponent = max(self.exponent, other.exponent)
        return Histogram(
            _widen(self, exponent) + _widen(other, exponent),
            exponent,
            Range(min(self.extent.low, other.extent.low), max(self.extent.high, other.extent.high)),
            Range(self.sums.low + other.sums.low, self.sums.high + other.sums.high),
            self.batches + other.batches,
        )


def histogram(values: Tensor) -> Histogram:
    """Return the histogram of one batch of finite numbers, of any shape."""
    values = values.detach().flatten().float()
    extent = Range(*(float(end) for end in values.aminmax()))
    widest = max(-extent.low, extent.high)
    exponent = max(_LEAST_EXPONENT, math.frexp(widest)[1] - (BINS.bit_length() - 1)) if widest else _LEAST_EXPONENT
    # Divided by a power of two, which is exact, and cut off towards zero: what is cut off twice is cut off once.
    bins = (values * 2.0**-exponent).to(torch.int32) + (BINS - 1)
    return Histogram(torch.bincount(bins, minlength=2 * BINS - 1), exponent, extent, extent, 1)


def find_range(seen: Histogram, method: RangeMethod) -> Range:
    """Return the range that `method` finds for a tensor. It holds zero and ends within what was seen."""
    only_zero = int(seen.counts[BINS - 1]) == int(seen.counts.sum())
    low, high = seen.extent if only_zero else _METHODS[method](seen)
    return Range(min(low, 0.0), max(high, 0.0))


def rounding_error(values: Tensor, counts: Tensor, ends: Range) -> float:
    """Sum of the squared errors that codes of this range make in `values`, each there `counts` times; both (B,)."""
    scale, zero_point = affine(ends)
    kept = (values / scale).round_().clamp_(-zero_point, CODES - zero_point).mul_(scale)
    return float(counts @ (values - kept).square_())


def divergence(values: Tensor, counts: Tensor, ends: Range) -> float:
    """Kullback-Leibler divergence, in nats, of a histogram from what codes of this range keep of it.

    `values` are the bins' middles, ascending, and `counts` their contents, (B,) each. What lies outside the range
    counts into the outermost bins inside. What codes keep is the mean over the filled bins that share a code (Migacz,
    GTC 2017). At least one bin must be inside. The result is infinite if an outermost bin has only what was clipped.
    """
    scale, zero_point = affine(ends)
    codes = (values / scale).round_() + zero_point
    inside = (codes >= 0) & (codes <= CODES)
    kept, codes = counts[inside], codes[inside].long()
    filled = (kept > 0).double()
    means = torch.bincount(codes, kept, CODES + 1) / torch.bincount(codes, filled, CODES + 1).clamp_(min=1)
    clipped = kept.clone()
    first = int(inside.int().argmax())
    clipped[0] += counts[:first].sum()
    clipped[-1] += counts[first + len(kept) :].sum()
    wanted, given = clipped / clipped.sum(), filled * means[codes] / kept.sum()
    return float(torch.special.xlogy(wanted, wanted).sum() - torch.special.xlogy(wanted, given).sum())


def _widen(seen: Histogram, exponent: int) -> Tensor:
    """Counts in bins of 2^`exponent`, which is no less than before."""
    offsets = torch.arange(1 - BINS, BINS)
    wider = offsets.sign() * (offsets.abs() >> min(exponent - seen.exponent, BINS.bit_length()))
    return torch.zeros_like(seen.counts).index_add_(0, wider + (BINS - 1), seen.counts)


def _middles(seen: Histogram) -> Tensor:
    """The number that stands for each bin, float64 (2 * BINS - 1,): its middle, if that was not beyond all values."""
    offsets = torch.arange(1 - BINS, BINS, dtype=torch.float64)
    return ((offsets + offsets.sign() / 2) * 2.0**seen.exponent).clamp_(seen.extent.low, seen.extent.high)


def _moving_average(seen: Histogram) -> Range:
    return Range(seen.sums.low / seen.batches, seen.sums.high / seen.batches)


def _percentile(seen: Histogram) -> Range:
    # Zero has a code in any range, and were it counted, then a tensor of few other values would be clipped to nothing.
    counts = seen.counts.double()
    counts[BINS - 1] = 0
    total = counts.sum()
    middles = _middles(seen)
    below = counts.cumsum(0)
    low = middles[torch.searchsorted(below, TAIL * total, right=True)]
    high = middles[torch.searchsorted(below, (1 - TAIL) * total)]
    return Range(float(low), float(high))


def _least(seen: Histogram, cost: Callable[[Tensor, Tensor, Range], float], counts: Tensor) -> Range:
    """Return the range with the least cost, moving one end at a time; an end of a side without values stays at zero."""
    middles = _middles(seen)
    filled = counts > 0
    middles, counts = middles[filled], counts[filled]
    best = Range(min(seen.extent.low, 0.0), max(seen.extent.high, 0.0))
    while True:
        before = best
        lows = [Range(seen.extent.low * share, best.high) for share in _SHARES if best.low < 0]
        best = min((best, *lows), key=lambda tried: cost(middles, counts, tried))
        highs = [Range(best.low, seen.extent.high * share) for share in _SHARES if best.high > 0]
        best = min((best, *highs), key=lambda tried: cost(middles, counts, tried))
        if best == before or 0.0 in best:
            return best


def _entropy(seen: Histogram) -> Range:
    # Zero is exact in any range; where ReLU makes it the most frequent value by far, it would decide alone.
    counts = seen.counts.double()
    counts[BINS - 1] = (counts[BINS - 2] + counts[BINS]) / 2

    def cost(values: Tensor, counts: Tensor, tried: Range) -> float:
        # Codes narrower than a bin, or a histogram clipped to a single one, would seem to lose nothing.
        kept = counts[(values >= tried.low) & (values <= tried.high)].sum()
        if affine(tried).scale < 2.0**seen.exponent or kept < (1 - _MOST_CLIPPED) * counts.sum():
            return math.inf
        return divergence(values, counts, tried)

    return _least(seen, cost, counts)


def _mse(seen: Histogram) -> Range:
    return _least(seen, rounding_error, seen.counts.double())


_METHODS: Mapping[RangeMethod, Callable[[Histogram], Range]] = {
    "minmax": lambda seen: seen.extent,
    "moving_average": _moving_average,
    "percentile": _percentile,
    "entropy": _entropy,
    "mse": _mse,
}
