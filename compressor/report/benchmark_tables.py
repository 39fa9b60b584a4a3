"""ONNX files side by side, as tables for a terminal and in Markdown."""

from compressor.records.benchmark import Benchmark
from compressor.report.remarks import conditions
from compressor.text.figures import facts, milliseconds, printable, size, size_ratio, speed
from compressor.text.layout import align, markdown_bullets, markdown_table


def to_table(benchmark: Benchmark) -> str:
    """Two aligned tables, what the files are and how fast, and how they were timed. Without a final newline."""
    return "\n\n".join([align(file_cells(benchmark)), align(latency_cells(benchmark)), "\n".join(notes(benchmark))])


def to_markdown(benchmark: Benchmark) -> str:
    """The same as Markdown, names escaped, with the machine."""
    sections = [
        "# Benchmark",
        markdown_table(file_cells(benchmark)),
        markdown_table(latency_cells(benchmark)),
        markdown_bullets(notes(benchmark)),
        "## Environment",
        markdown_bullets(facts(benchmark.environment)),
    ]
    return "\n\n".join(sections) + "\n"


def file_cells(benchmark: Benchmark) -> list[list[str]]:
    """What each file is, one per row, headings first."""
    baseline = benchmark.candidates[0]
    batch = benchmark.timings[0].session.batch_size
    head = ["file", "size", "size vs baseline", "transfer (gzip)", "parameters", f"MACs (batch of {batch})"]
    return [
        head,
        *(
            [
                printable(one.name),
                size(one.size_bytes),
                "" if one is baseline else size_ratio(baseline.size_bytes, one.size_bytes),
                size(one.transfer_bytes),
                *("unknown" if number is None else f"{number:,}" for number in (one.parameters, one.macs)),
            ]
            for one in benchmark.candidates
        ),
    ]


def latency_cells(benchmark: Benchmark) -> list[list[str]]:
    """How fast each file is in each session, headings first; each session ends with the baseline timed once more."""
    baseline = printable(benchmark.candidates[0].name)
    rows = [["file", "batch", "threads", "latency (p50)", "latency vs baseline (95 % interval)"]]
    for timing in benchmark.timings:
        setting = [str(timing.session.batch_size), str(timing.session.threads)]
        named = zip(benchmark.candidates, timing.latencies, strict=True)
        for one, latency in named:
            compared = "" if one is benchmark.candidates[0] else speed(latency)
            rows.append([printable(one.name), *setting, milliseconds(latency.p50_ms), compared])
        noise = timing.session.noise
        rows.append([f"{baseline}, again", *setting, milliseconds(noise.p50_ms), speed(noise)])
    return rows


def notes(benchmark: Benchmark) -> list[str]:
    """How each session was taken, what its noise floor is, and why something was not counted; one line each."""
    sessions = []
    for timing in benchmark.timings:
        inputs = ", ".join(f"{printable(name)} {shape}" for name, shape in timing.inputs.items())
        sessions.append(f"Latency: {conditions(timing.session)}, on {inputs}.")
    method = (
        "A ratio compares the fastest calls of each round, not the p50. The noise floor: what the baseline, timed once "
        "more, seems to gain."
    )
    uncounted = [
        f"{printable(one.name)} is not counted whole: {printable(one.uncounted)}"
        for one in benchmark.candidates
        if one.uncounted is not None
    ]
    return [*sessions, method, *uncounted]
