import json
import os
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest

from processes import run_python

ROOT = Path(__file__).parents[2]
REPORT = ROOT / "tests/reports/digits.json"
HOSTILE = ["</script><img src=x onerror=alert(1)>", "::set-env name=X::y", "a\n::error::b", "a|b`c`", "##[error]d"]
PROBE = """
import atexit, sys
from compressor.cli.main import main
atexit.register(lambda: print("torch" in sys.modules, file=sys.stderr))
main()
"""


def compress(*arguments: str | Path, stdout: int | None = None, **environment: str) -> subprocess.CompletedProcess:
    finished = run_python("-c", PROBE, *arguments, cwd=ROOT, stdout=stdout, torch=False, **environment)
    *lines, has_torch = finished.stderr.splitlines()
    assert has_torch == "False", finished.stderr
    finished.stderr = "\n".join(lines)
    return finished


def gate(report: Path, *arguments: str | Path, baseline: Path = REPORT, **options):
    return compress("gate", report, "--baseline", baseline, *arguments, **options)


@pytest.fixture
def changed(tmp_path):
    """Write a copy of the committed report in which `change` changed what its JSON holds."""

    def write(change, name: str = "report.json") -> Path:
        document = json.loads(REPORT.read_text())
        change(document)
        path = tmp_path / name
        path.write_text(json.dumps(document))
        return path

    return write


@pytest.fixture
def larger(changed):
    def change(document):
        document["rows"][-1]["measurement"]["size_bytes"] += 1000

    return changed(change)


def test_a_report_is_within_the_budget_of_itself():
    finished = gate(REPORT)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert finished.stdout.splitlines() == [
        "met: size_bytes is 9423 (9423 before)",
        "met: transfer_bytes is 8555 (8555 before)",
        "met: latency_ratio is 6.57 [6.54, 6.61] (6.57 [6.54, 6.61] before)",
        "met: accuracy is 99.72 % (99.72 % before)",
    ]


def test_the_budget_of_our_own_workflow_can_be_kept():
    assert gate(REPORT, "--budget", "benchmarks/budget.yaml").returncode == 0


def test_what_became_worse_exits_3_and_what_became_better_0(larger):
    finished = gate(larger)
    assert finished.returncode == 3
    assert "unmet: size_bytes must be <= 9611, got 10423 (9423 before): 812 bytes (8.4 %) too many" in finished.stdout
    assert gate(REPORT, baseline=larger).returncode == 0


def test_what_is_at_level_warn_is_told_and_exits_0(larger, tmp_path):
    budget = tmp_path / "budget.yaml"
    budget.write_text("size_bytes: {level: warn}\nmetrics: {f1: {level: warn}}\n")
    finished = gate(larger, "--budget", budget)
    assert finished.returncode == 0
    assert "warning, unmet: size_bytes must be <= 9611" in finished.stdout
    assert "warning, undecidable: f1 must be" in finished.stdout


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda document: document.update(schema_version=2), "must have schema_version 1, got 2"),
        (lambda document: document.pop("rows"), "rows: Field required"),
        (lambda document: document.update(rows=[]), "rows: Tuple should have at least 1 item"),
        (lambda document: document.update(pipeline="mnist"), "the baseline is of 'mnist' and the report of 'digits'"),
        (lambda document: document["metrics"][0].update(name="f1"), "every row must have a value of every metric"),
        (lambda document: document.update(metrics=[]), "the earlier report has no such metric"),
        (lambda document: document.update(latency_session=None), "the earlier report has no latency"),
        (
            lambda document: document["latency_session"]["noise"].update(ratio_low=1.1, ratio_high=1.2),
            "the timing is not to be trusted",
        ),
        (
            lambda document: document["latency_session"]["noise"].update(ratio_low=0.0),
            "noise.ratio_low: Input should be greater than or equal to",
        ),
        (
            lambda document: document["rows"][-1]["measurement"].update(size_bytes=10**310),
            "size_bytes: Input should be less than or equal to",
        ),
    ],
)
def test_a_baseline_that_cannot_be_compared_with_exits_4(changed, change, reason):
    finished = gate(REPORT, baseline=changed(change))
    assert finished.returncode == 4
    assert reason in finished.stdout


