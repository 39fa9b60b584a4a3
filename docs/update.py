"""Write what the pages take from the code and from committed numbers: `make docs`; a test tells if they are stale."""

import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "docs"), str(ROOT / "benchmarks")]

import architecture
import headline
import settings
from publish import PAGE, RESULTS, splice

from compressor.config.pipeline_file import json_schema

SCHEMA = ROOT / "pipelines/pipeline.schema.json"


class Block(NamedTuple):
    """What stands between the marks `name` of a page."""

    page: Path
    name: str
    text: str


def blocks_of_code() -> Iterator[Block]:
    """What the pages take from the code."""
    yield from (Block(ROOT / "docs/architecture.md", name, text) for name, text in architecture.blocks().items())
    yield Block(ROOT / "docs/stages.md", "stages", settings.reference())


def blocks_of_results() -> Iterator[Block]:
    """What the pages take from committed numbers."""
    yield Block(ROOT / "README.md", "summary", headline.summary(read_result("headline")))
    for name in re.findall("<!-- (.*):begin -->", PAGE.read_text()):
        yield Block(PAGE, name, importlib.import_module(name).table(read_result(name)))


def read_result(name: str) -> dict:
    """The committed figures of a benchmark."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def main() -> None:
    """Write every block between its marks, and the schema for editors."""
    for page, name, text in (*blocks_of_code(), *blocks_of_results()):
        page.write_text(splice(page.read_text(), name, text))
    SCHEMA.write_text(json.dumps(json_schema(), indent=2) + "\n")


if __name__ == "__main__":
    main()
