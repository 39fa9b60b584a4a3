import json
import shlex
import subprocess
import sys

from example_report import chain, classifiers, fidelity, latency, prepared, report, row

from compressor.records.measurements import MetricInfo
from compressor.records.report import Verdict
from compressor.report.markdown import to_markdown
from compressor.report.remarks import remarks
from compressor.text.layout import escape


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


def training(found) -> list[str]:
    """The lines of the section about training."""
    return to_markdown(found).partition("## Training\n")[2].partition("\n## ")[0].splitlines()


def test_each_loss_of_a_stage_that_trained_is_shown_from_first_to_last_epoch():
    losses = ({"kd": 0.51234567, "hard": 2.3}, {"kd": 0.3, "hard": 2.0}, {"kd": 1.25e-5, "hard": 123456.0})
    trained = row("distillation").model_copy(update={"losses": losses})
    lines = training(report(row("baseline"), trained, row("int8_ptq")))
    assert [line for line in lines if line] == [
        "distillation, 3 epochs; losses are means over an epoch, before their weights:",
        "| loss | first epoch | last epoch |",
        "|---|--:|--:|",
        "| kd | 0.5123 | 1.25e-05 |",
        "| hard | 2.3 | 1.235e+05 |",
    ]


def test_one_epoch_is_first_and_last():
    lines = training(report(row("training").model_copy(update={"losses": ({"hard": 2.0},)})))
    assert lines[1] == "training, 1 epoch; losses are means over an epoch, before their weights:"
    assert lines[-1] == "| hard | 2 | 2 |"


def test_loss_that_only_some_epochs_have_is_left_empty_in_the_others():
    lines = training(report(row("a").model_copy(update={"losses": ({"kd": 1.0}, {"hint": 2.0})})))
    assert lines[-2:] == ["| kd | 1 |  |", "| hint |  | 2 |"]


def test_preparations_say_how_long_they_took_and_whether_they_ran():
    lines = training(report(row("training")).model_copy(update={"preparations": (prepared(), prepared(reused=True))}))
    assert lines[1:] == [
        "- soft_labels took 12.3 s.",
        "- soft_labels was taken from the store; it took 12.3 s when it ran.",
    ]


def test_run_without_training_and_preparations_has_no_such_section():
    assert "Training" not in to_markdown(chain())


def test_names_of_losses_and_preparations_cannot_bring_markup_or_cells_into_the_report():
    hostile = "<img src=x>|`code`|[link](http://x)\n# heading\x1b[31m"
    trained = row(hostile).model_copy(update={"losses": ({hostile: 1.0},)})
    found = report(trained).model_copy(update={"preparations": (prepared(hostile),)})
    text = "\n".join(training(found))
    assert text.count("img") == 3
    assert not {"<", "\x1b"} & set(text)
    for character in "`[":
        assert text.count(character) == text.count(f"\\{character}")
    cells = [line.replace("\\|", "").count("|") for line in text.splitlines() if line.startswith("|")]
    assert cells == [4] * 3


def changes(found) -> list[str]:
    """The lines of the section about what compression changed."""
    return to_markdown(found).partition("## What compression changed\n")[2].partition("\n## ")[0].splitlines()


def test_classifiers_are_compared_figure_by_figure():
    lines = changes(classifiers())
    assert "for 98.32 % of the 9,990 test samples" in lines[1]
    table = [line for line in lines if line.startswith("| ")][:7]
    assert table == [
        "| figure | baseline | delivered |",
        "| top-1 accuracy | 99.00 % | 98.00 % |",
        "| top-5 accuracy | 99.91 % | 99.91 % |",
        "| macro-F1 | 98.90 % | 97.90 % |",
        "| expected calibration error | 1.23 % | 1.23 % |",
        "| agreement with the baseline | 100.00 % | 98.32 % |",
        "| KL divergence from the baseline | 0 nats | 0.0457 nats |",
    ]


def test_classes_and_samples_that_lost_most_are_named_by_label_and_index():
    lines = changes(classifiers())
    assert "| dog (1) | 1,200 | 95.00 % | 90.00 % | -5.00 points |" in lines
    assert "| 7 | 3 | 66.67 % | 33.33 % | -33.33 points |" in lines  # a class beyond the labels
    assert "| 4711 | dog (1) | dog (1) | cat (0) | 97.00 % | 2.00 % |" in lines


def test_labels_that_are_the_indices_are_not_repeated():
    assert "| 4711 | 1 | 1 | 0 | 97.00 % | 2.00 % |" in changes(classifiers(labels=("0", "1")))


def test_model_that_lost_nothing_has_no_tables_of_losses():
    nothing = fidelity(1.0).model_copy(update={"worst_classes": (), "worst_samples": ()})
    lines = changes(classifiers(lost=nothing))
    assert "No class is recognized less often than by the baseline." in lines
    assert sum(line.startswith("|--") for line in lines) == 1


def test_baseline_alone_and_tasks_that_are_no_classification_have_no_such_section():
    alone = classifiers().model_copy(update={"rows": classifiers().rows[:1]})
    for found in (alone, chain()):
        assert "What compression changed" not in to_markdown(found)


def test_names_of_classes_cannot_bring_html_markup_or_cells_into_the_report():
    hostile = "<img src=x onerror=alert(1)>|`code`|[link](http://x)\n# heading\x1b[31m\u202e"
    lines = changes(classifiers(labels=(hostile, hostile)))
    rows = [line for line in lines if line.startswith("|")]
    assert sum("img" in line for line in rows) == 2
    text = "\n".join(lines)
    assert not {"<", "\x1b", "\u202e"} & set(text)
    for character in "`[":
        assert text.count(character) == text.count(f"\\{character}")
    cells = [line.replace("\\|", "").count("|") for line in rows]
    assert cells == [4] * 8 + [6] * 4 + [7] * 3


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
        "import compressor.records.environment, compressor.verdicts.gate, compressor.report.page.html\n"
        "compressor.records.environment.environment()\n"
        "assert not {'torch', 'onnx', 'onnxruntime', 'numpy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