def test_a_missing_baseline_exits_4_whatever_the_budget(tmp_path):
    budget = tmp_path / "budget.yaml"
    budget.write_text("size_bytes: {level: off}\n")
    finished = gate(REPORT, "--budget", budget, baseline=tmp_path / "none.json")
    assert finished.returncode == 4
    assert "undecidable: reports must be two of the same pipeline, but " in finished.stdout
    assert "No such file or directory" in finished.stdout


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda document: document.update(schema_version=2), "report.json must have schema_version 1, got 2"),
        (lambda document: document.update(schema_version=True), "must have schema_version 1, got True"),
        (lambda document: document.update(schema_version="2" * 9999), "must have schema_version 1, got '22"),
        (lambda document: document.pop("rows"), "run it again. Found: rows: Field required"),
        (
            lambda document: document["rows"][-1]["measurement"].update(size_bytes=10**310),
            "size_bytes: Input should be less than or equal to",
        ),
        (
            lambda document: document["rows"][-1]["latency"].update(p50_ms=5e-324),
            "latency.p50_ms: Input should be greater than or equal to",
        ),
        (
            lambda document: document["rows"][0]["latency"].update(p50_ms=1e308),
            "latency.p50_ms: Input should be less than or equal to",
        ),
    ],
)
def test_a_report_that_cannot_be_read_exits_4(changed, change, reason):
    finished = gate(changed(change))
    assert (finished.returncode, finished.stderr) == (4, "")
    assert reason in finished.stdout
    assert len(finished.stdout) < 1000


def test_a_missing_report_exits_4_and_is_told_in_the_junit_xml(tmp_path):
    finished = gate(tmp_path / "none.json", "--junit", tmp_path / "gate.xml")
    assert (finished.returncode, finished.stderr) == (4, "")
    (suite,) = ElementTree.parse(tmp_path / "gate.xml").getroot()
    (case,) = suite
    assert (case.get("classname"), case.get("name")) == (str(tmp_path / "none.json"), "reports")
    assert "No such file or directory" in ElementTree.tostring(case, "unicode")


def test_a_missing_baseline_leaves_the_name_of_the_pipeline_in_the_junit_xml(tmp_path):
    finished = gate(REPORT, "--junit", tmp_path / "gate.xml", baseline=tmp_path / "none.json")
    assert finished.returncode == 4
    (suite,) = ElementTree.parse(tmp_path / "gate.xml").getroot()
    assert [case.get("classname") for case in suite] == ["digits"]


def test_a_budget_with_a_typo_exits_2_with_its_place(tmp_path):
    (tmp_path / "budget.yaml").write_text("size_bytes: {max_increse: 0.1}\n")
    finished = gate(REPORT, "--budget", tmp_path / "budget.yaml")
    assert finished.returncode == 2
    expected = "budget.yaml:1:14: unknown key 'max_increse' in size_bytes; did you mean 'max_increase'?"
    assert finished.stderr.endswith(expected)
    assert "::" not in finished.stderr


def test_verdicts_are_json_and_junit_xml_on_request(larger, tmp_path):
    finished = gate(larger, "--json", "--junit", tmp_path / "results/gate.xml")
    document = json.loads(finished.stdout)
    assert (document["schema_version"], document["exit_code"], finished.returncode) == (1, 3, 3)
    assert [verdict["status"] for verdict in document["verdicts"]] == ["unmet", "met", "met", "met"]
    (suite,) = ElementTree.parse(tmp_path / "results/gate.xml").getroot()
    assert suite.attrib == {"name": "digits", "tests": "4", "failures": "1", "errors": "0", "skipped": "0"}


def test_files_that_cannot_be_written_exit_7(tmp_path):
    (tmp_path / "file").write_text("in the way of a directory")
    summary, wanted = str(tmp_path / "none/summary.md"), tmp_path / "file/wanted"
    shutil.copy(REPORT, tmp_path / "report.json")
    for finished in (
        gate(REPORT, "--junit", wanted),
        compress("report", tmp_path, "--html", wanted),
        compress("diff", REPORT, REPORT, GITHUB_ACTIONS="true", GITHUB_STEP_SUMMARY=summary),
    ):
        assert finished.returncode == 7
        assert "must be a file that can be written: " in finished.stderr
        assert "Traceback" not in finished.stderr


