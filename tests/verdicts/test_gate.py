import math

import pytest
from example_report import LOSS, classifiers, fidelity, latency, report, row
from pydantic import ValidationError

from compressor.records.report import Verdict
from compressor.text.figures import speed
from compressor.verdicts.gate import Gate, exit_code, judge


def one(gate: dict, *rows, **changes) -> Verdict:
    (verdict,) = judge(Gate.model_validate(gate), report(*rows, **changes))
    return verdict


def test_a_ratio_of_sizes_that_equals_its_limit_is_met():
    verdict = one({"size_ratio": {"min": 4}}, row("a", size_bytes=4000), row("b", size_bytes=1000))
    assert (verdict.status, verdict.message) == ("met", "size_ratio is 4.00")


def test_a_ratio_of_sizes_that_falls_short_says_by_how_much():
    verdict = one({"size_ratio": {"min": 60}}, row("a", size_bytes=41_200), row("b", size_bytes=1000))
    assert verdict.status == "unmet"
    assert verdict.limit == ">= 60"
    assert verdict.message == "size_ratio must be >= 60, got 41.2: 31 % short"


def test_a_narrow_miss_is_not_rounded_to_the_limit():
    verdict = one({"size_ratio": {"min": 60}}, row("a", size_bytes=599_999), row("b", size_bytes=10_000))
    assert verdict.message == "size_ratio must be >= 60, got 59.9999: 0.00017 % short"


@pytest.mark.parametrize("metric", ["size_bytes", "transfer_bytes"])
def test_one_byte_too_many_is_unmet(metric):
    within = one({metric: {"max": 20_000}}, row("a"), row("b", **{metric: 20_000}))
    beyond = one({metric: {"max": 20_000}}, row("a"), row("b", **{metric: 20_001}))
    assert (within.status, beyond.status) == ("met", "unmet")
    assert beyond.message == f"{metric} must be <= 20000, got 20001: 1 bytes (0.005 %) too many"


def test_an_accuracy_drop_that_equals_its_limit_is_met_in_spite_of_binary_fractions():
    assert 0.99 - 0.98 > 0.01
    rows = row("a", metrics={"accuracy": 0.99}), row("b", metrics={"accuracy": 0.98})
    assert one({"accuracy_drop": {"max": 0.01}}, *rows).status == "met"


def test_an_accuracy_drop_beyond_its_limit_says_by_how_much():
    rows = row("a", metrics={"accuracy": 0.9913}), row("b", metrics={"accuracy": 0.9813})
    verdict = one({"accuracy_drop": {"max": 0.004}}, *rows)
    assert verdict.status == "unmet"
    assert (
        verdict.message
        == "accuracy_drop must be <= 0.4 points, got 1 point (accuracy 99.13 % to 98.13 %): 0.6 points too much"
    )


def test_a_metric_for_which_lower_is_better_drops_when_it_rises():
    rows = row("a", metrics={"loss": 0.2}), row("b", metrics={"loss": 0.5})
    assert one({"accuracy_drop": {"max": 0.1}}, *rows, metrics=(LOSS,)).status == "unmet"
    assert one({"accuracy_drop": {"max": 0.1}}, *reversed(rows), metrics=(LOSS,)).status == "met"


@pytest.mark.parametrize(
    ("agreement", "status", "message"),
    [
        (0.98, "met", "agreement is 98 %"),
        (0.975, "unmet", "agreement must be >= 98 %, got 97.5 %: 0.5 points short"),
        (0.97999, "unmet", "agreement must be >= 98 %, got 97.999 %: 0.001 points short"),
    ],
)
def test_an_agreement_that_equals_its_limit_is_met_and_a_lower_one_says_by_how_much(agreement, status, message):
    (verdict,) = judge(Gate(agreement={"min": 0.98}), classifiers(lost=fidelity(agreement)))
    assert (verdict.status, verdict.message) == (status, message)


def test_an_agreement_of_models_that_are_no_classifiers_is_undecidable():
    verdict = one({"agreement": {"min": 0.98}}, row("a"), row("b"))
    assert verdict.status == "undecidable"
    assert verdict.message == "agreement must be >= 98 %, but no agreement was measured"


def test_only_the_first_and_the_last_row_count():
    rows = row("a"), row("b", metrics={"accuracy": 0.1}, size_bytes=10**9), row("c")
    gate = {"accuracy_drop": {"max": 0.0}, "size_ratio": {"min": 1.0}, "size_bytes": {"max": 100_000}}
    assert {verdict.status for verdict in judge(Gate.model_validate(gate), report(*rows))} == {"met"}


