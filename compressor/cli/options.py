"""What commands may be told: options that several share, and the numbers that an option may have."""

import math
import re
from pathlib import Path

import click

MOST_THREADS = 1024
"""A system may refuse to start more."""

OVERRIDES = click.option("--set", "overrides", multiple=True, metavar="PATH=VALUE", help="Override one setting.")
RUNS = click.option(
    "--runs",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("runs"),
    show_default=True,
    help="Where run directories lie; this run's is named after its pipeline.",
)
FILE = click.argument("file", type=click.Path(path_type=Path))
DEVICE = click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
JUNIT = click.option(
    "--junit",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write a JUnit XML file with one test case per limit.",
)


def finite(_context: click.Context, _option: click.Parameter, given: float) -> float:
    """The number, if it is one."""
    if not math.isfinite(given):
        msg = f"must be a finite number, got {given}"
        raise click.BadParameter(msg)
    return given


MAX_SECONDS = click.option(
    "--max-seconds",
    default=20.0,
    show_default=True,
    type=click.FloatRange(min=0),
    callback=finite,
    help="Most seconds that each file is timed, at each batch size and number of threads.",
)


def sizes_by_name(_context: click.Context, _option: click.Parameter, given: tuple[str, ...]) -> dict[str, int]:
    """Sizes by name, from texts such as `height=224`."""
    sizes = {}
    for text in given:
        found = re.fullmatch("(?s)(.+)=([0-9]{1,18})", text)
        if not found:
            msg = f"must be NAME=SIZE, SIZE of at most 18 digits, got {text[:80]!r}"
            raise click.BadParameter(msg)
        sizes[found[1]] = int(found[2])
    return sizes
