"""What a report says in words: what was asked of a stage, where it lost, and how far the numbers can be trusted."""

import math
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

from compressor.records.measurements import LatencySession, MetricInfo
from compressor.records.report import Preparation, Report, Row
from compressor.text.figures import change, count, milliseconds, printable, size, size_ratio, speed, times, value

_MANY_ZEROS = 0.1
"""Share of the parameters from which on zeros are worth a sentence: a few biases or codes are zero in many models."""

_LEAST_GROWTH = 0.005
"""A file that grows by less than this part is no worse: the names and labels that an export writes are a few bytes."""


def headline(report: Report) -> str:
    """What came in and what came out, in one line."""
    first, last = report.rows[0], report.rows[-1]
    before, after = first.measurement.size_bytes, last.measurement.size_bytes
    parts = [size_ratio(before, after).replace("no difference", "no smaller")]
    if last.latency:
        parts.append(speed(last.latency).partition(" [")[0].replace("no difference", "no faster"))
    for metric in report.metrics:
        start, end = first.measurement.metrics[metric.name], last.measurement.metrics[metric.name]
        parts.append(f"{printable(metric.name)} {value(metric, start)} to {value(metric, end)}")
    return f"{size(before)} to {size(after)}: {', '.join(parts)}"


def row_names(report: Report) -> tuple[str, ...]:
    """Name of each row: its stage, with the number of the row where several have the same."""
    rows_of = Counter(row.stage for row in report.rows)
    return tuple(
        printable(row.stage) + (f" (row {number})" if rows_of[row.stage] > 1 else "")
        for number, row in enumerate(report.rows, start=1)
    )


def remarks(report: Report) -> tuple[str, ...]:
    """What each row was asked for, and one sentence for every way in which it is worse than the row before it."""
    sentences: list[str] = []
    for (before, old), (after, new) in pairwise(zip(report.rows, row_names(report), strict=True)):
        sentences += _achievements(after, new)
        sentences += _larger(before, after, old, new)
        sentences += _slower(before, after, old, new, report.latency_session)
        sentences += _idle_zeros(before, after, old, new, report.latency_session)
        sentences += _lost_zeros(before, after, old, new)
        for metric in report.metrics:
            sentences += _worse(before, after, old, new, metric)
    return tuple(sentences)


def method(report: Report) -> tuple[str, str]:
    """How sizes and metrics were measured, and how latencies were."""
    samples = report.rows[-1].measurement.samples
    return (
        f"Every row was exported to ONNX and measured under ONNX Runtime, on the {samples:,} samples of the test "
        "split. Sizes are those of the file, with its external data if it has any; 1 kB = 1000 B.",
        f"{timing(report)} All models took turns in one process, warm, in rounds with sessions opened anew; a ratio "
        "compares the fastest calls of each round, with Student's 95 % interval over rounds.",
    )


def readiness(preparation: Preparation) -> str:
    """How long it took to make something ready for later stages, such as soft labels."""
    seconds = f"{preparation.seconds:.1f} s"
    if preparation.reused:
        return f"{preparation.stage} was taken from the store; it took {seconds} when it ran."
    return f"{preparation.stage} took {seconds}."


def timing(report: Report) -> str:
    """How the latencies were taken and how much of a difference is noise."""
    session = report.latency_session
    if session is None:
        return "Latency was not measured."
    baseline = report.rows[0].latency
    return (
        f"Latency: {conditions(session)}"
        + (f"; the baseline takes {milliseconds(baseline.p50_ms)}" if baseline else "")
        + f". Noise floor: the baseline against itself shows {speed(session.noise)}."
    )


def conditions(session: LatencySession) -> str:
    """How latencies were taken: threads, batch, rounds and calls."""
    return (
        f"{count(session.threads, 'thread')}, batch of {session.batch_size}, {session.rounds} rounds with "
        f"{session.calls} timed calls of each model in {session.seconds:.0f} s"
    )


def _achievements(after: Row, new: str) -> Iterator[str]:
    for one in after.reached:
        asked, achieved = (
            f"{number:,.0f}" if number >= 1000 else f"{number:.3g}" for number in (one.asked, one.achieved)
        )
        yield f"{new} was asked for {one.setting} {asked} and achieved {achieved}."


def _larger(before: Row, after: Row, old: str, new: str) -> Iterator[str]:
    small, large = before.measurement.size_bytes, after.measurement.size_bytes
    if large > small * (1 + _LEAST_GROWTH):
        yield f"{new} is {size(large - small)} larger than {old}: {size(large)} after {size(small)}."


def _slower(before: Row, after: Row, old: str, new: str, session: LatencySession | None) -> Iterator[str]:
    if before.latency is None or after.latency is None or session is None:
        return
    surely = before.latency.ratio_low / after.latency.ratio_high
    if math.log(surely) > session.noise.interval.distance:
        automatic = after.settings.get("keep_float", "auto") == "auto"
        advice = "" if automatic else "; with `keep_float: auto` layers that int8 makes slower compute in float"
        yield f"{new} is {times(after.latency.ratio / before.latency.ratio, 'faster', 'slower')} than {old}{advice}."


def _idle_zeros(before: Row, after: Row, old: str, new: str, session: LatencySession | None) -> Iterator[str]:
    was, now = before.measurement, after.measurement
    if now.parameters != was.parameters or now.nonzero >= was.nonzero or now.size_bytes < 0.99 * was.size_bytes:
        return
    share = _zero_share(after)
    if share < _MANY_ZEROS:
        return
    yield (
        f"{100 * share:.0f} % of the parameters of {new} are zero, {now.nonzero:,} of {now.parameters:,} are not, but "
        f"its file is as large as that of {old}, {size(now.size_bytes)} after {size(was.size_bytes)}: zeros are stored "
        f"and multiplied like other numbers; they only compress better, to {size(now.transfer_bytes)} after "
        f"{size(was.transfer_bytes)} (gzip).{_speed_with_zeros(before, after, old, session)}"
    )


def _zero_share(row: Row) -> float:
    parameters = row.measurement.parameters
    return (parameters - row.measurement.nonzero) / parameters if parameters else 0.0


def _lost_zeros(before: Row, after: Row, old: str, new: str) -> Iterator[str]:
    """A later stage keeps zeros, unless it starts from other weights, as a student of its own does."""
    was, now = (_zero_share(row) for row in (before, after))
    if was >= _MANY_ZEROS and now < was / 2:
        shares = f"{100 * now:.0f} % of its parameters are zero, after {100 * was:.0f} % of those of {old}"
        yield f"{new} is dense: {shares}."


def _speed_with_zeros(before: Row, after: Row, old: str, session: LatencySession | None) -> str:
    if before.latency is None or after.latency is None or session is None:
        return ""
    faster = math.log(after.latency.ratio_low / before.latency.ratio_high) > session.noise.interval.distance
    is_baseline = before.latency.ratio_low == before.latency.ratio_high
    return (
        f" It is {'faster' if faster else 'no faster'}; beside the baseline: {speed(after.latency)}"
        f"{'' if is_baseline else f', {old} {speed(before.latency)}'}."
    )


def _worse(before: Row, after: Row, old: str, new: str, metric: MetricInfo) -> Iterator[str]:
    was, now = before.measurement.metrics[metric.name], after.measurement.metrics[metric.name]
    if now < was if metric.higher_is_better else now > was:
        direction = "lower" if metric.higher_is_better else "higher"
        yield (
            f"{new} has a {direction} {printable(metric.name)} than {old}: "
            f"{value(metric, now)} after {value(metric, was)} ({change(metric, was, now)})."
        )
