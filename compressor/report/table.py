"""A report as plain text for a terminal."""

from compressor.records.report import Report, Row
from compressor.report.remarks import remarks, timing
from compressor.text.figures import change, milliseconds, printable, size, speed, value
from compressor.text.layout import align
from compressor.verdicts.gate import sentence


def to_table(report: Report) -> str:
    """Aligned table, remarks and verdicts; ASCII unless a name of the user's is not. Without a final newline."""
    notes = [timing(report), *remarks(report)]
    verdicts = [f"Gate, {printable(sentence(verdict))}" for verdict in report.verdicts]
    return "\n".join([align(cells(report)), "", *notes, *([""] if verdicts else []), *verdicts])


def cells(report: Report) -> list[list[str]]:
    """The texts of the table, headings first: one row per model."""
    head = ["stage", "size", "transfer (gzip)", "parameters", "latency vs baseline (95 % interval)"]
    for metric in report.metrics:
        head += [f"{printable(metric.name)} (test)", "change"]
    return [head, *(_row_cells(row, report) for row in report.rows)]


def _row_cells(row: Row, report: Report) -> list[str]:
    measurement, baseline = row.measurement, report.rows[0]
    texts = [
        printable(row.stage),
        size(measurement.size_bytes),
        size(measurement.transfer_bytes),
        f"{measurement.parameters:,}",
        "not measured" if row.latency is None else speed(row.latency),
    ]
    if row is baseline and row.latency is not None:
        texts[-1] = milliseconds(row.latency.p50_ms)
    for metric in report.metrics:
        before, after = baseline.measurement.metrics[metric.name], measurement.metrics[metric.name]
        texts += [value(metric, after), "" if row is baseline else change(metric, before, after)]
    return texts
