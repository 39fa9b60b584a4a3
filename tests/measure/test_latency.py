import gc
import math
import random
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose
from onnx import TensorProto, helper, numpy_helper
from scipy import stats

from compressor.errors import InputError
from compressor.measure.latency import (
    log_ratios,
    ratio_interval,
    ready_call,
    t_quantile,
    time_models,
    untimed_calls,
    visits,
)
from compressor.records.measurements import Interval, Latency, LatencySession
from example_onnx import convolutions, save


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("models")
    return {
        "conv": convolutions(directory / "conv.onnx", (32, 3), (32, 3), (32, 3)),
        "tiny": convolutions(directory / "tiny.onnx", (8, 3)),
    }


def test_the_t_quantile_is_that_of_an_independent_implementation():
    for confidence in (0.5, 0.95, 0.999):
        ours = [t_quantile(degrees, confidence) for degrees in range(1, 101)]
        theirs = stats.t.ppf((1 + confidence) / 2, np.arange(1, 101))
        assert_allclose(ours, theirs, rtol=1e-9)  # both are exact formulas; scipy promises no more digits


def test_the_interval_is_students_on_the_logarithmic_scale():
    logs = np.random.default_rng(0).normal(0.7, 0.1, size=12)
    low, high = stats.t.interval(0.95, df=11, loc=logs.mean(), scale=stats.sem(logs))
    assert_allclose(ratio_interval(logs.tolist()), np.exp([logs.mean(), low, high]), rtol=1e-9)


def test_intervals_hold_the_truth_as_often_as_they_say():
    rounds = np.random.default_rng(0).normal(math.log(2), 0.05, size=(2000, 10))
    intervals = [ratio_interval(logs) for logs in rounds.tolist()]
    held = np.mean([interval.low <= 2 <= interval.high for interval in intervals])
    assert held == pytest.approx(0.95, abs=0.015)  # 3 standard deviations of a share over 2000


def test_the_half_width_of_an_interval_is_its_relative_error():
    assert Interval(2.0, 2.0 / 1.01, 2.0 * 1.01).half_width == pytest.approx(0.01, abs=1e-4)


def test_passes_go_to_and_fro_over_all_models():
    assert list(visits(3, 0, 4)) == [(0, 1, 2), (2, 1, 0), (0, 1, 2), (2, 1, 0)]


def test_over_rounds_every_model_takes_every_place():
    orders = [next(visits(4, round_index, 1)) for round_index in range(4)]
    for place in zip(*orders, strict=True):
        assert sorted(place) == [0, 1, 2, 3]


@pytest.mark.parametrize(("seconds", "calls"), [(1e-5, 100), (1e-4, 10), (1e-3, 8), (2e-3, 5), (0.1, 1)])
def test_a_visit_first_fills_the_caches_without_wasting_time_on_slow_models(seconds, calls):
    assert untimed_calls(seconds) == calls


def times_of_a_round(costs: list[float], *, round_index: int = 0, drift: float = 0.0) -> np.ndarray:
    """Nanoseconds that models of these costs take in turns on a machine that slows down by `drift` per visit."""
    times = np.empty((10, len(costs), 4), dtype=np.int64)
    pace = 1.0
    for row, visited in zip(times, visits(len(costs), round_index, passes=10), strict=True):
        for model in visited:
            row[model] = 1e9 * costs[model] * pace
            pace += drift
    return times


def test_the_ratio_of_a_round_is_that_of_the_costs():
    assert_allclose(log_ratios(times_of_a_round([1.0, 0.5, 4.0])), np.log([1, 2, 0.25]), atol=1e-9)


@pytest.mark.parametrize("drift", [0.001, -0.001])
def test_over_rounds_a_drift_of_the_machine_does_not_move_the_ratio(drift):
    found = [log_ratios(times_of_a_round([1.0, 1.0, 1.0], round_index=index, drift=drift)) for index in range(3)]
    assert np.abs(found).max() > 1e-3
    assert_allclose(np.mean(found, axis=0), 0, atol=1e-5)  # what is left is of second order: drift squared