@pytest.mark.parametrize(
    ("found", "half_width", "status"),
    [
        (5.0, 0.01, "met"),
        (4.0, 0.01, "undecidable"),
        (4.03, 0.01, "undecidable"),
        (3.97, 0.01, "undecidable"),
        (3.0, 0.01, "unmet"),
        (5.0, 0.3, "undecidable"),
    ],
)
def test_a_ratio_of_latencies_is_decided_by_its_whole_interval(found, half_width, status):
    verdict = one({"latency_ratio": {"min": 4}}, row("a"), row("b", timed=latency(found, half_width)))
    assert verdict.status == status


def test_a_ratio_of_latencies_that_falls_short_says_by_how_much():
    verdict = one({"latency_ratio": {"min": 4}}, row("a"), row("b", timed=latency(3.0, 0.01)))
    assert verdict.message == "latency_ratio must be >= 4, got 3.00 [2.97, 3.03]: 25 % short"


@pytest.mark.parametrize("found", [4.1, 3.9])
def test_a_distance_to_the_limit_that_is_smaller_than_the_noise_is_undecidable(found):
    rows = row("a"), row("b", timed=latency(found, 0.001))
    quiet, noisy = latency(1.0, 0.005), latency(1.0, 0.03)
    assert one({"latency_ratio": {"min": 4}}, *rows, noise=quiet).status in {"met", "unmet"}
    verdict = one({"latency_ratio": {"min": 4}}, *rows, noise=noisy)
    assert verdict.status == "undecidable"
    assert "the baseline against itself gave 1.000 [0.971, 1.030]: the limit is within the noise" in verdict.message


@pytest.mark.parametrize("ratio", [1.05, 1 / 1.05])
def test_a_baseline_that_surely_differs_from_itself_decides_nothing(ratio):
    rows = row("a"), row("b", timed=latency(20.0))
    verdict = one({"latency_ratio": {"min": 4}}, *rows, noise=latency(ratio, 0.01))
    assert verdict.status == "undecidable"
    assert "not to be trusted" in verdict.message


def test_noise_that_is_wide_but_holds_1_does_not_hide_a_great_difference():
    rows = row("a"), row("b", timed=latency(20.0))
    assert one({"latency_ratio": {"min": 4}}, *rows, noise=latency(1.0, 0.2)).status == "met"


def test_ratios_are_written_as_in_tables():
    found = latency(1.0345, 0.004)
    message = one({"latency_ratio": {"min": 0.5}}, row("a"), row("b", timed=found)).message
    assert message.removeprefix("latency_ratio is ") in speed(found).replace("x faster", "")


def test_what_was_not_measured_is_undecidable():
    assert one({"latency_ratio": {"min": 4}}, row("a"), row("b", timed=None)).status == "undecidable"
    untimed = report(row("a"), row("b")).model_copy(update={"latency_session": None})
    assert judge(Gate.model_validate({"latency_ratio": {"min": 4}}), untimed)[0].status == "undecidable"
    nothing = report(row("a"), row("b"), metrics=())
    assert judge(Gate.model_validate({"accuracy_drop": {"max": 1.0}}), nothing)[0].status == "undecidable"


@pytest.mark.parametrize(
    ("statuses", "code"),
    [
        ([], 0),
        (["met", "met"], 0),
        (["met", "undecidable"], 4),
        (["undecidable", "unmet", "met"], 3),
    ],
)
def test_the_exit_code_puts_unmet_before_undecidable(statuses, code):
    assert exit_code([Verdict(metric="m", limit="", status=status, message="") for status in statuses]) == code


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"size_ratio": None},
        {"size_ratio": {}},
        {"size_ratio": {"max": 2.0}},
        {"accuracy_drop": {"min": 0.1}},
        {"size_bytes": {"min": 10}},
        {"size_bytes": {"max": 0}},
        {"size_ratio": {"min": 0}},
        {"agreement": {"min": 98.0}},
        {"agreement": {"max": 0.5}},
        {"size_ratio": {"min": True}},
        {"size_ratio": {"min": "60"}},
        {"latency_ratio": {"min": math.inf}},
        {"accuracy_drop": {"max": math.nan}},
        {"speed": {"min": 2.0}},
    ],
)
def test_a_gate_without_sense_is_refused(settings):
    with pytest.raises(ValidationError):
        Gate.model_validate(settings)
