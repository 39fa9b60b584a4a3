import pytest
from example_report import ACCURACY, BASELINE, LOSS, chain, latency, report, row

from compressor.records.measurements import MetricInfo
from compressor.records.report import Verdict
from compressor.report.remarks import headline, remarks, timing
from compressor.report.table import to_table


def test_the_table_is_aligned_and_has_the_figures_of_each_row():
    lines = to_table(chain()).splitlines()
    assert lines[0].split("  ")[0] == "stage"
    first, last = (" ".join(lines[index].split()) for index in (2, 5))
    assert first == "training 1.72 MB 1.58 MB 431,080 0.100 ms 99.00 %"
    assert last == "int8_ptq 14.2 kB 11.0 kB 25,000 3.20x faster [3.17, 3.23] 98.81 % -0.19 points"
    starts = [line.index(unit) for line, unit in zip(lines[2:6], ("MB", "kB", "kB", "kB"), strict=True)]
    assert len(set(starts)) == 1
    assert to_table(chain()).isascii()


def test_a_row_without_latency_says_so():
    found = report(row("a", timed=None), row("b", timed=None)).model_copy(update={"latency_session": None})
    assert to_table(found).count("not measured") == 3
    assert timing(found) == "Latency was not measured."


def test_every_metric_has_its_columns():
    rows = row("a", metrics={"accuracy": 0.9, "loss": 0.3}), row("b", metrics={"accuracy": 0.8, "loss": 0.2})
    table = to_table(report(*rows, metrics=(ACCURACY, LOSS)))
    assert "accuracy (test)" in table
    assert "loss (test)" in table
    assert "-0.1 nats" in table


def test_the_noise_floor_is_told():
    told = timing(report(row("a"), noise=latency(1.001, 0.002)))
    assert "the baseline takes 0.100 ms" in told
    assert told.endswith("Noise floor: the baseline against itself shows no difference [0.999, 1.003].")


def test_verdicts_stand_below_the_table():
    verdict = Verdict(metric="size_ratio", limit=">= 60", status="unmet", message="size_ratio must be >= 60, got 41.2")
    assert to_table(report(row("a"), verdicts=(verdict,))).endswith("Gate, unmet: size_ratio must be >= 60, got 41.2")


def test_a_slower_row_is_named_with_the_row_before_it():
    assert "int8_ptq is 1.29x slower than zeroing." in remarks(chain())


def test_a_larger_row_is_named():
    (remark,) = remarks(report(row("a", size_bytes=1000), row("b", size_bytes=1500)))
    assert remark == "b is 500 B larger than a: 1.50 kB after 1.00 kB."
    # the names that an export writes into the file are worth no sentence
    assert remarks(report(row("a", size_bytes=12_301), row("b", size_bytes=12_330))) == ()


def test_a_less_accurate_row_is_named_whatever_the_direction_of_the_metric():
    rows = row("a", metrics={"accuracy": 0.99, "loss": 0.3}), row("b", metrics={"accuracy": 0.98, "loss": 0.4})
    assert remarks(report(*rows, metrics=(ACCURACY, LOSS))) == (
        "b has a lower accuracy than a: 98.00 % after 99.00 % (-1.00 points).",
        "b has a higher loss than a: 0.4 nats after 0.3 nats (+0.1 nats).",
    )


def test_nothing_is_said_about_rows_that_only_improve():
    better = row(
        "b",
        size_bytes=10,
        transfer_bytes=10,
        nonzero=10,
        parameters=10,
        metrics={"accuracy": 1.0},
        timed=latency(9),
    )
    assert remarks(report(row("a"), better)) == ()


@pytest.mark.parametrize("noise", [latency(1.0, 0.05), latency(1.05, 0.001), latency(1 / 1.05, 0.001)])
def test_a_slowdown_within_its_interval_or_within_the_noise_is_not_claimed(noise):
    slightly = row("b", timed=latency(0.97, 0.001))
    uncertain = row("b", timed=latency(0.97, 0.05))
    assert len(remarks(report(row("a"), slightly))) == 1
    assert remarks(report(row("a"), slightly, noise=noise)) == ()
    assert remarks(report(row("a"), uncertain)) == ()