def test_interrupted_calls_do_not_move_the_ratio():
    times = times_of_a_round([1.0, 0.5])
    interrupted = times.copy()
    interrupted[:, 1, :3] *= 40
    interrupted[:9, 0] *= 10
    assert_allclose(log_ratios(interrupted), log_ratios(times), atol=1e-12)


def test_given_inputs_may_have_any_length_and_the_first_with_a_dimension_has_the_batch(tmp_path):
    scale = (TensorProto.FLOAT, ())
    path = save(
        tmp_path / "m.onnx",
        [helper.make_node("Mul", ["scale", "x"], ["y"])],
        [],
        {"scale": scale, "x": (TensorProto.FLOAT, ("batch", "length"))},
    )
    arrays = [np.array(2.0, dtype=np.float32), np.zeros((2, 5), dtype=np.float32)]
    _, session = time_models([path], inputs=arrays, precision=1.0)
    assert session.batch_size == 2


def test_a_model_without_inputs_is_refused(tmp_path):
    nodes = [helper.make_node("Constant", [], ["y"], value_float=1.0)]
    path = save(tmp_path / "m.onnx", nodes, [], {})
    with pytest.raises(InputError, match="must have an input"):
        time_models([path])


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (TensorProto.FLOAT, ("batch", 3, 28, 28)),
        (TensorProto.FLOAT, ("batch", 784)),
        (TensorProto.INT32, ("batch", 1, 28, 28)),
    ],
)
def test_models_that_take_other_inputs_are_refused(tmp_path, models, kind, shape):
    relu = helper.make_node("Relu", ["x"], ["y"])
    other = save(tmp_path / "other.onnx", [relu], [], {"x": (kind, shape)}, kind)
    with pytest.raises(InputError, match=r"other\.onnx must take the inputs that the models are timed on, float32"):
        time_models([models["tiny"], other])
    assert gc.isenabled()


def test_a_model_that_takes_other_floats_gets_the_same_numbers_in_its_type(tmp_path):
    weights = {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16, TensorProto.DOUBLE: np.float64}
    paths = [
        save(
            tmp_path / f"{kind}.onnx",
            [helper.make_node("MatMul", ["x", "w"], ["y"])],
            [numpy_helper.from_array(np.ones((8, 4), dtype=dtype), "w")],
            {"x": (kind, ("batch", 8))},
            kind,
        )
        for kind, dtype in weights.items()
    ]
    beyond_float16 = np.full((1, 8), 70_000, dtype=np.float32)
    outputs = [ready_call(path, [beyond_float16], threads=1)()[0] for path in paths]
    assert [(output.dtype, output[0, 0]) for output in outputs] == [
        (np.float32, 560_000),
        (np.float16, np.inf),
        (np.float64, 560_000),
    ]


def test_a_model_that_stops_on_its_inputs_is_refused(tmp_path):
    table = numpy_helper.from_array(np.zeros((4, 2), dtype=np.float32), "table")
    gather = helper.make_node("Gather", ["table", "tokens"], ["y"])
    path = save(tmp_path / "m.onnx", [gather], [table], {"tokens": (TensorProto.INT64, ("batch", 3))})
    with pytest.raises(InputError, match=r"m\.onnx must run on the inputs that the models are timed on"):
        time_models([path], inputs=[np.full((1, 3), 9, dtype=np.int64)])


def test_a_file_that_cannot_be_run_is_refused(tmp_path, models):
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    with pytest.raises(InputError, match=r"broken\.onnx"):
        time_models([models["tiny"], tmp_path / "broken.onnx"])


def test_a_session_tells_how_it_was_taken(models):
    (baseline, other), session = time_models([models["tiny"], models["conv"]], precision=1.0, max_seconds=20.0)
    assert (baseline.ratio, baseline.ratio_low, baseline.ratio_high) == (1.0, 1.0, 1.0)
    assert other.ratio_low < other.ratio < other.ratio_high < 1
    assert other.p50_ms > baseline.p50_ms
    assert (session.batch_size, session.threads, session.rounds) == (1, 1, 10)
    assert session.calls == 10 * 10 * 4
    assert session.noise.ratio_low < session.noise.ratio < session.noise.ratio_high
    assert session.seconds > 0
    assert gc.isenabled()


