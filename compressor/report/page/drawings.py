"""What the page can draw: bars, pairs, plots and columns, as coordinates and texts, with a title and a table."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from compressor.report.page.charts import Label

Cells: TypeAlias = Sequence[Sequence[str]]
"""The texts of a table, headings first."""


@dataclass(frozen=True)
class Bar:
    """A length in percent of the longest; `low` and `high` are the ends of its interval."""

    name: str
    text: str
    length: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Bars:
    """Bars, one below the other; `whole` shows what each would be at full length."""

    kind: ClassVar[str] = "bars"
    bars: tuple[Bar, ...]
    whole: bool = False


@dataclass(frozen=True)
class Tick:
    """A number on an axis, at a place in percent."""

    at: float
    text: str


@dataclass(frozen=True)
class Pair:
    """Two values of one thing, at places in percent."""

    name: str
    text: str
    before: float
    after: float


@dataclass(frozen=True)
class Pairs:
    """Pairs of values on a common axis, one below the other."""

    kind: ClassVar[str] = "pairs"
    pairs: tuple[Pair, ...]
    ticks: tuple[Tick, ...]
    before: str
    after: str


@dataclass(frozen=True)
class Mark:
    """A point with the ends of its interval along x; `strong` if it stands out."""

    x: float
    y: float
    low: float
    high: float
    strong: bool


@dataclass(frozen=True)
class Plot:
    """Lines and points between two axes, `height` in pixels. `key` names the numbers of `labels`."""

    kind: ClassVar[str] = "plot"
    height: int
    x_title: str
    y_title: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[str, ...]
    marks: tuple[Mark, ...]
    labels: tuple[Label, ...] = ()
    key: tuple[str, ...] = ()


@dataclass(frozen=True)
class Columns:
    """Columns of equal width side by side, each height in percent of the tallest; the ends of their axis in words."""

    kind: ClassVar[str] = "columns"
    heights: tuple[float, ...]
    low: str
    high: str


Drawing: TypeAlias = Bars | Pairs | Plot | Columns


@dataclass(frozen=True)
class Picture:
    """A drawing, what it shows in words, and the same as a table.

    `more` says what drawing and table leave out, `more_rows` what the table alone does. The table is folded, and
    `printed` if it says what neither the drawing nor another table does.
    """

    kind: ClassVar[str] = "picture"
    title: str
    description: str
    drawing: Drawing
    table: Cells
    more: str = ""
    more_rows: str = ""
    printed: bool = False
