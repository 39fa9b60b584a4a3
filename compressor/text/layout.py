"""Rows of texts as a table, aligned for a terminal or in Markdown, and text that brings no markup of its own."""

import re
from collections.abc import Sequence

from compressor.text.figures import printable

_MARKUP = re.compile(r"[\\`*\[|~$@]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\.|^[#>]|^[-+](?=\s)")
"""What begins or ends markup, also GitHub's formulas, mentions and links of bare addresses.

An underscore within a word does not, and some marks only at the beginning.
"""
_NUMBERED = re.compile(r"^(\d+)(?=[.)]\s)")


def align(rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Rows of equal length, headings first, as lines with a rule; the first `left` columns start at the same place.

    The others, which are numbers, end at the same place. Without a final newline.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    head, *body = rows
    lines = []
    for row in (head, ["-" * width for width in widths], *body):
        padded = [
            text.ljust(width) if column < left else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of equal length, headings first, escaped; all columns but the first are numbers."""
    head, *body = (f"| {' | '.join(map(escape, row))} |" for row in rows)
    rule = "|---" + "|--:" * (len(rows[0]) - 1) + "|"
    return "\n".join([head, rule, *body])


def markdown_bullets(texts: Sequence[str]) -> str:
    """A list in Markdown, its texts escaped; empty for no texts."""
    return "\n".join(f"- {escape(text)}" for text in texts)


def escape(text: str) -> str:
    r"""`text` on one line, as Markdown that shows it: no markup, table cell or HTML may begin in it."""
    harmless = printable(text).replace("&", "&amp;").replace("<", "&lt;")
    return _NUMBERED.sub(r"\1\\", _MARKUP.sub(r"\\\g<0>", harmless))
