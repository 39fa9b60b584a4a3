"""How the numbers and names of a report are written for people."""

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from compressor.records.measurements import Latency, MetricInfo

_JOINERS = "\u200c\u200d"
"""Zero width, to keep letters apart or together: ordinary in Persian and in Indian scripts, and within emoji."""


def printable(text: str) -> str:
    """`text` on one line, with ? for each character that a terminal would obey: control, escape, text direction."""
    return "".join(
        "?" if unicodedata.category(character)[0] == "C" and character not in _JOINERS else character
        for character in text
    )


def size(size_bytes: int) -> str:
    """Bytes to three digits, 1 kB = 1000 B."""
    number = float(f"{size_bytes:.3g}")  # rounded first: 999,999 B are 1.00 MB
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= factor:
            return f"{_three_digits(number / factor)} {unit}"
    return f"{size_bytes} B"


def times(ratio: float, more: str, less: str) -> str:
    """A ratio in words, such as `4.82x faster` for 4.82 and `1.30x slower` for 0.769."""
    return f"{factor(ratio)}x {more}" if ratio >= 1 else f"{factor(1 / ratio)}x {less}"


def size_ratio(baseline_bytes: int, size_bytes: int) -> str:
    """How a size compares with that of the baseline, such as `107x smaller`."""
    if baseline_bytes == size_bytes:
        return "no difference"
    return times(baseline_bytes / size_bytes, "smaller", "larger")


def speed(latency: Latency) -> str:
    """How a model compares with the baseline, such as `4.82x faster [4.78, 4.87]`."""
    low, high = latency.ratio_low, latency.ratio_high
    if low <= 1 <= high:
        return f"no difference [{factor(low)}, {factor(high)}]"
    low, high = (low, high) if low > 1 else (1 / high, 1 / low)
    return f"{times(latency.ratio, 'faster', 'slower')} [{factor(low)}, {factor(high)}]"


def milliseconds(latency_ms: float) -> str:
    """A time to three digits."""
    return f"{_three_digits(latency_ms)} ms"


def share(part: float) -> str:
    """A share in [0, 1] as a percentage."""
    return f"{_percentage(part)} %"


def value(metric: MetricInfo, number: float) -> str:
    """The value of a metric with its unit; shares as percentages."""
    if metric.unit == "%":
        return share(number)
    return f"{number:.4g} {printable(metric.unit)}".rstrip()


def change(metric: MetricInfo, before: float, after: float) -> str:
    """The change of a metric with its sign; shares in percentage points."""
    if metric.unit == "%":
        return f"{_percentage(after - before, '+')} points"
    return f"{after - before:+.3g} {printable(metric.unit)}".rstrip()


def count(number: int, noun: str) -> str:
    """A number of things, such as `1 thread` and `2 threads`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def list_names(names: Sequence[str], *, most: int = 8, separator: str = ", ") -> str:
    """Names for one line, such as `a, b, c and 4 more`: the first `most` of them."""
    more = len(names) - most
    return separator.join(names[:most]) + (f" and {more} more" if more > 0 else "")


def facts(environment: Mapping[str, Any]) -> list[str]:
    """Each fact of a machine with its name; what the system does not tell is unknown."""
    return [f"{name}: {_fact(found)}" for name, found in environment.items()]


def _fact(fact: Any) -> str:
    if isinstance(fact, Mapping):
        return ", ".join(f"{name} {_fact(part)}" for name, part in fact.items())
    if isinstance(fact, list | tuple):
        return ", ".join(map(_fact, fact))
    return "unknown" if fact is None else str(fact)


def factor(ratio: float) -> str:
    """A ratio to three digits, and a fourth near 1, where it makes the difference."""
    return f"{ratio:.3f}" if 0.9 < ratio < 1.1 else _three_digits(ratio)


def _percentage(part: float, sign: str = "") -> str:
    """To two decimals; to four digits beyond a million, as a metric may call any number a share."""
    return f"{100 * part:{sign}{'.2f' if abs(part) < 1e4 else '.4g'}}"


def _three_digits(number: float) -> str:
    """Three significant digits without an exponent, zeros kept: 14.2, 1.70, 1240."""
    digits, _, exponent = f"{number:.2e}".partition("e")
    return f"{float(f'{digits}e{exponent}'):.{max(0, 2 - int(exponent))}f}"
