"""The figures of the page: from the rows of a report to drawings, each with a title, a description and a table."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TypeVar

from compressor.records.measurements import Latency, MetricInfo
from compressor.records.report import Report, Row
from compressor.report.classifier import class_name
from compressor.report.page import charts
from compressor.report.page.drawings import Bar, Bars, Mark, Pair, Pairs, Picture, Plot, Tick
from compressor.report.remarks import row_names
from compressor.text.figures import change, count, milliseconds, share, size, size_ratio, speed, value

_Item = TypeVar("_Item")

MOST_CLASSES, MOST_CHANNELS, MOST_LOSSES, MOST_EPOCHS, MOST_POINTS = 30, 40, 24, 20, 500
"""So many classes, layers, curves, epochs in a table and epochs in a curve are shown; JSON has all."""
_MOST_NUMBERS = 20
"""Of more stages than this, only those on the front are numbered in the drawing: numbers would hide it."""
_TALL, _FLAT = 260, 120
"""Heights of drawings, in pixels."""
_LOGARITHMIC_FROM = 20
"""A loss that falls by this factor is drawn on a logarithmic scale: on a linear one its last epochs would be a line."""
_SHARE = MetricInfo(name="accuracy", unit="%", higher_is_better=True)


def left_out(number: int, things: str) -> str:
    """What is said of things that are left out; empty if there are none."""
    return f"and {number:,} more {things}, all in report.json" if number else ""


def size_picture(report: Report) -> Picture:
    """Size of each row's file, as a bar from zero."""
    names, sizes = row_names(report), [row.measurement.size_bytes for row in report.rows]
    compared = ["the baseline", *(size_ratio(sizes[0], found) for found in sizes[1:])]
    table = [
        ["stage", "size", "size vs baseline", "transfer (gzip)"],
        *(
            [name, size(row.measurement.size_bytes), text, size(row.measurement.transfer_bytes)]
            for name, row, text in zip(names, report.rows, compared, strict=True)
        ),
    ]
    bars = tuple(
        Bar(name, f"{size(found)}, {text}", charts.Scale(0, max(sizes)).at(found))
        for name, text, found in zip(names, compared, sizes, strict=True)
    )
    return Picture("Size", "The file of each stage, with its external data.", Bars(bars), table)


def latency_picture(report: Report) -> Picture | None:
    """Time of one inference of each row as a share of the baseline's, with its interval; None if none was timed."""
    timed = _list_timed(report)
    if not timed:
        return None
    longest = charts.Scale(0, max(1 / latency.ratio_low for _, _, latency in timed))
    bars, table = [], [["stage", "latency (p50)", "latency vs baseline (95 % interval)"]]
    for name, row, latency in timed:
        compared, taken = _compare(row, latency, report), milliseconds(latency.p50_ms)
        ends = longest.at(1 / latency.ratio_high), longest.at(1 / latency.ratio_low)
        bars.append(Bar(name, f"{taken}, {compared}", longest.at(1 / latency.ratio), *ends))
        table.append([name, taken, compared])
    described = (
        "Time of one inference as a share of the baseline's, timed beside it; the line at the end of a bar is its 95 % "
        "interval."
    )
    return Picture("Latency", described, Bars(tuple(bars)), table)


def tradeoff_picture(report: Report) -> Picture | None:
    """The first metric of each row against its speed, with the Pareto front; None with fewer than two such rows."""
    timed = _list_timed(report)
    if not report.metrics or len(timed) < 2:
        return None
    metric = report.metrics[0]
    sign = 1 if metric.higher_is_better else -1
    found = [(latency, row.measurement.metrics[metric.name]) for _, row, latency in timed]
    best = charts.front([(latency.ratio_low, latency.ratio_high, sign * reached) for latency, reached in found])
    described = (
        f"Each {'number' if len(found) <= _MOST_NUMBERS else 'point'} is a stage. Filled points are on the Pareto "
        "front: no other of them is better and not surely slower, or as good and surely faster; the line is what they "
        "reach. Lines through points are 95 % intervals; where two do not meet, one stage is surely faster."
    )
    table = [
        ["stage", "number", "latency vs baseline (95 % interval)", metric.name, "on the Pareto front"],
        *(
            [
                name,
                str(index + 1),
                _compare(row, latency, report),
                value(metric, found[index][1]),
                "yes" if index in best else "no",
            ]
            for index, (name, row, latency) in enumerate(timed)
        ),
    ]
    key = tuple(f"{name}, on the front" if index in best else name for index, (name, *_) in enumerate(timed))
    return Picture(f"{metric.name} against speed", described, _tradeoff_plot(metric, found, best, key), table)


