"""The `compress` command: what it does and says, and the exit code of what happened."""

import io
import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

import click

from compressor.cli.console import IN_ACTIONS, annotate_problems, complain, for_people, say, tell
from compressor.cli.options import DEVICE, FILE, JUNIT, MAX_SECONDS, MOST_THREADS, OVERRIDES, RUNS, sizes_by_name
from compressor.errors import CompressorError, ConfigError, InputError
from compressor.records.report import Verdict
from compressor.report.github import InertFormatter
from compressor.report.json import read_report, to_json
from compressor.report.table import to_table
from compressor.text.figures import printable
from compressor.verdicts.gate import exit_code, sentence

# ruff: noqa: PLC0415  # much answers without torch: a command imports what it needs

_IS_MAIN = os.environ.get("RANK", "0") == "0"
"""Under torchrun one process speaks for all."""


class Interrupted(BaseException):
    """A signal asked the process to end; what is stored stays, and the same command goes on from there."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(signal_number).name}")
        self.exit_code = 128 + signal_number


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="compressor", prog_name="compress")
def compress() -> None:
    """Turn a large neural network into a small, fast one that runs on an edge device, and prove it."""


@compress.command()
@FILE
@OVERRIDES
@RUNS
@DEVICE
@MAX_SECONDS
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON instead of a table.")
@JUNIT
def run(
    file: Path,
    overrides: tuple[str, ...],
    runs: Path,
    device: str,
    max_seconds: float,
    *,
    as_json: bool,
    junit: Path | None,
) -> int:
    """Run a pipeline FILE; stages whose result is stored are not run again.

    Ends with the path of the report. Exit codes: 0 done and gates met, 2 pipeline file, 3 gate unmet, 4 gate
    undecidable, 5 user's code or data, 6 stage, 7 machine, 8 directory in use, 130/143 interrupted.

    Several processes share the training of each stage: torchrun --nproc-per-node 2 -m compressor run FILE
    """
    import torch

    from compressor.config.pipeline_file import load
    from compressor.references.reference import prefer_modules_in
    from compressor.report.markdown import to_markdown
    from compressor.run.pipeline import run as run_pipeline

    with prefer_modules_in(file.parent):
        pipeline = load(file, overrides)
        directory = runs / pipeline.name
        found = run_pipeline(pipeline, directory, device=torch.device(_device(device)), max_seconds=max_seconds)
    if not _IS_MAIN:
        return 0  # the main process tells; torchrun would end it while it prints
    files = Path(found.rows[-1].model_file).name, "report.html", "report.json"
    paths = "\n".join(printable(str(directory / file)) for file in files)
    text = to_json(found) if as_json else for_people(f"{to_table(found)}\n\n{paths}")
    _tell_verdicts(found.pipeline, found.verdicts, text, to_markdown(found), junit)
    return exit_code(found.verdicts)


@compress.command()
@FILE
@OVERRIDES
@RUNS
@DEVICE
def check(file: Path, overrides: tuple[str, ...], runs: Path, device: str) -> int:
    """Validate a pipeline FILE and print what a run would do; model and task are not imported.

    Standard error says what of the data is taken for granted.
    """
    from compressor.config.pipeline_file import load
    from compressor.references.reference import prefer_modules_in
    from compressor.run.keys import assumption, forecast
    from compressor.run.store import Store

    with prefer_modules_in(file.parent):
        pipeline = load(file, overrides)
        store = Store(runs / pipeline.name)
        steps = forecast(pipeline, store, device=_device(device))
    width = max(len(step.name) for step in steps)
    for step in steps:
        say(f"{step.name:{width}}  {'stored' if step.reused else 'to run: ' + '; '.join(step.reasons)}")
    if any(step.reused for step in steps):
        say(assumption(store), err=True)  # the plan itself may be read by a program
    return 0


@compress.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON instead of a table.")
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), help="Also write it as a page to this file.")
def report(directory: Path, *, as_json: bool, html: Path | None) -> int:
    """Print the report of a run DIRECTORY again."""
    found = read_report(directory / "report.json")
    if html:
        from compressor.report.page.html import to_html
        from compressor.system.disk import write_output

        write_output(html, to_html(found))
    say(to_json(found) if as_json else for_people(to_table(found)))
    return 0


@compress.command()
@click.argument("report", type=click.Path(path_type=Path))
@click.option(
    "--baseline", type=click.Path(path_type=Path), required=True, help="An earlier report.json of the same pipeline."
)
@click.option("--budget", type=click.Path(path_type=Path), help="YAML file that says how much worse may be what.")
@JUNIT
@click.option("--json", "as_json", is_flag=True, help="Print the verdicts and the exit code as JSON.")
def gate(report: Path, baseline: Path, budget: Path | None, junit: Path | None, *, as_json: bool) -> int:
    """Compare what a run delivered, by its REPORT (report.json), with what an earlier run did.

    Without a budget file sizes may grow by 2 %, the speed over the float baseline may fall by 10 %, and each metric may
    drop by 0.01. Exit codes: 0 within the budget, 3 a limit is not met, 4 one cannot be decided or a report cannot be
    read, 2 budget file.
    """
    from compressor.config.budget_file import load_budget
    from compressor.text.layout import escape, markdown_bullets
    from compressor.verdicts.budget import Budget, compare, incomparable

    allowed = load_budget(budget) if budget else Budget()
    name = str(report)
    try:
        found = read_report(report)
        name = found.pipeline
        verdicts = compare(allowed, found, read_report(baseline))
    except InputError as error:
        verdicts = (incomparable(str(error)),)
    code = exit_code(verdicts)
    sentences = [sentence(verdict) for verdict in verdicts] or ["every limit of the budget is off"]
    if as_json:
        told = [verdict.model_dump(mode="json") for verdict in verdicts]
        text = json.dumps({"schema_version": 1, "exit_code": code, "verdicts": told}, indent=1)
    else:
        text = for_people("\n".join(map(printable, sentences)))
    markdown = f"# {escape(f'Gate of {name}')}\n\n{markdown_bullets(sentences)}\n"
    _tell_verdicts(name, verdicts, text, markdown, junit)
    return code


@compress.command()
@click.argument("old", type=click.Path(path_type=Path))
@click.argument("new", type=click.Path(path_type=Path))
@click.option("--markdown", "as_markdown", is_flag=True, help="Print Markdown instead of plain text.")
def diff(old: Path, new: Path, *, as_markdown: bool) -> int:
    """Print what changed from the OLD report.json to the NEW: settings, stages, models, verdicts and environment."""
    from compressor.report.difference import differences, to_markdown, to_text

    changes = differences(read_report(old), read_report(new))
    markdown = to_markdown(changes)
    tell(for_people(markdown if as_markdown else to_text(changes)), markdown)
    return 0


@compress.command()
@FILE
@OVERRIDES
def layers(file: Path, overrides: tuple[str, ...]) -> int:
    """List the layers of every model that a pipeline FILE names: what settings such as `layers` may say.

    Each model runs once, on the example inputs of the task; N is the batch. Weights files are not read.
    """
    from compressor.cli.inspection import inspect_models, to_table
    from compressor.config.pipeline_file import load
    from compressor.references.reference import prefer_modules_in

    with prefer_modules_in(file.parent):
        models = inspect_models(load(file, overrides))
    say("\n\n".join(to_table(model) for model in models))
    return 0


@compress.command()
@FILE
@OVERRIDES
@RUNS
@DEVICE
@click.option("--stage", type=click.IntRange(min=0), help="Which pruning or sensitivity stage, counted from 0.")
def sensitivity(file: Path, overrides: tuple[str, ...], runs: Path, device: str, stage: int | None) -> int:
    """Cut one group of channels at a time of the model that is pruned in a pipeline FILE, and show what it costs.

    Runs the stages before the pruning, or takes them from the store, then evaluates on the validation split. A later
    run reuses all of it; `- stage: sensitivity` before the pruning lets `allocation: sensitivity` prune by it.
    """
    import torch

    from compressor.cli.sensitivity_command import up_to_sensitivity
    from compressor.config.pipeline_file import load
    from compressor.records.sensitivity_curves import FILE_NAME, read_sensitivity
    from compressor.references.reference import prefer_modules_in
    from compressor.report.sensitivity_map import documents, to_table
    from compressor.run.pipeline import prepare

    with prefer_modules_in(file.parent):
        pipeline = up_to_sensitivity(load(file, overrides), stage=stage)
        directory = runs / pipeline.name
        curves = read_sensitivity(prepare(pipeline, directory, device=torch.device(_device(device))) / FILE_NAME)
    if _IS_MAIN:
        files = "\n".join(printable(str(directory / name)) for name in sorted(documents(curves)))
        say(f"{to_table(curves)}\n\n{files}")
    return 0


@compress.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--baseline", type=click.Path(path_type=Path), help="Compare with this file.  [default: the first]")
@click.option(
    "--batch-size",
    "batch_sizes",
    multiple=True,
    type=click.IntRange(min=1),
    help="Samples of one inference; may be given several times.  [default: 1]",
)
@click.option(
    "--threads",
    "thread_counts",
    multiple=True,
    default=(1,),
    type=click.IntRange(min=1, max=MOST_THREADS),
    help="Threads of one inference; may be given several times.  [default: 1]",
)
@click.option(
    "--dimension",
    "sizes",
    multiple=True,
    metavar="NAME=SIZE",
    callback=sizes_by_name,
    help="Size of a dynamic dimension other than the batch; may be given several times.",
)
@click.option(
    "--inputs",
    "inputs_file",
    type=click.Path(path_type=Path),
    help="An .npz with one batch: an array for each input of the baseline, by name.",
)
@MAX_SECONDS
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option("--markdown", "as_markdown", is_flag=True, help="Print Markdown instead of tables.")
def bench(
    *,
    files: tuple[Path, ...],
    baseline: Path | None,
    batch_sizes: tuple[int, ...],
    thread_counts: tuple[int, ...],
    sizes: dict[str, int],
    inputs_file: Path | None,
    max_seconds: float,
    as_json: bool,
    as_markdown: bool,
) -> int:
    """Compare any ONNX FILES, ours or not: size, parameters, MACs, and latency timed side by side.

    Every batch size is timed with every number of threads. Inputs are made up from the signature of the baseline
    unless --inputs has them. The files need not be trusted: SECURITY.md says what is checked.
    """
    from compressor.measure.bench import bench as benchmark
    from compressor.report import benchmark_tables as shown

    if inputs_file and (batch_sizes or sizes):
        msg = "--inputs has a batch of its own; leave out --batch-size and --dimension"
        raise click.UsageError(msg)
    if as_json and as_markdown:
        msg = "--json and --markdown are two forms of one output; choose one"
        raise click.UsageError(msg)
    ordered = list(files)
    if baseline in ordered:
        ordered.remove(baseline)  # once, as a file may be given twice
    found = benchmark(
        ordered if baseline is None else [baseline, *ordered],
        batch_sizes=tuple(dict.fromkeys(batch_sizes)) or (1,),
        thread_counts=tuple(dict.fromkeys(thread_counts)),
        sizes=sizes,
        inputs_file=inputs_file,
        max_seconds=max_seconds,
    )
    markdown = shown.to_markdown(found)
    text = to_json(found) if as_json else for_people(markdown if as_markdown else shown.to_table(found))
    tell(text, markdown)
    return 0


@compress.command()
def stages() -> int:
    """List the stages that a pipeline file may name."""
    from compressor.config.installed_stages import describe_stages

    listings = describe_stages()
    width = max(len(listing.name) for listing in listings)
    for listing in listings:
        say(f"{listing.name:{width}}  {listing.summary}  [{listing.origin}]")
    return 0


@compress.command()
def schema() -> int:
    """Print the JSON Schema of pipeline files, for editors."""
    from compressor.config.pipeline_file import json_schema

    say(json.dumps(json_schema(), indent=2))
    return 0


def main() -> NoReturn:
    """Run the command line; end the process with the exit code of what happened."""
    to_log = logging.StreamHandler(sys.stderr)
    to_log.setFormatter(InertFormatter() if IN_ACTIONS else logging.Formatter())
    logging.basicConfig(level=logging.WARNING, handlers=[to_log])
    logging.getLogger("compressor").setLevel(logging.INFO if _IS_MAIN else logging.ERROR)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        code = compress.main(standalone_mode=False)
    except click.ClickException as error:
        shown = io.StringIO()
        error.show(shown)
        complain(shown.getvalue())
        code = error.exit_code
    except CompressorError as error:
        if _IS_MAIN or not isinstance(error, ConfigError):  # the others read the same file
            complain(f"error: {error}")
        if _IS_MAIN and isinstance(error, ConfigError):
            annotate_problems(error.problems)
        code = error.exit_code
    except Interrupted as interruption:
        say(f"{interruption}; for a run, the same command goes on from the last stored stage", err=True)
        code = interruption.exit_code
    sys.exit(code)


def _tell_verdicts(name: str, verdicts: Sequence[Verdict], text: str, markdown: str, junit: Path | None) -> None:
    """Print, publish and write what was found of a pipeline; where one of these fails, the others are still done."""
    from compressor.report.junit import to_junit
    from compressor.system.disk import write_output

    try:
        tell(text, markdown, verdicts)
    finally:
        if junit:
            write_output(junit, to_junit(name, verdicts))


def _interrupt(number: int, _frame: FrameType | None) -> NoReturn:
    raise Interrupted(number)


def _device(choice: str) -> str:
    import torch

    if choice == "cuda" and not torch.cuda.is_available():
        msg = "--device cuda needs a GPU that torch can use, found none"
        raise click.UsageError(msg)
    if choice == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return choice
