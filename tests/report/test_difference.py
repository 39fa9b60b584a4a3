import pytest
from example_report import LOSS, chain, classifiers, fidelity, latency, report, row

from compressor.records.report import Report, Verdict
from compressor.report.difference import differences, to_markdown, to_text


def with_settings(**settings) -> Report:
    return chain().model_copy(update={"settings": {"name": "digits", **settings}})


def with_environment(**facts) -> Report:
    found = chain()
    return found.model_copy(update={"environment": {**found.environment, **facts}})


def changed(old: Report, new: Report) -> dict[str, tuple[str, ...]]:
    return {part.title: part.lines for part in differences(old, new)}


@pytest.mark.parametrize("found", [chain(), classifiers()])
def test_a_report_does_not_differ_from_itself(found):
    assert differences(found, found) == ()
    assert to_text(()) == "nothing changed"
    assert to_markdown(()) == "# What changed\n\nNothing changed.\n"


def test_settings_are_told_by_their_dotted_paths():
    old = with_settings(seed=0, gate={"size_ratio": {"min": 20}}, stages=[{"stage": "training", "epochs": 3}])
    new = with_settings(seed=0, gate=None, stages=[{"stage": "training", "epochs": 4, "protect": ["a", "b"]}])
    assert changed(old, new) == {
        "Settings": (
            "gate.size_ratio.min: 20 -> absent",
            "gate: absent -> null",
            "stages.0.epochs: 3 -> 4",
            'stages.0.protect: absent -> ["a", "b"]',
        )
    }


def test_a_stage_that_was_put_in_is_one_change_and_not_a_shift_of_all_that_follow():
    training, pruning, ptq = ({"stage": name, "epochs": 3} for name in ("training", "pruning", "ptq"))
    old, new = with_settings(stages=[training, ptq]), with_settings(stages=[training, pruning, {**ptq, "epochs": 4}])
    assert changed(old, new) == {
        "Settings": ("stages.2.epochs: 3 -> 4",),
        "Stages": ("added: stages.1 pruning",),
    }
    assert changed(new, old)["Stages"] == ("removed: stages.1 pruning",)


def test_a_row_tells_each_figure_that_changed():
    old = report(row("a"), row("b", size_bytes=20_000, nonzero=0, metrics={"accuracy": 0.99}, timed=latency(2.0)))
    new = report(row("a"), row("b", size_bytes=25_000, nonzero=5, metrics={"accuracy": 0.975}, timed=latency(3.0)))
    assert changed(old, new) == {
        "Row 2, b, delivered": (
            "size in bytes: 20,000 -> 25,000 (+25 %)",
            "parameters that are not zero: 0 -> 5",
            "latency vs baseline: 2.00x faster [1.98, 2.02] -> 3.00x faster [2.97, 3.03]",
            "accuracy (test): 99.00 % -> 97.50 % (-1.50 points)",
        )
    }


@pytest.mark.parametrize("ratio", [2.01, 1.99])
def test_speeds_whose_intervals_overlap_are_no_change(ratio):
    old, new = (report(row("a"), row("b", timed=latency(found))) for found in (2.0, ratio))
    assert differences(old, new) == ()


def test_a_speed_that_only_one_report_has_is_a_change():
    old, new = (report(row("a"), row("b", timed=timed)) for timed in (latency(2.0), None))
    (line,) = changed(old, new)["Row 2, b, delivered"]
    assert line == "latency vs baseline: 2.00x faster [1.98, 2.02] -> not measured"


def test_a_metric_that_only_one_report_has_is_a_change():
    old = report(row("a", metrics={"accuracy": 0.9}))
    new = report(row("a", metrics={"loss": 0.25}), metrics=(LOSS,))
    assert changed(old, new) == {
        "Row 1, a, delivered": ("accuracy (test): 90.00 % -> absent", "loss (test): absent -> 0.25 nats")
    }


