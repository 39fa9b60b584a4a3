"""A report as one HTML file that needs nothing beside it: no script, no font, no picture, no network."""

import base64
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

from jinja2 import Environment, PackageLoader, StrictUndefined

from compressor.records.int8 import Quantization
from compressor.records.report import Report, Verdict
from compressor.report.classifier import class_cells, meanings, quality_cells, sample_cells, summary
from compressor.report.int8_summary import describe_deployment, describe_fallback
from compressor.report.page import int8_pictures, pictures
from compressor.report.page.drawings import Cells, Picture
from compressor.report.remarks import headline, method, readiness, remarks, row_names
from compressor.report.reproduction import command, settings
from compressor.report.table import cells
from compressor.text.figures import facts, printable
from compressor.verdicts.gate import sentence

_WITHIN_A_NUMBER = re.compile(r"(?<=\d) (?=(?:%|[kMG]?B|ms|s|dB|nats|points\))(?!\w))|(?<=\d,) (?=[\d.]+\])")
"""Between a number and its unit, and within an interval, where no line ends; points alone have no room in a column."""
_HEBREW_TO_ADLAM = r"\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc\U00010800-\U00010fff\U0001e800-\U0001efff"
_FROM_RIGHT_TO_LEFT = re.compile(rf"[{_HEBREW_TO_ADLAM}](?:[{_HEBREW_TO_ADLAM}\u200c\u200d ]*[{_HEBREW_TO_ADLAM}])?")
"""Words of scripts that are written from right to left: Hebrew, Arabic and others, up to Adlam."""


@dataclass(frozen=True)
class Prose:
    """A paragraph."""

    kind: ClassVar[str] = "prose"
    text: str


@dataclass(frozen=True)
class Bullets:
    """A list of sentences."""

    kind: ClassVar[str] = "bullets"
    texts: Sequence[str]


@dataclass(frozen=True)
class Verdicts:
    """What became of the limits of a gate, each with the words for it."""

    kind: ClassVar[str] = "verdicts"
    verdicts: Sequence[tuple[str, Verdict]]


@dataclass(frozen=True)
class Table:
    """A table; the first cell of each row names it."""

    kind: ClassVar[str] = "table"
    caption: str
    cells: Cells


@dataclass(frozen=True)
class Code:
    """Text for a machine; `name` says what it is and, if `folded`, stands for it until a reader unfolds it."""

    kind: ClassVar[str] = "code"
    name: str
    text: str
    folded: bool = False


@dataclass(frozen=True)
class Gallery:
    """Small pictures side by side; `more` says what is left out."""

    kind: ClassVar[str] = "gallery"
    pictures: Sequence[Picture]
    more: str = ""


Block: TypeAlias = Prose | Bullets | Verdicts | Table | Code | Gallery | Picture


@dataclass(frozen=True)
class PageSection:
    """A heading and what stands below it."""

    title: str
    blocks: Sequence[Block]


def to_html(report: Report) -> str:
    """One HTML 5 file: the headline and `sections`, figures as SVG. All texts are escaped; nothing runs or loads."""
    environment = _environment()
    style = environment.get_template("page.css").render()
    rendered = environment.get_template("page.html").render(
        pipeline=report.pipeline,
        headline=headline(report),
        sections=sections(report),
        style_digest=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
    )
    return f"{rendered}\n"


def sections(report: Report) -> tuple[PageSection, ...]:
    """What the page shows, in order; a section without data is left out."""
    found = (
        PageSection("Gate", _gate(report)),
        PageSection("Stages", list(_stages(report))),
        PageSection("Size and latency", _sizes(report)),
        PageSection("Trade-off", _present(pictures.tradeoff_picture(report))),
        PageSection("Training", list(_training(report))),
        PageSection("What compression changed", list(_changes(report))),
        PageSection("Channels", list(pictures.channel_pictures(report))),
        PageSection("Int8", list(_int8(report))),
        PageSection("How it was measured", [Prose(text) for text in method(report)]),
        PageSection("Environment", [Bullets(facts(report.environment))] if report.environment else []),
        PageSection("How to reproduce it", _reproduction(report)),
    )
    return tuple(section for section in found if section.blocks)


def _gate(report: Report) -> list[Block]:
    verdicts = [(sentence(verdict).partition(":")[0], verdict) for verdict in report.verdicts]
    return [Verdicts(verdicts)] if verdicts else []


def _stages(report: Report) -> Iterator[Block]:
    yield Table(
        "Each stage beside the baseline, its first row; changes of metrics are from the baseline", cells(report)
    )
    if told := remarks(report):
        yield Bullets(told)


def _sizes(report: Report) -> list[Block]:
    return [Gallery([pictures.size_picture(report), *_present(pictures.latency_picture(report))])]


def _training(report: Report) -> Iterator[Block]:
    if report.preparations:
        yield Bullets([readiness(preparation) for preparation in report.preparations])
    if curves := pictures.loss_pictures(report):
        yield Prose("Losses are means over an epoch, before their weights.")
        more = pictures.left_out(len(curves[pictures.MOST_LOSSES :]), "curves")
        yield Gallery(curves[: pictures.MOST_LOSSES], more)


def _changes(report: Report) -> Iterator[Block]:
    if figures := quality_cells(report):
        yield Prose(summary(report))
        yield Table("Baseline and delivered model on the test split", figures)
        yield Bullets(meanings(report))
    yield from _present(pictures.class_picture(report))
    if classes := class_cells(report):
        yield Table("The classes that lost most", classes)
    if samples := sample_cells(report):
        caption = "The samples whose class lost most probability, numbered from 0 in the order of the test split"
        yield Table(caption, samples)


def _int8(report: Report) -> Iterator[Block]:
    for name, row in zip(row_names(report), report.rows, strict=True):
        if row.quantization:
            yield from _int8_of(name, row.quantization)


def _int8_of(name: str, quantization: Quantization) -> Iterator[Block]:
    lines = [
        describe_deployment(quantization.deployment),
        *([describe_fallback(quantization.fallback, quantization.deployment)] if quantization.fallback else []),
    ]
    yield Bullets([f"{name}: {line}" for line in lines])
    if quantization.layers:
        yield int8_pictures.noise_picture(name, quantization)
    if ranges := int8_pictures.range_pictures(quantization):
        yield Prose(
            "What each of these layers gives in the float model, within the range of its codes. Heights are square "
            "roots of shares, so that rare values are seen."
        )
        yield Gallery(ranges)


def _reproduction(report: Report) -> list[Block]:
    return [
        Code("Command", command(report)),
        Code(
            "The pipeline as it ran; saved beside the code that it names, it runs again", settings(report), folded=True
        ),
    ]


def _present(picture: Picture | None) -> list[Picture]:
    return [] if picture is None else [picture]


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("compressor.report.page"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_typeset,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["harmless"] = _harmless
    return environment


def _harmless(text: str) -> str:
    """`text` without control characters, except ends of lines."""
    return "\n".join(map(printable, text.split("\n")))


def _typeset(output: Any) -> Any:
    """Make text fit to read: without control characters, and without a line that ends within a number.

    HTML that the template made of such texts stays as it is.

    Words that are written from right to left are isolated (UAX 9). Else what follows would be ordered with them, and
    `98 % to 97 %` would read as 97 to 98.
    """
    if isinstance(output, str) and not hasattr(output, "__html__"):
        whole = _WITHIN_A_NUMBER.sub("\u00a0", _harmless(output))
        return _FROM_RIGHT_TO_LEFT.sub("\u2068\\g<0>\u2069", whole)
    return output
