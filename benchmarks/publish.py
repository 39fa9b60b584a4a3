"""Where a benchmark's results go: dated figures into results/, and their table between marks into docs/results.md."""

import json
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS, PAGE = Path(__file__).parent / "results", Path(__file__).parents[1] / "docs/results.md"


def publish(
    name: str, command: str, figures: Mapping[str, Any], table: Callable[[Mapping[str, Any]], str] | None = None
) -> None:
    """Write `figures`, ready for JSON, to results/NAME.json, dated and with the `command` that found them.

    `table` makes Markdown of what that file holds; it is printed, and replaces what stands in docs/results.md between
    the marks of `name`. Raises ValueError if the page has not these marks; the figures are written all the same.
    """
    text = json.dumps({"command": command, "date": today(), **figures}, indent=1) + "\n"
    (RESULTS / f"{name}.json").write_text(text)  # first: hours of work must not be lost to a mark
    if table is not None:
        written = table(json.loads(text))
        print(written)
        PAGE.write_text(splice(PAGE.read_text(), name, written))


def splice(page: str, name: str, table: str) -> str:
    """Replace what stands between the marks `<!-- NAME:begin -->` and `<!-- NAME:end -->` of a page.

    Raises ValueError unless each of the two stands there once, in this order.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    parts = re.split(f"({begin}|{end})", page)
    marks = parts[1::2]
    if marks != [begin, end]:
        msg = f"the page must have {begin} and then {end}, each once, found {', '.join(marks) or 'neither'}"
        raise ValueError(msg)
    return f"{parts[0]}{begin}\n{table}\n{end}{parts[-1]}"


def link(name: str) -> str:
    """The committed figures of a benchmark, as a link from a page in docs/."""
    return f"[{name}.json](../benchmarks/results/{name}.json)"


def cpu(facts: Mapping[str, Any]) -> str:
    """The processor of an environment with the instruction sets that decide how fast int8 is."""
    return f"{facts['cpu']} ({', '.join(facts['cpu_flags'])})"


def today() -> str:
    """The date in UTC, as ISO 8601 has it."""
    return datetime.now(UTC).date().isoformat()
