"""What changed between two reports: settings, stages, models, how they were measured and judged, and environment."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any, TypeAlias, final

from compressor.records.measurements import MetricInfo
from compressor.records.report import Report, Row
from compressor.report.classifier import fidelity_figures, quality_figures
from compressor.text.figures import change, count, printable, speed, value
from compressor.text.layout import escape, markdown_bullets

_Texts: TypeAlias = Mapping[str, str]
"""What is compared, by name, each written so that equal texts are no change."""

_MOMENTARY = {"load_average", "steal_share"}
"""Facts of an environment that change from minute to minute."""


@final
@dataclass(frozen=True)
class DifferenceSection:
    """What changed in one part of a report, a line each."""

    title: str
    lines: tuple[str, ...]


def differences(old: Report, new: Report) -> tuple[DifferenceSection, ...]:
    """What changed, part by part; parts without a change are left out.

    A speed has changed where the 95 % intervals do not overlap, any other figure where it is written differently.
    Stages and rows are paired by name, in order; the delivered models are compared in any case.
    """
    found = [
        DifferenceSection("Settings", tuple(_setting_changes(old.settings, new.settings))),
        DifferenceSection("Stages", tuple(_stage_changes(_stages(old.settings), _stages(new.settings)))),
        *_model_changes(old, new),
        DifferenceSection("How it was measured", tuple(_changes(_conditions(old, new), _conditions(new, old)))),
        DifferenceSection("Gate", tuple(_changes(_statuses(old), _statuses(new)))),
        DifferenceSection("Environment", tuple(_changes(_facts(old), _facts(new)))),
    ]
    return tuple(part for part in found if part.lines)


def to_text(parts: Sequence[DifferenceSection]) -> str:
    """Plain text for a terminal, without a final newline."""
    texts = ["\n".join([printable(part.title), *(f"  {printable(line)}" for line in part.lines)]) for part in parts]
    return "\n\n".join(texts) or "nothing changed"


def to_markdown(parts: Sequence[DifferenceSection]) -> str:
    """Markdown; names are escaped."""
    texts = [f"## {escape(part.title)}\n\n{markdown_bullets(part.lines)}" for part in parts]
    return "\n\n".join(["# What changed", *(texts or ["Nothing changed."])]) + "\n"


def _changes(was: _Texts, now: _Texts) -> Iterator[str]:
    for name in dict.fromkeys([*was, *now]):
        if was.get(name) != now.get(name):
            yield f"{name}: {was.get(name, 'absent')} -> {now.get(name, 'absent')}"


def _pairs(was: Sequence[str], now: Sequence[str]) -> dict[int, int]:
    """Position in `was` by position in `now`, of names that both have; both positions rise."""
    blocks = SequenceMatcher(a=was, b=now, autojunk=False).get_matching_blocks()
    return {block.b + step: block.a + step for block in blocks for step in range(block.size)}


def _setting_changes(was: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """By dotted path, as `--set` takes it for the new pipeline; of stages only those that both have."""
    old, new = _stages(was), _stages(now)
    yield from _changes(*(_leaves({**settings, "stages": {}}) for settings in (was, now)))
    for position, earlier in _pairs([*map(_label, old)], [*map(_label, new)]).items():
        path = f"stages.{position}."
        yield from _changes(_leaves(old[earlier], path), _leaves(new[position], path))


def _stage_changes(was: Sequence[Any], now: Sequence[Any]) -> Iterator[str]:
    pairs = _pairs([*map(_label, was)], [*map(_label, now)])
    yield from (f"removed: stages.{at} {_label(one)}" for at, one in enumerate(was) if at not in pairs.values())
    yield from (f"added: stages.{at} {_label(one)}" for at, one in enumerate(now) if at not in pairs)


def _stages(settings: Mapping[str, Any]) -> Sequence[Any]:
    found = settings.get("stages")
    return found if isinstance(found, Sequence) and not isinstance(found, str) else ()


def _label(stage: Any) -> str:
    return str(stage.get("stage")) if isinstance(stage, Mapping) else str(stage)


def _leaves(value: Any, path: str = "") -> dict[str, str]:
    """What is no mapping, as JSON, by dotted path."""
    if not isinstance(value, Mapping):
        return {path.removesuffix("."): json.dumps(value, ensure_ascii=False)}
    return {name: text for key, part in value.items() for name, text in _leaves(part, f"{path}{key}.").items()}


def _facts(report: Report) -> dict[str, str]:
    return _leaves({name: fact for name, fact in report.environment.items() if name not in _MOMENTARY})


def _conditions(report: Report, other: Report) -> dict[str, str]:
    """What `compress gate` needs to be equal in two reports to compare them; only what both reports have."""
    names, session = {metric.name for metric in other.metrics}, report.latency_session
    found = {"pipeline": report.pipeline, "test samples": f"{report.rows[-1].measurement.samples:,}"}
    for metric in report.metrics:
        if metric.name in names:
            better = "higher" if metric.higher_is_better else "lower"
            found[f"metric {metric.name}"] = f"{metric.unit or 'no unit'}, {better} is better"
    if session and other.latency_session:
        found["latency"] = f"{count(session.threads, 'thread')}, batch of {session.batch_size}"
    return found


def _statuses(report: Report) -> dict[str, str]:
    return {verdict.metric: verdict.status for verdict in report.verdicts}


def _model_changes(old: Report, new: Report) -> Iterator[DifferenceSection]:
    pairs = _pairs([row.stage for row in old.rows], [row.stage for row in new.rows])
    last = len(new.rows) - 1
    for position, earlier in pairs.items():
        was, now = old.rows[earlier], new.rows[position]
        delivered = ", delivered" if (earlier, position) == (len(old.rows) - 1, last) else ""
        yield DifferenceSection(f"Row {position + 1}, {now.stage}{delivered}", tuple(_row_changes(was, now, old, new)))
    if pairs.get(last) != len(old.rows) - 1:
        was, now = old.rows[-1], new.rows[-1]
        yield DifferenceSection(f"Delivered, {was.stage} -> {now.stage}", tuple(_row_changes(was, now, old, new)))


def _row_changes(was: Row, now: Row, old: Report, new: Report) -> Iterator[str]:
    before, after = was.measurement, now.measurement
    yield from _count_change("size in bytes", before.size_bytes, after.size_bytes)
    yield from _count_change("transfer (gzip) in bytes", before.transfer_bytes, after.transfer_bytes)
    yield from _count_change("parameters", before.parameters, after.parameters)
    yield from _count_change("parameters that are not zero", before.nonzero, after.nonzero)
    yield from _count_change("multiply-accumulates", before.macs, after.macs)
    yield from _speed_change(was, now)
    metrics = {metric.name: metric for metric in (*old.metrics, *new.metrics)}
    for name, metric in metrics.items():
        yield from _metric_change(metric, before.metrics.get(name), after.metrics.get(name))
    yield from _changes(_judgements(was), _judgements(now))


def _count_change(name: str, was: int, now: int) -> Iterator[str]:
    if was != now:
        share = f" ({100 * (now / was - 1):+.3g} %)" if was else ""
        yield f"{name}: {was:,} -> {now:,}{share}"


def _speed_change(was: Row, now: Row) -> Iterator[str]:
    before, after = was.latency, now.latency
    if before and after and before.ratio_low <= after.ratio_high and after.ratio_low <= before.ratio_high:
        return
    texts = [speed(found) if found else "not measured" for found in (before, after)]
    yield from _changes({"latency vs baseline": texts[0]}, {"latency vs baseline": texts[1]})


def _metric_change(metric: MetricInfo, was: float | None, now: float | None) -> Iterator[str]:
    texts = ["absent" if found is None else value(metric, found) for found in (was, now)]
    if texts[0] != texts[1]:
        by = "" if was is None or now is None else f" ({change(metric, was, now)})"
        yield f"{metric.name} (test): {' -> '.join(texts)}{by}"


def _judgements(row: Row) -> dict[str, str]:
    """What the report says of a classifier; nothing of other models."""
    quality = quality_figures(row.quality) if row.quality else {}
    return {**quality, **(fidelity_figures(row.fidelity) if row.fidelity else {})}