def test_what_a_classifier_lost_is_told():
    (lines,) = changed(classifiers(), classifiers(lost=fidelity(0.95))).values()
    assert lines == ("agreement with the baseline: 98.32 % -> 95.00 %",)


def test_delivered_models_of_two_stages_are_compared_all_the_same():
    old = report(row("a"), row("int8_ptq", size_bytes=10_000))
    new = report(row("a"), row("int8_qat", size_bytes=11_000))
    assert changed(old, new) == {"Delivered, int8_ptq -> int8_qat": ("size in bytes: 10,000 -> 11,000 (+10 %)",)}


def test_the_environment_tells_versions_and_machine_but_not_the_load_of_the_moment():
    old = with_environment(versions={"torch": "2.12"}, cpu_flags=["avx2"], load_average=[1.0], steal_share=0.1)
    new = with_environment(versions={"torch": "2.13"}, cpu_flags=["avx2", "amx"], load_average=[9.0], steal_share=0.2)
    assert changed(old, new) == {
        "Environment": ('versions.torch: "2.12" -> "2.13"', 'cpu_flags: ["avx2"] -> ["avx2", "amx"]')
    }


def test_what_keeps_a_gate_from_comparing_two_reports_is_a_change():
    old = classifiers()
    last = old.rows[-1]
    fewer = last.model_copy(update={"measurement": last.measurement.model_copy(update={"samples": 360})})
    new = old.model_copy(
        update={
            "pipeline": "mnist",
            "rows": (*old.rows[:-1], fewer),
            "metrics": (old.metrics[0].model_copy(update={"unit": "", "higher_is_better": False}),),
            "latency_session": old.latency_session.model_copy(update={"threads": 8, "batch_size": 64}),
        }
    )
    assert changed(old, new)["How it was measured"] == (
        "pipeline: digits -> mnist",
        "test samples: 10,000 -> 360",
        "metric accuracy: %, higher is better -> no unit, lower is better",
        "latency: 1 thread, batch of 1 -> 8 threads, batch of 64",
    )


def test_a_limit_that_is_met_no_more_is_a_change():
    met = Verdict(metric="size_ratio", limit=">= 2", status="met", message="size_ratio is 3.00")
    old, new = (
        chain().model_copy(update={"verdicts": (met.model_copy(update={"status": status}),)})
        for status in ("met", "unmet")
    )
    assert changed(old, new) == {"Gate": ("size_ratio: met -> unmet",)}
    assert changed(new.model_copy(update={"verdicts": ()}), new) == {"Gate": ("size_ratio: absent -> unmet",)}


def test_text_and_markdown_have_the_same_lines():
    parts = differences(with_settings(seed=0), with_settings(seed=1))
    assert to_text(parts) == "Settings\n  seed: 0 -> 1"
    assert to_markdown(parts) == "# What changed\n\n## Settings\n\n- seed: 0 -> 1\n"


def test_names_cannot_bring_lines_markup_or_html_into_what_changed():
    hostile = "</script><img src=x onerror=alert(1)>\n# a\x1b[31m|`b`[c](http://x)"
    old = report(row(hostile, metrics={"accuracy": 0.9}))
    new = report(row(hostile, metrics={"accuracy": 0.8}))
    settings = with_settings(**{hostile: hostile, "stages": [{"stage": hostile}]}).settings
    parts = differences(old, new.model_copy(update={"settings": settings, "environment": {hostile: hostile}}))
    text, markdown = to_text(parts), to_markdown(parts)
    assert not {"\x1b"} & set(text + markdown)
    assert "\n# a" not in text + markdown
    assert "<" not in markdown
    for character in "`[|":
        assert markdown.count(character) == markdown.count(f"\\{character}")


@pytest.mark.parametrize("stages", [None, 5, "training", [1, "a", None], [{"stage": ["x"]}], {"a": 1}])
def test_settings_of_any_shape_can_be_compared(stages):
    differences(with_settings(stages=stages), with_settings(stages=[{"stage": "training"}]))
    differences(with_settings(stages=[{"stage": "training"}]), with_settings(stages=stages))