@pytest.fixture
def pipe(tmp_path):
    """A named pipe that somebody reads: its path, and the descriptor at which it is read."""
    os.mkfifo(tmp_path / "pipe")
    descriptor = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    yield tmp_path / "pipe", descriptor
    os.close(descriptor)


@pytest.fixture
def no_reader():
    """The end of a pipe into which one may write, but nobody reads any more."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


def test_a_file_is_written_where_a_link_leads(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there/old.html").write_text("old")
    shutil.copy(REPORT, tmp_path / "report.json")
    for name in ("old.html", "new.html"):
        link = tmp_path / name
        link.symlink_to(tmp_path / "there" / name)
        assert compress("report", tmp_path, "--html", link).returncode == 0
        assert link.is_symlink()
        assert (tmp_path / "there" / name).read_text().startswith("<!doctype html>")


def test_what_is_written_into_a_pipe_reaches_its_reader_and_the_pipe_stays(pipe, tmp_path):
    path, descriptor = pipe
    (tmp_path / "link").symlink_to(path)
    for given in (path, tmp_path / "link"):
        assert gate(REPORT, "--junit", given).returncode == 0
        assert ElementTree.fromstring(os.read(descriptor, 65536)).tag == "testsuites"
        assert path.is_fifo()
    assert gate(REPORT, GITHUB_ACTIONS="true", GITHUB_STEP_SUMMARY=str(path)).returncode == 0
    assert os.read(descriptor, 65536).startswith(b"# Gate of digits")


@pytest.mark.parametrize("form", [[], ["--json"]], ids=["text", "json"])
def test_a_reader_that_has_left_changes_nothing_else(larger, tmp_path, no_reader, form):
    junit, summary = tmp_path / "gate.xml", tmp_path / "summary.md"
    in_actions = {"GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(summary)}
    finished = gate(larger, "--junit", junit, *form, stdout=no_reader, **in_actions)
    assert finished.returncode == 3
    assert finished.stderr.startswith("::error title=size_bytes::unmet")
    assert len(finished.stderr.splitlines()) == 1
    assert junit.exists()
    assert summary.read_text().startswith("# Gate of digits")


def test_standard_output_that_is_full_exits_7_after_all_else_is_told(larger, tmp_path):
    junit, summary = tmp_path / "gate.xml", tmp_path / "summary.md"
    with Path("/dev/full").open("w") as full:
        in_actions = {"GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(summary)}
        finished = gate(larger, "--junit", junit, stdout=full.fileno(), **in_actions)
    assert finished.returncode == 7
    command, error = finished.stderr.splitlines()
    assert command.startswith("::error title=size_bytes::unmet")
    assert error.startswith("error: standard output must take what is printed: No space left on device")
    assert junit.exists()
    assert summary.read_text().startswith("# Gate of digits")


def test_a_summary_that_cannot_be_written_exits_7_after_all_else_is_told(larger, tmp_path):
    junit, summary = tmp_path / "gate.xml", str(tmp_path / "none/summary.md")
    finished = gate(larger, "--junit", junit, GITHUB_ACTIONS="true", GITHUB_STEP_SUMMARY=summary)
    assert finished.returncode == 7
    assert finished.stdout.startswith("unmet: size_bytes")
    assert finished.stderr.startswith("::error title=size_bytes::unmet")
    assert junit.exists()


def test_a_junit_xml_that_cannot_be_written_exits_7_after_all_else_is_told(larger, tmp_path):
    summary = tmp_path / "summary.md"
    (tmp_path / "file").touch()
    finished = gate(
        larger, "--junit", tmp_path / "file/gate.xml", GITHUB_ACTIONS="true", GITHUB_STEP_SUMMARY=str(summary)
    )
    assert finished.returncode == 7
    assert finished.stdout.startswith("unmet: size_bytes")
    assert finished.stderr.startswith("::error title=size_bytes::unmet")
    assert "unmet: size" in summary.read_text()


def test_a_junit_xml_can_follow_what_is_printed_in_one_file(larger, tmp_path):
    with (tmp_path / "log").open("wb") as log:
        assert gate(larger, "--junit", tmp_path / "log", stdout=log.fileno()).returncode == 3
    told = (tmp_path / "log").read_text()
    assert told.startswith("unmet: size_bytes")
    assert told.endswith("</testsuites>\n")


def test_in_github_actions_no_error_of_usage_is_a_command():
    finished = gate(REPORT, "a\n::error::b", GITHUB_ACTIONS="true")
    assert finished.returncode == 2
    assert "Usage: " in finished.stderr
    assert "\n: :error::b" in finished.stderr
    assert not any(line.lstrip().startswith("::") for line in finished.stderr.splitlines())


def test_in_github_actions_verdicts_reach_the_summary_and_the_annotations(larger, tmp_path):
    summary = tmp_path / "summary.md"
    finished = gate(larger, "--json", GITHUB_ACTIONS="true", GITHUB_STEP_SUMMARY=str(summary))
    assert finished.returncode == json.loads(finished.stdout)["exit_code"] == 3
    assert finished.stderr == (
        "::error title=size_bytes::unmet: size_bytes must be <= 9611, got 10423 (9423 before): "
        "812 bytes (8.4 %25) too many"
    )
    assert summary.read_text().startswith("# Gate of digits\n\n- unmet: size_bytes must be &lt;= 9611, got 10423")


def test_in_github_actions_faults_of_a_file_are_shown_at_their_lines(tmp_path):
    (tmp_path / "budget.yaml").write_text("size_bytes: {max_increse: 0.1}\nlatency_ratio: 5\n")
    finished = gate(REPORT, "--budget", tmp_path / "budget.yaml", GITHUB_ACTIONS="true", GITHUB_WORKSPACE=str(tmp_path))
    assert finished.stderr.splitlines()[-2:] == [
        "::error file=budget.yaml,line=1,col=14::unknown key 'max_increse' in size_bytes; did you mean 'max_increase'?",
        "::error file=budget.yaml,line=2,col=16::latency_ratio must be a mapping, got 5",
    ]


def test_what_changed_is_told_as_text_or_markdown(larger, tmp_path):
    finished = compress("diff", REPORT, larger)
    assert finished.returncode == 0
    assert finished.stdout == "Row 5, onnx_export, delivered\n  size in bytes: 9,423 -> 10,423 (+10.6 %)\n"
    summary = tmp_path / "summary.md"
    written = compress("diff", REPORT, larger, "--markdown", GITHUB_ACTIONS="true", GITHUB_STEP_SUMMARY=str(summary))
    assert written.stdout == summary.read_text()
    assert written.stdout.endswith("## Row 5, onnx_export, delivered\n\n- size in bytes: 9,423 -> 10,423 (+10.6 %)\n")


def test_reports_that_are_equal_do_not_differ():
    finished = compress("diff", REPORT, REPORT)
    assert (finished.returncode, finished.stdout) == (0, "nothing changed\n")


def test_names_in_a_report_reach_a_runner_and_a_page_as_text(changed, tmp_path):
    def change(document):
        document["metrics"] = [{"name": name, "unit": name, "higher_is_better": True} for name in HOSTILE]
        document["settings"] = {name: name for name in HOSTILE}
        document["rows"][-1]["stage"] = "".join(HOSTILE)
        for row in document["rows"]:
            row["measurement"]["metrics"] = dict.fromkeys(HOSTILE, 0.5)

    report, summary, junit = changed(change), tmp_path / "summary.md", tmp_path / "gate.xml"
    in_actions = {"GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(summary)}
    judged = gate(report, "--junit", junit, **in_actions)
    told = compress("diff", REPORT, report, **in_actions)
    assert (judged.returncode, told.returncode) == (4, 0)
    commands = judged.stderr.splitlines()
    assert len(commands) == 1 + len(HOSTILE)  # the metrics that only one of the reports has
    assert all(line.startswith("::error title=") for line in commands)
    for line in [*judged.stdout.splitlines(), *told.stdout.splitlines()]:
        assert not line.lstrip().startswith("::")
        assert "##[" not in line
    prose = summary.read_text()
    assert "<" not in prose
    for character in "`|":
        assert prose.count(character) == prose.count(f"\\{character}")
    (suite,) = ElementTree.parse(junit).getroot()
    assert {case.get("name") for case in suite} >= set(HOSTILE)
