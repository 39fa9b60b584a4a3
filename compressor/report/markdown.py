"""A report as Markdown, for repositories and reviews."""

from compressor.records.report import Report, Row
from compressor.report.classifier import class_cells, meanings, quality_cells, sample_cells, summary
from compressor.report.int8_summary import describe_deployment, describe_fallback, describe_layers, layer_cells
from compressor.report.remarks import headline, method, readiness, remarks
from compressor.report.reproduction import command, settings
from compressor.report.table import cells
from compressor.text.figures import count, facts
from compressor.text.layout import escape, markdown_bullets, markdown_table
from compressor.verdicts.gate import sentence


def to_markdown(report: Report) -> str:
    """Headline, table, remarks, verdicts, how it was measured and how to do it again. Names are escaped throughout."""
    sections = [
        f"# {escape(report.pipeline)}\n\n{escape(headline(report))}",
        markdown_table(cells(report)),
        markdown_bullets(remarks(report)),
        _section("What compression changed", _changes(report)),
        _section("Gate", markdown_bullets([sentence(verdict) for verdict in report.verdicts])),
        _section("Training", _training(report)),
        _section("Int8", _int8(report)),
        _section("How it was measured", "\n\n".join(map(escape, method(report)))),
        _section("Environment", markdown_bullets(facts(report.environment))),
        _section("How to reproduce it", _reproduction(report)),
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def _section(title: str, content: str) -> str:
    return f"## {title}\n\n{content}" if content else ""


def _changes(report: Report) -> str:
    """The quality of a classifier; empty for other tasks and for a baseline alone."""
    if not quality_cells(report):
        return ""
    classes, samples = class_cells(report), sample_cells(report)
    parts = [
        escape(summary(report)),
        markdown_table(quality_cells(report)),
        markdown_bullets(meanings(report)),
        "The classes that lost most:" if classes else "No class is recognized less often than by the baseline.",
        markdown_table(classes) if classes else "",
        "The samples whose class lost most probability, numbered from 0 in the order of the test split:"
        if samples
        else "No sample's class is less probable than to the baseline.",
        markdown_table(samples) if samples else "",
    ]
    return "\n\n".join(filter(None, parts))


def _training(report: Report) -> str:
    """How each loss went down, and what was made ready for it; empty if no stage did either."""
    parts = [markdown_bullets([readiness(preparation) for preparation in report.preparations])]
    for row in report.rows:
        if row.losses:
            epochs = count(len(row.losses), "epoch")
            parts += [escape(f"{row.stage}, {epochs}; losses are means over an epoch, before their weights:")]
            parts += [markdown_table(_loss_cells(row))]
    return "\n\n".join(filter(None, parts))


def _int8(report: Report) -> str:
    """What int8 did to each model and its layers; empty if no stage made one int8."""
    parts: list[str] = []
    for row in report.rows:
        if (quantization := row.quantization) is None:
            continue
        lines = [
            describe_deployment(quantization.deployment),
            *([describe_fallback(quantization.fallback, quantization.deployment)] if quantization.fallback else []),
        ]
        parts.append(markdown_bullets([f"{row.stage}: {line}" for line in lines]))
        if table := layer_cells(quantization):
            parts += [escape(f"{row.stage}, {describe_layers(quantization)}:"), markdown_table(table)]
    return "\n\n".join(parts)


def _loss_cells(row: Row) -> list[list[str]]:
    """One row per loss, headings first; a loss that an epoch did not have is left empty there."""
    first, last = row.losses[0], row.losses[-1]
    values = [
        [name, *(f"{epoch[name]:.4g}" if name in epoch else "" for epoch in (first, last))]
        for name in {**first, **last}
    ]
    return [["loss", "first epoch", "last epoch"], *values]


def _reproduction(report: Report) -> str:
    # JSON is YAML, and no string of it can end the fence
    return (
        f"```sh\n{command(report)}\n```\n\n"
        "The pipeline as it ran, overrides included; saved beside the code that it names, it runs again:\n\n"
        f"```yaml\n{settings(report)}\n```"
    )
