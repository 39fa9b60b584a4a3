from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.errors import HostError, Problem
from compressor.records.report import Verdict
from compressor.report.github import (
    SUMMARY_BYTES,
    annotation,
    append_summary,
    fit_in,
    inert,
    problem_annotation,
    verdict_annotations,
)

HOSTILE = ["</script><img src=x onerror=alert(1)>", "::set-env name=X::y", "a\n::error::b", "a\r::error::b", "100 %0A"]


def runner_reads(line: str) -> tuple[str, dict[str, str], str] | None:
    """What a runner makes of a line of the log: command, properties and data, as its documentation has them."""
    line = line.lstrip()
    if not line.startswith("::") or "::" not in line[2:]:
        return None
    head, _, data = line[2:].partition("::")
    name, _, given_properties = head.partition(" ")
    pairs = [pair.split("=", 1) for pair in given_properties.split(",") if pair]
    return name, {key: unescaped(value) for key, value in pairs}, unescaped(data)


def unescaped(text: str) -> str:
    for code, character in (("%0D", "\r"), ("%0A", "\n"), ("%3A", ":"), ("%2C", ","), ("%25", "%")):
        text = text.replace(code, character)
    return text


@pytest.mark.parametrize("hostile", HOSTILE)
def test_an_annotation_is_one_command_whatever_it_says(hostile):
    command = annotation("error", hostile, file=f"a,b:{hostile}", line=3, col=None)
    assert len(command.splitlines()) == 1
    assert runner_reads(command) == ("error", {"file": f"a,b:{hostile}", "line": "3"}, hostile)


@given(st.text(), st.text(min_size=1))
def test_every_annotation_is_read_as_it_was_written(message, title):
    assert runner_reads(annotation("warning", message, title=title)) == ("warning", {"title": title}, message)


def test_an_annotation_without_a_place_is_a_command_too():
    assert annotation("error", "--set 'a=1': unknown") == "::error::--set 'a=1': unknown"


def test_a_fault_of_a_file_is_shown_at_its_line_in_the_checkout(tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path / "models")
    for file in (Path("p.yaml"), tmp_path / "models/p.yaml"):
        command = problem_annotation(Problem("unknown key", file, 13, 5), tmp_path)
        assert command == "::error file=models/p.yaml,line=13,col=5::unknown key"


def test_a_fault_is_told_where_the_working_directory_is_gone(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    command = problem_annotation(Problem("no such file", Path("p.yaml")), tmp_path)
    assert command == "::error file=p.yaml::no such file"


def test_what_is_not_met_is_an_error_or_a_warning_by_its_level():
    limits = [("met", "error"), ("unmet", "error"), ("undecidable", "error"), ("unmet", "warn"), ("met", "warn")]
    verdicts = [Verdict(metric="a:b", limit="", status=status, level=level, message="m") for status, level in limits]
    assert verdict_annotations(verdicts) == [
        "::error title=a%3Ab::unmet: m",
        "::error title=a%3Ab::undecidable: m",
        "::warning title=a%3Ab::unmet: m",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "::set-env name=X::y",
        "  ::set-env name=X::y",
        "met\n\t::error::b",
        "met\r::error::b",
        "\u2003::error::b",
        "accuracy ##[set-output name=a]b",
        "###[error]b",
        ":::error::b",
    ],
)
def test_a_runner_obeys_nothing_in_a_text(text):
    shown = inert(text)
    assert all(runner_reads(line) is None for line in shown.replace("\r", "\n").split("\n"))
    assert "##[" not in shown
    assert shown.replace(" ", "") == text.replace(" ", "")


def test_a_text_without_commands_is_not_changed():
    text = "met: size_bytes is 9423 (9423 before)\nstd::vector [a] ## [b]"
    assert inert(text) == text


def markdown(*sizes: int) -> str:
    return "# Title\n\n" + "\n".join(f"## Section {number}\n\n{'x' * size}\n" for number, size in enumerate(sizes))


def test_a_summary_with_room_is_whole():
    text = markdown(10, 20)
    assert fit_in(text, len(text)) == text


def test_a_summary_without_room_is_cut_at_a_section_and_says_so():
    text = markdown(10, 20, 30)
    shown = fit_in(text, len(text) - 1)
    assert "Section 0" in shown
    assert "Section 2" not in shown
    assert "x" * 20 + "\n" in shown or "Section 1" not in shown
    assert shown.endswith("*The rest is left out: the summary of a step holds at most 1 MiB.*\n")


@pytest.mark.parametrize("title", ["", "# Title\n\n", "# Title\n\n## Section\n\n"])
def test_a_summary_without_room_for_its_first_section_is_cut_at_a_line(title):
    text = title + "- a line\n" * 100
    shown = fit_in(text, 500)
    assert shown.startswith(f"{title}- a line\n")
    assert shown.endswith("- a line\n\n*The rest is left out: the summary of a step holds at most 1 MiB.*\n")
    assert len(shown) > 450


def test_a_summary_without_any_room_is_empty():
    assert fit_in(markdown(10), 20) == ""


@given(st.lists(st.text(alphabet="aé\n# ", max_size=60), max_size=6), st.integers(0, 400))
def test_a_summary_never_takes_more_room_than_there_is(contents, room):
    assert len(fit_in("\n## S\n".join(contents), room).encode()) <= room


def test_summaries_of_one_step_stay_below_1_mib_together(tmp_path):
    summary = tmp_path / "summary.md"
    summary.write_text("of another program\n")
    for _ in range(4):
        append_summary(markdown(200_000, 200_000), summary)
    content = summary.read_text()
    assert content.startswith("of another program\n# Title")
    assert SUMMARY_BYTES - 200_100 < len(content) <= SUMMARY_BYTES
    assert "left out" in content


def test_a_full_disk_under_the_summary_is_the_machines_fault():
    with pytest.raises(HostError, match="free some space"):
        append_summary("# a\n", Path("/dev/full"))
