"""Ranges of activations from histograms, against references that keep every value."""

import math
from typing import get_args

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from compressor.quantization import ranges
from compressor.quantization.codes import CODES, Range, affine
from compressor.quantization.ranges import (
    BINS,
    TAIL,
    Histogram,
    RangeMethod,
    divergence,
    find_range,
    histogram,
    rounding_error,
)

METHODS: tuple[RangeMethod, ...] = get_args(RangeMethod)


def numbers(kind: str, count: int = 100_000) -> Tensor:
    """Values such as activations have, float32."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(count, generator=generator)
    kinds = {
        "signed": normal * 3 + 1,
        "rectified": (normal - 0.5).relu(),
        "negative": -normal.abs() - 0.1,
        "long-tailed": normal.sinh() ** 3,
        "clipped": (normal * 3).clamp(0, 6),
        "hardswish": torch.nn.functional.hardswish(normal * 3),
        "outlier": torch.cat([normal, torch.tensor([40.0])]),
        "few": normal[:40],
    }
    return kinds[kind]


KINDS = ("signed", "rectified", "negative", "long-tailed", "clipped", "hardswish", "outlier", "few")
every_kind = pytest.mark.parametrize("kind", KINDS)
every_method = pytest.mark.parametrize("method", METHODS)


def squared_error(values: Tensor, found: Range) -> float:
    """What the codes of a range lose of every single value, by NumPy."""
    scale, zero_point = affine(found)
    exact = values.double().numpy()
    codes = np.clip(np.rint(exact / scale) + zero_point, 0, CODES)
    return float((((codes - zero_point) * scale - exact) ** 2).sum())


def total(parts: list[Histogram]) -> Histogram:
    whole = parts[0]
    for part in parts[1:]:
        whole = whole + part
    return whole


def width(seen: Histogram) -> float:
    return 2.0**seen.exponent


@every_kind
def test_counts_are_those_of_numpy(kind: str) -> None:
    values = numbers(kind)
    seen = histogram(values)
    outer = np.arange(1, BINS + 1) * width(seen)
    inner = np.concatenate([-outer[::-1], outer])
    # NumPy's bins begin at their lower end, ours at the end nearer to zero
    exact = values.double().numpy()
    upper = np.histogram(exact[exact >= 0], inner)[0]
    lower = np.histogram(-exact[exact < 0], inner)[0][::-1]
    middle = np.zeros(2 * BINS - 1)
    middle[BINS - 1] = (np.abs(exact) < width(seen)).sum()
    upper[:BINS], lower[BINS - 1 :] = 0, 0
    np.testing.assert_array_equal(seen.counts.numpy(), upper + lower + middle)
    assert seen.extent == (values.min(), values.max())


@every_kind
def test_order_and_batches_change_nothing(kind: str) -> None:
    values = numbers(kind)
    whole = histogram(values)
    shuffled = values[torch.randperm(len(values), generator=torch.Generator().manual_seed(1))]
    by_size = values[values.abs().argsort()]  # every batch makes the bins wider
    for batches in (values.split(30_011), shuffled.split(9973), by_size.split(4001), by_size.flip(0).split(4001)):
        seen = total([histogram(batch) for batch in batches])
        assert torch.equal(seen.counts, whole.counts)
        assert (seen.exponent, seen.extent) == (whole.exponent, whole.extent)


def test_batch_of_zeros_or_of_tiny_numbers_changes_no_bin() -> None:
    values = numbers("signed")
    whole = histogram(torch.cat([torch.zeros(10), values, torch.full((5,), 1e-44)]))
    seen = total([histogram(torch.zeros(10)), histogram(values), histogram(torch.full((5,), 1e-44))])
    assert torch.equal(seen.counts, whole.counts)
    assert seen.exponent == whole.exponent


def test_largest_float_has_a_bin() -> None:
    largest = torch.finfo(torch.float32).max
    seen = histogram(torch.tensor([-largest, 0.0, largest]))
    assert seen.counts[[0, BINS - 1, -1]].tolist() == [1, 1, 1]


def test_size_is_the_same_after_one_value_and_after_a_million() -> None:
    one = histogram(torch.ones(1))
    many = total([histogram(numbers("long-tailed") * 2**step) for step in range(10)])
    assert many.counts.sum() == 1_000_000
    assert many.counts.nbytes == one.counts.nbytes == 8 * (2 * BINS - 1)


@every_kind
@every_method
def test_range_holds_zero_and_ends_within_what_was_seen(kind: str, method: RangeMethod) -> None:
    values = numbers(kind)
    low, high = find_range(histogram(values), method)
    assert min(float(values.min()), 0.0) <= low <= 0 <= high <= max(float(values.max()), 0.0)
    assert low < high


@every_method
def test_what_is_never_negative_begins_at_the_first_code(method: RangeMethod) -> None:
    found = find_range(histogram(numbers("rectified")), method)
    assert found.low == 0
    assert affine(found).zero_point == 0


@every_method
def test_tensor_of_zeros_has_no_range(method: RangeMethod) -> None:
    assert find_range(histogram(torch.zeros(100)), method) == (0, 0)


@every_method
def test_tensor_of_one_value_and_many_zeros_keeps_it(method: RangeMethod) -> None:
    values = torch.zeros(1_000_000)
    values[5] = 3.0
    assert find_range(histogram(values), method) == (0, 3)


def test_minmax_is_exact() -> None:
    values = numbers("signed")
    assert find_range(histogram(values), "minmax") == (values.min(), values.max())
    assert find_range(histogram(numbers("clipped")), "minmax") == (0, 6)


def test_moving_average_is_the_mean_of_batches() -> None:
    batches = numbers("signed").split(1000)
    found = find_range(total([histogram(batch) for batch in batches]), "moving_average")
    wanted = [np.mean([end(batch.numpy()) for batch in batches], dtype=np.float64) for end in (np.min, np.max)]
    np.testing.assert_allclose(found, wanted, rtol=1e-12)  # sums of float64


@pytest.mark.parametrize("kind", ["signed", "rectified", "long-tailed", "outlier"])
def test_percentile_is_that_of_the_values_other_than_zero(kind: str) -> None:
    values = numbers(kind, count=1_000_000)
    seen = histogram(values)
    exact = values.double().numpy()
    exact = exact[np.abs(exact) >= width(seen)]
    low, high = np.quantile(exact, [TAIL, 1 - TAIL], method="inverted_cdf")
    # the middle of a bin stands for its values
    np.testing.assert_allclose(find_range(seen, "percentile"), (min(low, 0), high), rtol=0, atol=0.5001 * width(seen))


def test_percentile_leaves_a_single_outlier_out() -> None:
    values = numbers("outlier", count=1_000_000)
    assert find_range(histogram(values), "percentile").high < 5.5


@every_kind
def test_rounding_error_of_a_histogram_is_that_of_its_values(kind: str) -> None:
    values = numbers(kind)
    seen = histogram(values)
    for share in (1.0, 0.6, 0.3):
        found = Range(min(seen.extent.low, 0.0) * share, max(seen.extent.high, 0.0) * share)
        error = rounding_error(ranges._middles(seen), seen.counts.double(), found)
        wanted = squared_error(values, found)
        # a bin is at most a quarter of a code wide here, and as many values lie below its middle as above
        assert error == pytest.approx(wanted, rel=0.1 if kind == "few" else 0.02)


@every_kind
def test_mse_is_as_good_as_a_search_over_all_values(kind: str) -> None:
    values = numbers(kind)
    seen = histogram(values)
    low, high = min(seen.extent.low, 0.0), max(seen.extent.high, 0.0)
    shares = np.geomspace(1 / 128, 1, 25)
    ends = [(first, second) for first in (shares if low < 0 else [1.0]) for second in (shares if high > 0 else [1.0])]
    tried = [Range(low * first, high * second) for first, second in ends]
    sample = values[:: max(1, len(values) // 5000)]  # to choose by; all of them to compare
    best = sorted(tried, key=lambda found: squared_error(sample, found))[:5]
    found = find_range(seen, "mse")
    # 0.01 for the bins, and an end between two that are tried costs less than 0.01, for the error is flat at its least
    assert squared_error(values, found) <= 1.02 * min(squared_error(values, each) for each in best)


@pytest.mark.parametrize("kind", ["signed", "rectified", "long-tailed", "hardswish"])
def test_divergence_is_that_of_scipy(kind: str) -> None:
    seen = histogram(numbers(kind))
    middles, counts = ranges._middles(seen).numpy(), seen.counts.double().numpy()
    for share in (1.0, 0.7, 0.4):
        found = Range(min(seen.extent.low, 0.0) * share, seen.extent.high * share)
        scale, zero_point = affine(found)
        codes = np.rint(middles / scale) + zero_point
        inside = np.flatnonzero((codes >= 0) & (codes <= CODES))
        clipped, kept = counts[inside].copy(), np.zeros(len(inside))
        clipped[0] += counts[: inside[0]].sum()
        clipped[-1] += counts[inside[-1] + 1 :].sum()
        for code in range(CODES + 1):
            members = [place for place in np.flatnonzero(codes[inside] == code) if counts[inside][place] > 0]
            kept[members] = counts[inside][members].mean() if members else 0.0
        wanted = scipy.stats.entropy(clipped, kept)
        found_divergence = divergence(torch.from_numpy(middles), torch.from_numpy(counts), found)
        assert found_divergence == pytest.approx(wanted, rel=1e-9) or math.isinf(wanted)
        assert math.isinf(found_divergence) == math.isinf(wanted)


def test_entropy_clips_a_long_tail_and_no_flat_distribution() -> None:
    tail = numbers("long-tailed")
    assert find_range(histogram(tail), "entropy").high < 0.5 * float(tail.max())
    flat = torch.linspace(-1, 2, 100_000)
    low, high = find_range(histogram(flat), "entropy")
    assert (low, high) == pytest.approx((-1, 2), rel=0.05)  # a step between the ends that are tried


def test_entropy_clips_no_more_than_a_hundredth() -> None:
    # means of images, far from zero: clipped to one bin, they would lose nothing
    values = numbers("signed")[:5000].abs() * 0.05 + 0.5
    high = find_range(histogram(values), "entropy").high
    assert (values > high).float().mean() <= 0.011  # a bin at the end counts by its middle