def test_ten_rounds_are_taken_even_without_time_for_them(models):
    _, session = time_models([models["tiny"]], precision=0.0, max_seconds=0.0)
    assert session.rounds == 10
    assert session.calls == 10 * 2 * 4


@dataclass
class Machine:
    """A machine whose clock only calls move: what the models cost is known, and so is all that disturbs them."""

    costs: Mapping[str, float]
    """Seconds of a warm call by name of the file."""
    filling: frozenset[str] = frozenset()
    """Models that leave nothing of the others in the caches: the next 8 calls of each cost 1.5 times as much."""
    noise: float = 0.01
    seed: int = 0
    now: float = 0.0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.cold_calls = dict.fromkeys(self.costs, 8)

    def perf_counter(self) -> float:
        return self.now

    def perf_counter_ns(self) -> int:
        return round(self.now * 1e9)

    def ready_call(self, path: Path, _inputs: object, *, threads: int) -> Callable[[], None]:
        assert threads == 1
        return partial(self.call, path.name)

    def call(self, name: str) -> None:
        pace = 1 + 0.2 * math.sin(self.now)  # the machine gets slower and faster by turns
        cold = 1.5 if self.cold_calls[name] > 0 else 1.0
        waiting = self.random.uniform(2, 40) if self.random.random() < 0.3 else 1.0  # for other processes
        self.now += self.costs[name] * pace * cold * waiting * (1 + abs(self.random.gauss(0, self.noise)))
        self.cold_calls[name] -= 1
        if name in self.filling:
            self.cold_calls |= {other: 8 for other in self.costs if other != name}

    def time(
        self, *names: str, precision: float = 0.005, max_seconds: float = 20.0
    ) -> tuple[tuple[Latency, ...], LatencySession]:
        inputs = [np.zeros((1, 4), dtype=np.float32)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("compressor.measure.latency.time", self)
            patch.setattr("compressor.measure.latency.ready_call", self.ready_call)
            paths = [Path(name) for name in names]
            return time_models(paths, inputs=inputs, precision=precision, max_seconds=max_seconds)


COSTS = {"conv": 3e-4, "conv_5_percent_more": 3.15e-4, "tiny": 2e-5, "large": 2e-3}


@pytest.mark.parametrize("seed", range(5))
def test_a_model_does_not_differ_from_itself(seed):
    (_, itself), session = Machine(COSTS, seed=seed).time("conv", "conv")
    for found in (itself, session.noise):
        assert found.ratio_low <= 1.002
        assert found.ratio_high >= 0.998
        assert found.ratio == pytest.approx(1, abs=0.005)  # the precision that was asked for


@pytest.mark.parametrize("seed", range(5))
def test_a_model_that_is_5_percent_slower_is_found(seed):
    (_, slower), _ = Machine(COSTS, seed=seed).time("conv", "conv_5_percent_more")
    assert slower.ratio_high < 1
    assert slower.ratio == pytest.approx(1 / 1.05, rel=0.005)


@pytest.mark.parametrize("seed", range(5))
def test_a_large_neighbour_does_not_make_a_small_model_slower(seed):
    machine = Machine(COSTS, filling=frozenset({"large"}), seed=seed)
    (_, small, large), _ = machine.time("conv", "tiny", "large")
    assert small.ratio == pytest.approx(3e-4 / 2e-5, rel=0.01)  # with cold caches it takes 1.5 times as long
    assert large.ratio == pytest.approx(3e-4 / 2e-3, rel=0.01)


def test_rounds_go_on_until_the_precision_is_reached():
    latencies, session = Machine(COSTS, noise=0.1).time("tiny", "conv", precision=0.002, max_seconds=1000)
    assert max(one.interval.half_width for one in (*latencies, session.noise)) <= 0.002
    assert session.rounds > 10


def test_rounds_end_when_the_time_is_up():
    latencies, session = Machine(COSTS, noise=0.1).time("tiny", "conv", precision=1e-5, max_seconds=5)
    assert max(one.interval.half_width for one in (*latencies, session.noise)) > 1e-5
    assert 2 * 5 <= session.seconds < 2 * 5 * 1.2  # the last round began before


def test_timing_needs_no_torch():
    program = "import sys, compressor.measure.latency; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
