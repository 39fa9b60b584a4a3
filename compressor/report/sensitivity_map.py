"""A sensitivity as a table for a terminal, as Markdown and as a picture."""

from collections.abc import Sequence
from html import escape as to_xml
from math import sqrt

from compressor.records.sensitivity_curves import SensitivityCurves
from compressor.text.figures import change, printable, value
from compressor.text.layout import align, escape, markdown_table

_ROW, _CELL, _CHARACTER, _MARGIN, _HEAD = 20, 60, 7, 12, 76
"""Sizes in the picture, in its pixels: those of a cell, the width of a character, and what surrounds the cells."""
_LONGEST = 48
"""Characters of a path that the picture shows; of a longer one, the end."""
_DARKEST = (165, 15, 21)
"""Red, green and blue of the largest fall; no fall is white."""


def documents(curves: SensitivityCurves) -> dict[str, str]:
    """The table and the picture as files, by name."""
    return {"sensitivity.svg": to_svg(curves), "sensitivity.md": to_markdown(curves, picture="sensitivity.svg")}


def to_table(curves: SensitivityCurves) -> str:
    """Heading and aligned table: one row per group, one column per ratio. No final newline."""
    return f"{heading(curves)}\n{align(_cells(curves))}"


def to_markdown(curves: SensitivityCurves, *, picture: str) -> str:
    """The table with how it was measured; `picture` is the name of the file that `to_svg` was written to."""
    criterion = escape(curves.criterion)
    return (
        "\n\n".join(
            [
                "# Sensitivity",
                escape(heading(curves)),
                markdown_table(_cells(curves)),
                f"![{escape(heading(curves))}]({picture})",
                f"Each value is of a model that lost channels of this one group, those with the smallest {criterion} "
                "scores, and was not trained again.",
            ]
        )
        + "\n"
    )


def heading(curves: SensitivityCurves) -> str:
    """What the numbers are, in one line."""
    unit = f" in {printable(curves.metric.unit)}" if curves.metric.unit else ""
    return (
        f"{printable(curves.metric.name)}{unit} on {curves.samples:,} samples of the validation split, by the share of "
        f"one group's channels that was cut; {value(curves.metric, curves.value)} uncut"
    )


def to_svg(curves: SensitivityCurves) -> str:
    """A heat map, groups by ratios, with the value in each cell: the larger the fall, the darker."""
    labels = {path: _shorten(printable(path)) for path in curves.groups}
    left = _MARGIN + _CHARACTER * max(map(len, labels.values())) + _MARGIN
    columns = [left + _CELL * position for position in range(len(curves.ratios) + 1)]
    width = max(columns[-1] + _CELL + _MARGIN, 2 * _MARGIN + _CHARACTER * len(heading(curves)))
    height = _HEAD + _ROW * len(labels) + _MARGIN
    worst = max(0.0, *(fall for path in curves.groups for fall in curves.falls(path)))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-labelledby="title description" width="{width}" '
        f'height="{height}" viewBox="0 0 {width} {height}" font-family="ui-monospace, monospace" font-size="11">',
        f'<title id="title">{to_xml(f"Sensitivity of {len(labels)} groups")}</title>',
        f'<desc id="description">{to_xml(heading(curves))}</desc>',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        _text(_MARGIN, 22, heading(curves)),
        _text(_MARGIN, 40, f"white: no fall; darkest: {change(curves.metric, curves.value, _fallen(curves, worst))}"),
        _text(_MARGIN, _HEAD - 8, "group"),
        *(
            _text(x + _CELL / 2, _HEAD - 8, text, anchor="middle")
            for x, text in zip(columns, ["channels", *map(_share, curves.ratios)], strict=True)
        ),
    ]
    for row, (path, curve) in enumerate(curves.groups.items()):
        y = _HEAD + _ROW * row
        parts += [
            _text(_MARGIN, y + 14, labels[path]),
            _text(left + _CELL / 2, y + 14, f"{curve.channels:,}", "middle"),
        ]
        parts += _row(curves, path, columns[1:], y=y, worst=worst)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _row(curves: SensitivityCurves, path: str, columns: Sequence[int], *, y: int, worst: float) -> list[str]:
    """The cells of one group at the height `y`; `worst` is the largest fall of all."""
    parts = []
    values, falls = curves.groups[path].values, curves.falls(path)
    for x, ratio, number, fall in zip(columns, curves.ratios, values, falls, strict=True):
        # the root, as the small falls are the ones to choose among
        depth = sqrt(max(0.0, fall) / worst) if worst else 0.0
        color = "#" + "".join(f"{round(255 + depth * (full - 255)):02x}" for full in _DARKEST)
        told = (
            f"{printable(path)} without {_share(ratio)} of its channels: {value(curves.metric, number)} "
            f"({change(curves.metric, curves.value, number)})"
        )
        parts += [
            f"<g><title>{to_xml(told)}</title>",
            f'<rect x="{x}" y="{y}" width="{_CELL - 1}" height="{_ROW - 1}" fill="{color}"/>',
            _text(x + _CELL / 2, y + 14, _number(curves, number), "middle", "#ffffff" if depth > 0.7 else "#000000"),
            "</g>",
        ]
    return parts


def _text(x: float, y: float, content: str, anchor: str = "start", color: str = "#000000") -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{color}">{to_xml(content)}</text>'


def _cells(curves: SensitivityCurves) -> list[list[str]]:
    """The texts of the table, headings first."""
    head = ["group", "channels", *map(_share, curves.ratios)]
    body = [
        [printable(path), f"{curve.channels:,}", *(_number(curves, number) for number in curve.values)]
        for path, curve in curves.groups.items()
    ]
    return [head, *body]


def _number(curves: SensitivityCurves, number: float) -> str:
    """A value without its unit, short enough for a cell."""
    return f"{100 * number:.1f}" if curves.metric.unit == "%" else f"{number:.3g}"


def _share(ratio: float) -> str:
    return f"{100 * ratio:.3g} %"


def _shorten(text: str) -> str:
    return text if len(text) <= _LONGEST else f"…{text[1 - _LONGEST :]}"


def _fallen(curves: SensitivityCurves, fall: float) -> float:
    return curves.value - fall if curves.metric.higher_is_better else curves.value + fall