def loss_pictures(report: Report) -> tuple[Picture, ...]:
    """The course of each loss of each row over its epochs."""
    return tuple(
        _loss_picture(f"{name}: {loss}", [epoch.get(loss, math.nan) for epoch in row.losses])
        for name, row in zip(row_names(report), report.rows, strict=True)
        for loss in dict.fromkeys(loss for epoch in row.losses for loss in epoch)
    )


def class_picture(report: Report) -> Picture | None:
    """Accuracy per class of baseline and delivered model; None unless both have one."""
    first, last = report.rows[0].quality, report.rows[-1].quality
    if len(report.rows) < 2 or not first or not last or not first.per_class_accuracy or not last.per_class_accuracy:
        return None
    both = zip(first.per_class_accuracy, last.per_class_accuracy, strict=False)
    every = [(index, *pair) for index, pair in enumerate(both)]
    known = [(index, before, after) for index, before, after in every if before is not None and after is not None]
    if not known:
        return None
    shown = _extreme(known, MOST_CLASSES, lambda one: -abs(one[2] - one[1]))
    axis = charts.spanning([accuracy for _, *both in shown for accuracy in both], least=0.02)
    axis = charts.Scale(max(axis.low, 0.0), min(axis.high, 1.0))
    pairs = tuple(
        Pair(
            class_name(index, report),
            f"{share(before)} to {share(after)} ({change(_SHARE, before, after)})",
            axis.at(before),
            axis.at(after),
        )
        for index, before, after in shown
    )
    chosen = f"The {len(shown)} classes whose accuracy changed most. " if len(shown) < len(known) else ""
    described = (
        f"{chosen}Share of each class's test samples that are right: a ring is the baseline, a dot is delivered."
    )
    return Picture(
        "Accuracy per class",
        described,
        Pairs(pairs, _ticks(axis, _percent, most=3), "baseline", "delivered"),
        _class_table(report, shown),
        left_out(len(known) - len(shown), "classes"),
    )


def channel_pictures(report: Report) -> Iterator[Picture]:
    """Channels that layers keep, for each row whose layers are those of the row before it, fewer of them channels."""
    for (old, before), (new, after) in pairwise(zip(row_names(report), report.rows, strict=True)):
        if before.channels.keys() == after.channels.keys() and before.channels != after.channels:
            yield _channel_picture(before.channels, after.channels, old, new)


def _list_timed(report: Report) -> list[tuple[str, Row, Latency]]:
    return [(name, row, row.latency) for name, row in zip(row_names(report), report.rows, strict=True) if row.latency]


def _compare(row: Row, latency: Latency, report: Report) -> str:
    return "the baseline" if row is report.rows[0] else speed(latency)


def _tradeoff_plot(
    metric: MetricInfo, found: Sequence[tuple[Latency, float]], best: Sequence[int], key: tuple[str, ...]
) -> Plot:
    ratios = [ratio for latency, _ in found for ratio in (latency.ratio_low, latency.ratio_high)]
    x = charts.spanning(ratios, logarithmic=charts.spans_orders(ratios, factor=4))
    y = charts.spanning([reached for _, reached in found], least=0.004 if metric.unit == "%" else None)
    points = [(x.at(latency.ratio), _down(y.at(reached))) for latency, reached in found]
    marks = tuple(
        Mark(*point, x.at(latency.ratio_low), x.at(latency.ratio_high), index in best)
        for index, (point, (latency, _)) in enumerate(zip(points, found, strict=True))
    )
    numbered = range(len(found)) if len(found) <= _MOST_NUMBERS else best
    return Plot(
        _TALL,
        "times as fast as the baseline; further right is better",
        f"{metric.name} (test); {'higher' if metric.higher_is_better else 'lower'} is better",
        _ticks(x, lambda tick: f"{tick:g}x"),
        _heights(y, _percent if metric.unit == "%" else "{:.4g}".format),
        (charts.path(charts.staircase([points[index] for index in best])),),
        tuple(sorted(marks, key=lambda mark: mark.strong)),  # the front lies above the others
        charts.labels(points, [index + 1 for index in numbered], height=_TALL),
        key,
    )


