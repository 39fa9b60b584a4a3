"""Time ONNX files side by side under ONNX Runtime; the confidence interval of each ratio to the first. Knows no torch.

Duet benchmarking (Bulej et al. 2020): all models live in one process and take turns, so that whatever else the machine
does hits all of them alike. A round compares their fastest calls. The interval is over rounds: each opens its sessions
anew, so that rounds differ as two runs do. Calls resemble their neighbours; an interval over calls would be too narrow.
"""

import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from compressor.errors import InputError
from compressor.onnx_files.inputs import Array, arrange, describe, random_inputs, signature
from compressor.onnx_files.runtime import ERRORS, open_session
from compressor.records.measurements import Interval, Latency, LatencySession
from compressor.system.progress import progress_bar

_Times: TypeAlias = NDArray[np.int64]
"""Nanoseconds of each timed call of one round, (passes, models, calls of a visit)."""

_Inputs: TypeAlias = Mapping[str, Array] | Sequence[Array]

_MIN_ROUNDS = 10
_PASSES = 10
_WARM_UP_CALLS, _WARM_UP_SECONDS = 20, 0.05
_UNTIMED_CALLS, _LEAST_UNTIMED_SECONDS, _MOST_UNTIMED_SECONDS = 8, 0.001, 0.01
_TIMED_CALLS, _TIMED_SECONDS = 4, 0.02


def ratio_interval(log_ratios: Sequence[float]) -> Interval:
    """Student-t interval, of 95 %, of the ratio whose logarithm each round found; at least 2 rounds."""
    mean = statistics.fmean(log_ratios)
    error = statistics.stdev(log_ratios) / math.sqrt(len(log_ratios))
    half_width = t_quantile(len(log_ratios) - 1) * error
    return Interval(math.exp(mean), math.exp(mean - half_width), math.exp(mean + half_width))


