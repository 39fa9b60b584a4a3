"""Scales, zero points and codes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compressor.quantization.codes import Range, affine, weight_codes, weight_scale

ENDS = st.floats(-1e4, 1e4, allow_nan=False, width=32)


@given(ENDS, ENDS)
def test_zero_has_a_code_and_both_ends_are_within_a_step(one, other):
    low, high = min(one, other, 0.0), max(one, other, 0.0)
    scale, zero_point = affine(Range(min(one, other), max(one, other)))
    assert 0 <= zero_point <= 255
    if high - low > 1e-30:
        codes = np.clip(np.rint(np.array([low, high]) / scale) + zero_point, 0, 255)
        assert np.abs((codes - zero_point) * scale - [low, high]).max() <= 1.001 * scale


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (0.0, 6.0), (0.0, 1.0), (-0.1, 2.7), (-1e-3, 1e3)])
def test_clip_to_the_range_is_the_first_and_the_last_code_in_float32(low, high):
    scale, zero_point = affine(Range(low, high))
    ends = np.rint(np.float32([low, high]) / np.float32(scale)) + zero_point
    assert ends[0] <= 0 or low == 0 or zero_point == 0
    assert ends[1] >= 255


def test_activation_that_is_zero_throughout_has_a_scale():
    assert affine(Range(0.0, 0.0)) == (1.0, 0)


@pytest.mark.parametrize("limit", [63, 127])
def test_largest_weight_of_each_channel_has_the_largest_code(limit):
    weight = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    codes = weight_codes(weight, weight_scale(weight, 0, limit), 0, limit)
    assert codes.codes.abs().amax((1, 2, 3)).tolist() == [limit] * 6
    assert ((codes.numbers() - weight).abs() <= codes.scale.view(-1, 1, 1, 1) / 2 * 1.0001).all()


def test_zeros_stay_zero_and_an_empty_channel_has_a_scale():
    weight = torch.tensor([[0.0, 0.0], [0.0, 2.0]])
    codes = weight_codes(weight, weight_scale(weight, 0, 63), 0, 63)
    assert codes.codes.tolist() == [[0, 0], [0, 63]]
    assert codes.scale[0] == 1


def test_bias_fits_into_int32_with_weights_however_small():
    weight, bias = torch.full((1, 4), 1e-12), torch.tensor([5.0])
    scale = weight_scale(weight, 0, 63, bias=bias, input_scale=1e-3)
    assert abs(5.0 / (1e-3 * float(scale))) < 2**31


def test_one_scale_serves_channels_that_are_alike():
    weight = torch.tensor([[0.5, -1.0], [1.0, 0.3], [0.0, 0.0]])
    assert weight_scale(weight, 0, 127, one_scale=True).tolist() == pytest.approx([1 / 127] * 3)


def test_channels_that_would_lose_more_than_one_bit_keep_their_scales():
    weight = torch.diag(torch.tensor([1.0, 0.1, 0.1, 0.1, 0.1]))
    own = weight_scale(weight, 0, 127)
    assert torch.equal(weight_scale(weight, 0, 127, one_scale=True), own)
    assert own.max() > 9 * own.min()


def test_weight_of_zeros_has_a_scale_as_one_of_alike_channels():
    assert weight_scale(torch.zeros(2, 3), 0, 127, one_scale=True).tolist() == [1, 1]