def _class_table(report: Report, shown: Sequence[tuple[int, float, float]]) -> list[list[str]]:
    """Accuracies of all rows that have them: of a student too that later stages changed. A class may be unknown."""
    found = [
        (name, dict(enumerate(row.quality.per_class_accuracy)))
        for name, row in zip(row_names(report), report.rows, strict=True)
        if row.quality and row.quality.per_class_accuracy
    ]
    accuracies = [[accuracy_of.get(index) for _, accuracy_of in found] for index, *_ in shown]
    return [
        ["class", *(name for name, _ in found), "change, first to last"],
        *(
            [
                class_name(index, report),
                *("unknown" if accuracy is None else share(accuracy) for accuracy in row),
                change(_SHARE, before, after),
            ]
            for (index, before, after), row in zip(shown, accuracies, strict=True)
        ),
    ]


def _loss_picture(title: str, losses: Sequence[float]) -> Picture:
    epochs = list(enumerate(losses, start=1))
    known = [(epoch, loss) for epoch, loss in epochs if math.isfinite(loss)]
    values = [loss for _, loss in known]
    logarithmic = charts.spans_orders(values, factor=_LOGARITHMIC_FROM)
    x, y = charts.Scale(1, max(len(losses), 2)), charts.spanning(values, logarithmic=logarithmic)
    segments: list[list[charts.Point]] = [[]]
    for epoch, loss in charts.thin(epochs, MOST_POINTS):
        if math.isfinite(loss):
            segments[-1].append((x.at(epoch), _down(y.at(loss))))
        elif segments[-1]:
            segments.append([])
    (_, begun), (last, ended) = known[0], known[-1]
    # a line through one point would not be seen
    marked = {segment[0] for segment in segments if len(segment) == 1} | {(x.at(last), _down(y.at(ended)))}
    listed = charts.thin(known, MOST_EPOCHS)
    plot = Plot(
        _FLAT,
        "epoch",
        "loss, logarithmic" if logarithmic else "loss",
        tuple(tick for tick in _ticks(x, "{:.10g}".format) if "." not in tick.text),
        _heights(y, "{:.4g}".format),
        tuple(charts.path(segment) for segment in segments if len(segment) > 1),
        tuple(Mark(*point, point[0], point[0], strong=True) for point in sorted(marked)),
    )
    some = "" if len(known) == len(losses) else f"{len(known):,} of "
    described = f"{begun:.4g} to {ended:.4g} in {some}{count(len(losses), 'epoch')}"
    table = [["epoch", "loss"], *([str(epoch), f"{loss:.4g}"] for epoch, loss in listed)]
    return Picture(title, described, plot, table, more_rows=left_out(len(known) - len(listed), "epochs"))


def _channel_picture(before: Mapping[str, int], after: Mapping[str, int], old: str, new: str) -> Picture:
    layers = [(path, channels, after[path]) for path, channels in before.items()]
    shown = _extreme(layers, MOST_CHANNELS, lambda one: one[2] / one[1])
    bars = tuple(
        Bar(path, f"{kept:,} of {channels:,}", charts.Scale(0, channels).at(kept)) for path, channels, kept in shown
    )
    table = [
        ["layer", f"channels after {old}", f"after {new}", "kept"],
        *([path, f"{channels:,}", f"{kept:,}", share(kept / channels)] for path, channels, kept in shown),
    ]
    fewer = sum(kept < channels for _, channels, kept in layers)
    described = (
        f"{fewer} of {len(layers)} layers have fewer channels than after {old}; of all, {sum(after.values()):,} of "
        f"{sum(before.values()):,} remain. The frame is what a layer had, the bar what it keeps."
    )
    drawing, more = Bars(bars, whole=True), left_out(len(layers) - len(shown), "layers")
    return Picture(f"{new}: channels that each layer keeps", described, drawing, table, more)


def _extreme(items: Sequence[_Item], most: int, key: Callable[[_Item], float]) -> list[_Item]:
    """Up to `most` of `items`, those of smallest `key`, in the order that they had."""
    chosen = sorted(range(len(items)), key=lambda index: key(items[index]))[:most]
    return [items[index] for index in sorted(chosen)]


def _ticks(scale: charts.Scale, text: Callable[[float], str], *, most: int = 4) -> tuple[Tick, ...]:
    """Round numbers of a horizontal axis, in words that have room beside each other on a phone."""
    return tuple(Tick(scale.at(tick), text(tick)) for tick in scale.ticks(most))


def _heights(scale: charts.Scale, text: Callable[[float], str]) -> tuple[Tick, ...]:
    """Round numbers of a vertical axis, whose places are counted downwards."""
    return tuple(Tick(_down(scale.at(tick)), text(tick)) for tick in scale.ticks(5))


def _percent(tick: float) -> str:
    return f"{100 * tick:.10g} %"


def _down(percent: float) -> float:
    return round(100 - percent, 2)
