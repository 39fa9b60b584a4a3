import json
import shlex
import subprocess
import sys

from example_report import chain, latency, report, row

from compressor.report.markdown import escape, to_markdown
from compressor.report.records import MetricInfo, Verdict
from compressor.report.remarks import remarks


def test_the_sections_stand_in_order():
    verdict = Verdict(metric="size_ratio", limit=">= 60", status="met", message="size_ratio is 121")
    text = to_markdown(chain().model_copy(update={"verdicts": (verdict,)}))
    parts = [
        "# digits\n",
        "1.72 MB to 14.2 kB: 121x smaller",
        "| stage | size | transfer (gzip) | parameters | latency vs baseline (95 % interval) |",
        "- int8_ptq is 1.29x slower than zeroing.",
        "## Gate\n\n- met: size_ratio is 121",
        "## How it was measured",
        "## Environment\n\n- cpu: Example 9000",
        "## How to reproduce it",
    ]
    places = [text.index(part) for part in parts]
    assert places == sorted(places)


def test_every_remark_of_the_table_is_in_the_markdown():
    text = to_markdown(chain())
    assert remarks(chain())
    for remark in remarks(chain()):
        assert f"- {escape(remark)}" in text.splitlines()


def test_a_run_without_gate_has_no_gate_section():
    assert "Gate" not in to_markdown(chain())


def test_facts_that_the_system_does_not_tell_are_unknown():
    text = to_markdown(chain())
    assert "- cpu_governor: unknown" in text
    assert "- versions: onnxruntime 1.22.0" in text


def test_every_row_of_the_table_has_as_many_cells_as_its_heading():
    hostile = "a|b\\|c`d<script>\n| x"
    metric = MetricInfo(name=hostile, unit="|", higher_is_better=True)
    rows = row(hostile, metrics={hostile: 0.5}), row(hostile, metrics={hostile: 0.4}, timed=latency(2.0))
    text = to_markdown(report(*rows, metrics=(metric,)))
    table = [line for line in text.splitlines() if line.startswith("|")]
    cells = [line.replace("\\\\", "").replace("\\|", "").count("|") for line in table]
    assert cells == [8] * 4


def test_names_cannot_bring_html_or_markup_into_the_report():
    hostile = "<img src=x onerror=alert(1)> `code` [link](http://x) *bold*\n# heading"
    verdict = Verdict(metric="m", limit="", status="unmet", message=hostile)
    found = report(row(hostile), row(hostile, size_bytes=10**6), verdicts=(verdict,))
    text = to_markdown(found.model_copy(update={"pipeline": hostile, "environment": {hostile: hostile}}))
    prose = text.partition("```sh")[0]
    assert "<" not in prose
    for character in "`*[":
        assert prose.count(character) == prose.count(f"\\{character}")
    assert "\n# heading" not in text


def test_the_command_reproduces_the_arguments_in_a_shell():
    overrides = ("task.data_dir=my data", "a='$(touch x)'", "stages.1.epochs=3")
    text = to_markdown(report(row("a"), overrides=overrides))
    command = text.partition("```sh\n")[2].partition("\n```")[0]
    assert shlex.split(command) == [
        "compress",
        "run",
        "digits.yaml",
        *(part for override in overrides for part in ("--set", override)),
    ]


def test_the_settings_of_the_run_cannot_end_their_block():
    found = report(row("a")).model_copy(update={"settings": {"name": "a\n```\n# b", "ratio": 0.5}})
    block = to_markdown(found).partition("```yaml\n")[2].partition("\n```")[0]
    assert json.loads(block) == {"name": "a\n```\n# b", "ratio": 0.5}


def test_reports_are_written_without_torch():
    program = (
        "import sys\n"
        "import compressor.report.json, compressor.report.markdown, compressor.report.table\n"
        "import compressor.report.environment, compressor.report.gate\n"
        "compressor.report.environment.environment()\n"
        "assert not {'torch', 'onnx', 'onnxruntime', 'numpy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