def test_zeros_that_make_the_file_no_smaller_are_called_what_they_are():
    told = [remark for remark in remarks(chain()) if "zero" in remark and "%" in remark]
    assert told[0] == (
        "50 % of the parameters of zeroing are zero, 12,500 of 25,000 are not, but its file is as large as that of "
        "distillation, 58.0 kB after 58.0 kB: zeros are stored and multiplied like other numbers; they only compress "
        "better, to 31.0 kB after 52.0 kB (gzip). It is no faster; beside the baseline: 4.12x faster [4.08, "
        "4.16], distillation 4.10x faster [4.06, 4.14]."
    )


def test_a_zero_here_and_there_is_not_mentioned():
    assert not [remark for remark in remarks(report(row("a"), row("b", nonzero=24_900))) if "zero" in remark]


def test_a_gain_of_speed_by_zeros_is_claimed_only_beyond_the_noise():
    within, beyond = (row("b", nonzero=12_500, timed=latency(ratio, 0.001)) for ratio in (1.004, 1.1))
    (told,) = remarks(report(row("a"), within, noise=latency(1.0, 0.005)))
    assert told.endswith("It is no faster; beside the baseline: 1.004x faster [1.003, 1.005].")
    (told,) = remarks(report(row("a"), beyond, noise=latency(1.0, 0.005)))
    assert "It is faster; beside the baseline: 1.1" in told


def test_zeros_that_come_with_a_smaller_file_are_not_mentioned():
    assert not remarks(report(row("a"), row("b", size_bytes=30_000, nonzero=24_000)))


def test_rows_of_the_same_stage_are_told_apart():
    rows = row("training"), row("prune"), row("prune", size_bytes=200_000)
    assert remarks(report(*rows)) == ("prune (row 3) is 100 kB larger than prune (row 2): 200 kB after 100 kB.",)


def test_the_headline_says_what_came_in_and_what_came_out():
    assert headline(chain()) == "1.72 MB to 14.2 kB: 121x smaller, 3.20x faster, accuracy 99.00 % to 98.81 %"


def test_the_headline_does_not_claim_a_speedup_that_the_interval_does_not_show():
    assert "no faster" in headline(report(row("a"), row("b", timed=latency(1.01, 0.02))))


def test_the_headline_of_an_untimed_run_does_not_speak_of_speed():
    assert headline(report(row("a"), row("b", timed=None))) == (
        "100 kB to 100 kB: no smaller, accuracy 99.00 % to 99.00 %"
    )


def test_names_cannot_command_the_terminal():
    hostile = "\x1b]0;owned\x07\x1b[2J\r\n\u202egnp.exe"
    metric = MetricInfo(name=hostile, unit="\x9b31m", higher_is_better=True)
    verdict = Verdict(metric=hostile, limit="", status="unmet", message=hostile)
    rows = (
        row(hostile, metrics={hostile: 0.5}, timed=BASELINE),
        row(hostile, metrics={hostile: 0.4}, size_bytes=10**6, nonzero=5, timed=latency(0.5)),
    )
    table = to_table(report(*rows, metrics=(metric,), verdicts=(verdict,)))
    assert [character for character in table if not character.isprintable()] == ["\n"] * table.count("\n")
    assert len(table.splitlines()) == 2 + 2 + 1 + 1 + 4 + 1 + 1


def test_slower_int8_is_told_how_to_stay_fast():
    report = chain()
    rows = [row.model_copy(update={"settings": {**row.settings, "keep_float": []}}) for row in report.rows]
    said = remarks(report.model_copy(update={"rows": tuple(rows)}))
    advice = "; with `keep_float: auto` layers that int8 makes slower compute in float."
    assert f"int8_ptq is 1.29x slower than zeroing{advice}" in said
