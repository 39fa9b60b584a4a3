"""The forms of a benchmark for people and machines."""

import pytest
from example_report import BASELINE, latency
from pydantic import ValidationError

from compressor.records.benchmark import Benchmark, BenchmarkFile, Timing
from compressor.records.measurements import LatencySession
from compressor.report.benchmark_tables import to_markdown, to_table
from compressor.report.json import to_json


def candidate(name: str, size_bytes: int, *, macs: int | None = 1_000_000) -> BenchmarkFile:
    return BenchmarkFile(
        name=name,
        size_bytes=size_bytes,
        transfer_bytes=size_bytes // 2,
        parameters=250_666,
        macs=macs,
        uncounted=None if macs else "the products of Evil are not known",
    )


def timing(batch_size: int = 1, threads: int = 1, *, name: str = "x") -> Timing:
    session = LatencySession(
        batch_size=batch_size, threads=threads, rounds=25, calls=1000, seconds=7.4, noise=latency(1.0, 0.002)
    )
    return Timing(inputs={name: f"float32 ({batch_size}, 8)"}, latencies=(BASELINE, latency(4.0)), session=session)


def benchmark(*timings: Timing, name: str = "int8.onnx", macs: int | None = 2_000) -> Benchmark:
    return Benchmark(
        candidates=(candidate("float.onnx", 1_000_000), candidate(name, 250_000, macs=macs)),
        timings=timings or (timing(),),
        environment={"cpu": "Example 9000", "cpu_governor": None},
    )


def test_the_tables_say_what_the_files_are_and_how_fast():
    files, latencies, notes = to_table(benchmark(timing(), timing(8, 2))).split("\n\n")
    assert files.splitlines() == [
        "file           size  size vs baseline  transfer (gzip)  parameters  MACs (batch of 1)",
        "----------  -------  ----------------  ---------------  ----------  -----------------",
        "float.onnx  1.00 MB                             500 kB     250,666          1,000,000",
        "int8.onnx    250 kB     4.00x smaller           125 kB     250,666              2,000",
    ]
    assert [line.split(maxsplit=1)[0] for line in latencies.splitlines()[2:]] == 2 * [
        "float.onnx",
        "int8.onnx",
        "float.onnx,",
    ]
    assert " ".join(latencies.splitlines()[3].split()) == "int8.onnx 1 1 0.0250 ms 4.00x faster [3.96, 4.04]"
    assert latencies.splitlines()[-1].split()[:4] == ["float.onnx,", "again", "8", "2"]
    assert latencies.splitlines()[-1].endswith("no difference [0.998, 1.002]")
    assert "2 threads, batch of 8, 25 rounds with 1000 timed calls" in notes
    assert "on x float32 (8, 8)." in notes


def test_what_is_not_counted_is_unknown_and_says_why():
    text = to_table(benchmark(macs=None))
    assert text.splitlines()[3].endswith("unknown")
    assert text.splitlines()[-1] == "int8.onnx is not counted whole: the products of Evil are not known"


def test_markdown_has_the_same_tables_and_the_machine():
    text = to_markdown(benchmark())
    assert "| int8.onnx | 250 kB | 4.00x smaller | 125 kB | 250,666 | 2,000 |" in text.splitlines()
    assert "- cpu: Example 9000" in text.splitlines()
    assert "- cpu_governor: unknown" in text.splitlines()


def test_names_cannot_bring_markup_cells_or_control_characters():
    hostile = "<img src=x>|`code`|[link](http://x)\n# heading\x1b[31m"
    found = benchmark(timing(name=hostile), name=hostile, macs=None)
    text = to_markdown(found)
    assert not {"<", "\x1b"} & set(text)
    for character in "`[":
        assert text.replace("\\[0.99", "").count(character) == text.replace("\\[0.99", "").count(f"\\{character}")
    cells = [line.replace("\\|", "").count("|") for line in text.splitlines() if line.startswith("|")]
    assert cells == [7] * 4 + [6] * 5
    table = to_table(found)
    assert [character for character in table if not character.isprintable()] == ["\n"] * table.count("\n")


def test_json_reads_back_to_an_equal_record():
    found = benchmark(timing(), timing(8, 2), macs=None)
    assert Benchmark.model_validate_json(to_json(found), strict=True) == found


def test_a_timing_must_have_a_latency_for_each_file():
    short = timing().model_copy(update={"latencies": (BASELINE,)})
    with pytest.raises(ValidationError, match="a latency for each candidate"):
        benchmark(short)