@cache
def t_quantile(degrees_of_freedom: int, confidence: float = 0.95) -> float:
    """The t that |T| stays below with probability `confidence`, T of Student's distribution.

    Bisects the closed form for whole degrees of freedom (Abramowitz and Stegun 1972, 26.7.3 and 26.7.4).
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        if _probability_within(middle, degrees_of_freedom) < confidence:
            low = middle
        else:
            high = middle
    return math.sqrt(degrees_of_freedom) * math.tan(low)


def _probability_within(angle: float, degrees_of_freedom: int) -> float:
    """P(|T| < √n · tan(angle)), T of Student's distribution with n degrees of freedom."""
    odd = degrees_of_freedom % 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for k in range(degrees_of_freedom // 2):
        total += term
        term *= math.cos(angle) ** 2 * (2 * k + 1 + odd) / (2 * k + 2 + odd)
    return (angle + math.sin(angle) * total) * 2 / math.pi if odd else math.sin(angle) * total


def visits(models: int, round_index: int, passes: int) -> Iterator[tuple[int, ...]]:
    """The order in which each pass of a round visits the models: A B C, C B A, A B C, …; rounds start one further on.

    Going to and fro, and starting one further on in each round, shares out evenly what is not equal: a drift of the
    machine, the place in a pass, and the model that ran before.
    """
    forward = tuple((position + round_index) % models for position in range(models))
    for index in range(passes):
        yield forward if index % 2 == 0 else forward[::-1]


def untimed_calls(seconds: float) -> int:
    """How many calls of `seconds` each a visit makes before those that it times.

    The models visited before have taken the caches: the first call of a 2 MB model costs three times its steady time,
    and a 15 MB model needs eight calls to get back to it (benchmarks/latency.py). Small models also get a millisecond,
    in which to recover from what another process did to the caches.
    """
    return max(1, _clamp(_LEAST_UNTIMED_SECONDS / seconds, _UNTIMED_CALLS, _MOST_UNTIMED_SECONDS / seconds))


def time_models(
    paths: Sequence[Path],
    *,
    inputs: _Inputs | None = None,
    threads: int = 1,
    precision: float = 0.005,
    max_seconds: float = 20.0,
) -> tuple[tuple[Latency, ...], LatencySession]:
    """Time one inference of each ONNX file on the CPU; ratios are against the first file.

    `inputs` are the arrays of one batch, by name or in the order of the models' inputs. A file whose inputs have other
    names takes them in the order given. Unless given, they are made up for a batch of 1 from the first file. Adds
    rounds until
    the half width of every interval is at most `precision` (0.005 = 0.5 %) or `max_seconds` per file have passed, but
    no fewer than 10 rounds. Times `session.run` as Python calls it, every model warm: the steady state of a process
    that serves one model.
    Raises InputError if a file cannot be run or does not take `inputs`.
    """
    given = random_inputs(paths[0]) if inputs is None else inputs
    if not given:
        msg = f"{paths[0]} must have an input to be timed on, got none"
        raise InputError(msg)
    contestants = (*paths, paths[0])  # the last is the baseline again: what it seems to gain is the noise floor
    start, budget = time.perf_counter(), max_seconds * len(paths)
    rounds: list[_Times] = []
    with progress_bar(unit=" timing round") as bar:
        for index in itertools.count():
            rounds.append(_time_round(contestants, given, threads, index, budget / _MIN_ROUNDS))
            bar.update()
            seconds = time.perf_counter() - start
            if len(rounds) < _MIN_ROUNDS:
                continue
            intervals = _intervals(rounds)
            if seconds >= budget or max(interval.half_width for interval in intervals) <= precision:
                break
    *latencies, noise = (_latency(rounds, model, interval) for model, interval in enumerate(intervals))
    return tuple(latencies), LatencySession(
        batch_size=_batch_size(given),
        threads=threads,
        rounds=len(rounds),
        calls=sum(times.shape[0] * times.shape[2] for times in rounds),
        seconds=seconds,
        noise=noise,
    )


def ready_call(path: Path, inputs: _Inputs, *, threads: int) -> Callable[[], object]:
    """Open a file and run it once on `inputs`, floats in its own type; the call that is returned runs it again.

    Raises InputError if it does not take `inputs` or does not run on them.
    """
    session = open_session(path, threads=threads)
    wanted = signature(session, path)
    arrays = arrange(inputs, wanted)
    timed_on = ", ".join(describe(array.dtype, array.shape) for array in arrays)
    if len(wanted) != len(arrays) or not all(
        one.takes(array.dtype, array.shape) for one, array in zip(wanted, arrays, strict=True)
    ):
        taken = ", ".join(map(str, wanted))
        msg = f"{path} must take the inputs that the models are timed on, {timed_on}, got {taken}"
        raise InputError(msg)
    call = partial(session.run, None, {one.name: array for one, array in zip(wanted, arrays, strict=True)})
    try:
        call()
    except ERRORS as error:
        msg = f"{path} must run on the inputs that the models are timed on, {timed_on}: {error}"
        raise InputError(msg) from error
    except RuntimeError as error:
        given = ", ".join(f"{node.name!r} {node.type}" for node in session.get_outputs())
        msg = f"{path} must give outputs of types that NumPy has, got {given}: {error}"
        raise InputError(msg) from error
    return call


def log_ratios(times: _Times) -> NDArray[np.float64]:
    """For each model, log(time of the first model / its time), where a time is that of the fastest call of a round.

    Other processes only ever add to a time. With eight busy processes on two cores, ratios of the median of 1 ms calls
    moved by 13 % within five minutes, those of the fastest call by 1.5 %.
    """
    fastest = np.log(times.min(axis=(0, 2)))
    ratios: NDArray[np.float64] = fastest[0] - fastest
    return ratios


def _intervals(rounds: Sequence[_Times]) -> list[Interval]:
    by_model = np.stack([log_ratios(times) for times in rounds], axis=1)
    return [ratio_interval(ratios.tolist()) for ratios in by_model]


def _latency(rounds: Sequence[_Times], model: int, interval: Interval) -> Latency:
    p50_ns = float(np.median(np.concatenate([times[:, model].ravel() for times in rounds])))
    return Latency(p50_ms=p50_ns / 1e6, ratio=interval.value, ratio_low=interval.low, ratio_high=interval.high)


def _time_round(paths: Sequence[Path], inputs: _Inputs, threads: int, index: int, budget: float) -> _Times:
    """Open every model anew and time it in turns for up to `budget` seconds, or two passes if those take longer."""
    (order,) = visits(len(paths), index, passes=1)
    calls = {model: ready_call(paths[model], inputs, threads=threads) for model in order}
    seconds = {model: _warm_up(calls[model]) for model in order}
    untimed = {model: untimed_calls(seconds[model]) for model in order}
    timed = _clamp(1, _TIMED_SECONDS / max(seconds.values()), _TIMED_CALLS)
    pass_seconds = sum(seconds[model] * (untimed[model] + timed) for model in order)
    passes = 2 * _clamp(1, budget / pass_seconds / 2, _PASSES // 2)
    times = np.empty((passes, len(paths), timed), dtype=np.int64)
    with _no_garbage_collection():
        for row, visited in zip(times, visits(len(paths), index, passes), strict=True):
            for model in visited:
                row[model] = _visit(calls[model], untimed[model], timed)
    return times


def _clamp(low: float, value: float, high: float) -> int:
    return int(min(max(value, low), high))


def _visit(call: Callable[[], object], untimed: int, timed: int) -> list[int]:
    for _ in range(untimed):
        call()
    stamps = [time.perf_counter_ns()]
    for _ in range(timed):
        call()
        stamps.append(time.perf_counter_ns())
    return [after - before for before, after in itertools.pairwise(stamps)]


def _warm_up(call: Callable[[], object]) -> float:
    """Seconds of one call, after the first ones that allocate memory."""
    start = time.perf_counter()
    found: list[float] = []
    while len(found) < 3 or (len(found) < _WARM_UP_CALLS and time.perf_counter() - start < _WARM_UP_SECONDS):
        before = time.perf_counter()
        call()
        found.append(time.perf_counter() - before)
    return statistics.median(found)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _batch_size(inputs: _Inputs) -> int:
    arrays = inputs.values() if isinstance(inputs, Mapping) else inputs
    return next((len(array) for array in arrays if array.ndim), 1)
