import time

import numpy as np
import pytest

from compressor.pruning.staircase import measure_step, step_of_staircase

CHANNELS = np.array([20, 24, 28, 32, 33, 34, 36, 40, 44, 48, 56, 64])


def staircase(step: int, *, noise: float = 0.0, seed: int = 0) -> dict[int, float]:
    """Times of convolutions that are as slow as those with the next multiple of `step`, and a fixed cost."""
    times = 0.05 + (np.ceil(CHANNELS / step) * step / 64) ** 2
    times *= np.exp(np.random.default_rng(seed).normal(0, noise, len(CHANNELS)))
    return dict(zip(CHANNELS.tolist(), times.tolist(), strict=True))


@pytest.mark.parametrize("step", [1, 2, 4, 8, 16, 32])
def test_the_step_of_a_staircase_is_found(step):
    assert step_of_staircase(staircase(step)) == step


@pytest.mark.parametrize("step", [4, 8, 16, 32])
def test_noise_of_three_percent_hides_no_step_that_matters(step):
    found = {step_of_staircase(staircase(step, noise=0.03, seed=seed)) for seed in range(100)}
    assert found == {step}


def test_noise_on_smooth_times_leaves_a_small_step():
    found = {step_of_staircase(staircase(1, noise=0.03, seed=seed)) for seed in range(100)}
    assert max(found) <= 4


def test_the_unit_of_time_does_not_matter():
    times = staircase(16, noise=0.03)
    assert step_of_staircase({channels: seconds * 1e-6 for channels, seconds in times.items()}) == 16


def test_the_times_that_this_kind_of_machine_showed_are_a_staircase_of_16():
    # ONNX Runtime on AVX-512, 3x3 convolutions, relative to 64 channels, with other processes on all cores
    seen = {20: 0.31, 24: 0.3, 28: 0.3, 32: 0.3, 33: 0.54, 34: 0.56, 36: 0.59, 40: 0.59, 44: 0.59}
    seen |= {48: 0.59, 56: 1.0, 64: 1.0}
    assert step_of_staircase(seen) == 16


def test_times_without_any_order_give_the_step_for_unclear_cases():
    shuffled = np.random.default_rng(0).uniform(1, 10, len(CHANNELS))
    assert step_of_staircase(dict(zip(CHANNELS.tolist(), shuffled.tolist(), strict=True))) == 8


def test_the_step_of_this_machine_is_measured_once():
    step = measure_step()
    assert step in {1, 2, 4, 8, 16, 32}
    start = time.process_time()
    assert measure_step() == step
    assert time.process_time() - start < 0.1
