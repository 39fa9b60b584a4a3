import math

import pytest
from example_report import ACCURACY, LOSS, classifiers, fidelity, latency, report, row
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from compressor.records.report import Report, Verdict
from compressor.verdicts.budget import Budget, compare
from compressor.verdicts.gate import exit_code

MACHINE = {"cpu": "A", "cpu_flags": ["avx2"], "cores": 2, "usable_cores": 2, "versions": {"onnxruntime": "1.22.0"}}


def delivered(**changes) -> Report:
    """A baseline and a delivered model that is twice as fast."""
    return report(row("a"), row("b", **{"timed": latency(2.0), **changes}))


def on(machine: dict, found: Report) -> Report:
    return found.model_copy(update={"environment": machine})


def verdicts(budget: dict, now: Report, before: Report) -> dict[str, Verdict]:
    return {verdict.metric: verdict for verdict in compare(Budget.model_validate(budget), now, before)}


def one(metric: str, allowed: dict, now: Report, before: Report) -> Verdict:
    named = {metric: allowed} if metric in Budget.model_fields else {"metrics": {metric: allowed}}
    return verdicts(named, now, before)[metric]


def test_without_a_budget_sizes_speed_and_every_metric_are_compared():
    rows = [row(name, metrics={"accuracy": 0.9, "loss": 0.3}, timed=latency(2.0)) for name in "ab"]
    found = report(*rows, metrics=(ACCURACY, LOSS))
    judged = verdicts({}, found, found)
    assert list(judged) == ["size_bytes", "transfer_bytes", "latency_ratio", "accuracy", "loss"]
    assert {verdict.status for verdict in judged.values()} == {"met"}


@pytest.mark.parametrize("metric", ["size_bytes", "transfer_bytes"])
def test_bytes_may_grow_by_2_percent_and_not_by_one_byte_more(metric):
    before = delivered(**{metric: 10_050})
    assert verdicts({}, delivered(**{metric: 10_251}), before)[metric].status == "met"
    beyond = verdicts({}, delivered(**{metric: 10_252}), before)[metric]
    assert beyond.message == f"{metric} must be <= 10251, got 10252 (10050 before): 1 bytes (0.0098 %) too many"


def test_a_share_that_binary_fractions_cannot_hold_is_kept_exactly():
    assert math.floor(100 * 1.15) == 114
    assert one("size_bytes", {"max_increase": 0.15}, delivered(size_bytes=115), delivered(size_bytes=100)).limit == (
        "<= 115"
    )


def test_a_metric_that_drops_by_its_limit_is_met_and_by_more_says_by_how_much():
    before = delivered(metrics={"accuracy": 0.99})
    assert one("accuracy", {"max_drop": 0.01}, delivered(metrics={"accuracy": 0.98}), before).status == "met"
    beyond = one("accuracy", {"max_drop": 0.01}, delivered(metrics={"accuracy": 0.975}), before)
    assert beyond.message == "accuracy must be >= 98 %, got 97.5 % (99.00 % before): 0.5 points short"


def test_a_metric_for_which_lower_is_better_becomes_worse_when_it_rises():
    before, after = (
        report(row("a", metrics={"loss": 0.2}), row("b", metrics={"loss": loss}), metrics=(LOSS,))
        for loss in (0.2, 0.3)
    )
    assert one("loss", {"max_drop": 0.05}, after, before).message == (
        "loss must be <= 0.25, got 0.3 (0.2 before): 0.05 too much"
    )
    assert one("loss", {"max_drop": 0.0}, before, after).status == "met"


@pytest.mark.parametrize(
    ("now", "half_width", "status"),
    [
        (2.0, 0.01, "met"),
        (3.0, 0.01, "met"),
        (1.5, 0.01, "unmet"),
        (1.8, 0.01, "undecidable"),
        # 1.84 / 1.8 is 2.2 % above the limit; the intervals of both reports together are 2 % wide, the noise 0.4 %
        (1.84, 0.01, "undecidable"),
        (1.85, 0.01, "met"),
        (2.0, 0.2, "undecidable"),
    ],
)
def test_a_speed_is_decided_by_the_whole_intervals_of_both_reports(now, half_width, status):
    verdict = one("latency_ratio", {}, delivered(timed=latency(now, half_width)), delivered(timed=latency(2.0, 0.01)))
    assert verdict.status == status


def test_a_speed_that_fell_too_far_says_from_where_and_by_how_much():
    verdict = one("latency_ratio", {}, delivered(timed=latency(1.5)), delivered(timed=latency(2.0)))
    assert (
        verdict.message == "latency_ratio must be >= 1.8, got 1.50 [1.49, 1.52] (2.00 [1.98, 2.02] before): 17 % short"
    )


@pytest.mark.parametrize("noisy", ["now", "before"])
def test_the_noise_of_either_session_counts(noisy):
    calm, found = delivered(timed=latency(2.0, 0.001)), delivered(timed=latency(1.9, 0.001))
    assert one("latency_ratio", {}, found, calm).status == "met"
    session = calm.latency_session.model_copy(update={"noise": latency(1.0, 0.08)})
    pair = {"now": found, "before": calm}
    pair[noisy] = pair[noisy].model_copy(update={"latency_session": session})
    verdict = one("latency_ratio", {}, pair["now"], pair["before"])
    assert verdict.status == "undecidable"
    assert "the limit is within the noise" in verdict.message


def test_speeds_that_were_taken_with_other_threads_are_undecidable():
    found = delivered()
    other = found.model_copy(update={"latency_session": found.latency_session.model_copy(update={"threads": 4})})
    verdict = one("latency_ratio", {}, found, other)
    assert verdict.message == (
        "latency_ratio must be at most 10 % below the earlier, but it was timed on 4 threads with a batch of 1 in the "
        "earlier report, on 1 with 1 in the report"
    )


@pytest.mark.parametrize("lacking", ["now", "before"])
def test_a_speed_that_one_report_lacks_is_undecidable(lacking):
    pair = {"now": delivered(), "before": delivered(), lacking: delivered(timed=None)}
    assert verdicts({}, pair["now"], pair["before"])["latency_ratio"].status == "undecidable"


@pytest.mark.parametrize("change", [{"parameters": 50_000}, {"macs": 2_000_000}])
def test_speeds_over_another_float_baseline_are_undecidable(change):
    found = delivered()
    first = found.rows[0]
    larger = first.model_copy(update={"measurement": first.measurement.model_copy(update=change)})
    verdict = one("latency_ratio", {}, found.model_copy(update={"rows": (larger, found.rows[1])}), found)
    assert verdict.status == "undecidable"
    assert "the float baseline had 25,000 parameters and 1,000,000 MACs and has " in verdict.message


@pytest.mark.parametrize(
    ("load_before", "load_now", "ratio", "status"),
    [
        (2, 1, 2.0, "met"),
        (2, 1, 1.1, "undecidable"),
        (1, 2, 2.0, "undecidable"),
        (2, 2, 2.0, "met"),
        (2, 2, 1.5, "unmet"),
    ],
)
def test_milliseconds_count_what_load_did_to_the_float_baseline(load_before, load_now, ratio, status):
    def under(load: float, found: Report) -> Report:
        loaded = [
            one.model_copy(update={"latency": one.latency.model_copy(update={"p50_ms": load * one.latency.p50_ms})})
            for one in found.rows
        ]
        return on(MACHINE, found.model_copy(update={"rows": tuple(loaded)}))

    now, before = under(load_now, delivered(timed=latency(ratio))), under(load_before, delivered())
    assert one("latency_ms", {}, now, before).status == status


def test_milliseconds_of_one_machine_are_compared():
    before, slower = on(MACHINE, delivered()), on(MACHINE, delivered(timed=latency(1.5)))
    assert one("latency_ms", {}, before, before).status == "met"
    assert one("latency_ms", {}, slower, before).message == (
        "latency_ms must be <= 0.055, got 0.0667 (0.0500 before): 21 % too much"
    )
    assert one("latency_ms", {"max_increase": 0.33}, slower, before).status == "undecidable"


@pytest.mark.parametrize(
    "other",
    [
        {"cpu": "B"},
        {"cpu_flags": ["avx2", "avx512_vnni"]},
        {"cores": 4},
        {"usable_cores": 1},
        {"versions": {"onnxruntime": "1.23.0"}},
        {"versions": None},
    ],
)
def test_milliseconds_of_two_machines_are_undecidable(other):
    verdict = one("latency_ms", {}, on(MACHINE, delivered()), on({**MACHINE, **other}, delivered()))
    assert verdict.status == "undecidable"
    assert "the machines must be the same: " in verdict.message


def test_a_machine_that_the_system_does_not_name_is_not_the_same():
    unknown = on({**MACHINE, "cpu": None}, delivered())
    assert "cpu was None and is None" in one("latency_ms", {}, unknown, unknown).message


def test_milliseconds_and_agreement_are_off_unless_named():
    found = classifiers()
    assert not {"latency_ms", "agreement"} & verdicts({}, found, found).keys()
    assert verdicts({"agreement": {}, "latency_ms": {}}, found, found)["agreement"].level == "error"


def test_agreement_with_the_float_baseline_may_drop_only_so_far():
    before = classifiers(lost=fidelity(0.99))
    assert one("agreement", {}, classifiers(lost=fidelity(0.98)), before).status == "met"
    assert one("agreement", {}, classifiers(lost=fidelity(0.97)), before).message == (
        "agreement must be >= 98 %, got 97 % (99.00 % before): 1 point short"
    )


def test_agreement_that_a_report_lacks_is_undecidable():
    assert one("agreement", {}, delivered(), classifiers()).message == (
        "agreement must be at most 1 point worse than the earlier, but the report has none"
    )


def test_a_metric_that_only_one_report_has_is_undecidable():
    both = {"accuracy": 0.9, "loss": 0.2}
    two = report(row("a", metrics=both), row("b", metrics=both), metrics=(ACCURACY, LOSS))
    for now, before, lacking in ((two, delivered(), "the earlier report"), (delivered(), two, "the report")):
        verdict = verdicts({}, now, before)["loss"]
        assert verdict.status == "undecidable"
        assert f"{lacking} has no such metric; its metrics are: accuracy" in verdict.message


def test_a_metric_of_the_budget_that_no_report_has_is_undecidable():
    assert one("acuracy", {}, delivered(), delivered()).status == "undecidable"


def test_a_metric_that_changed_its_unit_or_direction_is_undecidable():
    turned = delivered().model_copy(update={"metrics": (ACCURACY.model_copy(update={"higher_is_better": False}),)})
    assert verdicts({}, delivered(), turned)["accuracy"].status == "undecidable"


def test_a_metric_on_another_test_split_is_undecidable():
    found = delivered()
    fewer = found.rows[-1].measurement.model_copy(update={"samples": 360})
    other = found.model_copy(update={"rows": (found.rows[0], found.rows[1].model_copy(update={"measurement": fewer}))})
    assert "the test split had 10,000 samples and has 360" in verdicts({}, other, found)["accuracy"].message


def test_a_report_of_another_pipeline_is_nothing_to_compare_with():
    (verdict,) = compare(Budget(), delivered(), delivered().model_copy(update={"pipeline": "mnist"}))
    assert exit_code([verdict]) == 4
    assert verdict.message == (
        "reports must be two of the same pipeline, but the baseline is of 'mnist' and the report of 'digits'"
    )


def test_what_is_at_level_warn_never_decides_the_exit_code():
    budget = {"size_bytes": {"level": "warn"}, "metrics": {"accuracy": {"level": "off"}, "f1": {"level": "warn"}}}
    judged = verdicts(budget, delivered(size_bytes=10**6), delivered())
    assert (judged["size_bytes"].status, judged["f1"].status) == ("unmet", "undecidable")
    assert "accuracy" not in judged
    assert exit_code(tuple(judged.values())) == 0


def test_a_budget_that_is_all_off_gives_no_verdict():
    off = {name: {"level": "off"} for name in Budget.model_fields if name != "metrics"}
    assert (
        compare(Budget.model_validate({**off, "metrics": {"accuracy": {"level": "off"}}}), delivered(), delivered())
        == ()
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"size_bytes": {"max_increase": -0.1}},
        {"size_bytes": {"max_drop": 0.1}},
        {"latency_ratio": {"max_decrease": 0.0}},
        {"latency_ratio": {"max_decrease": 1.0}},
        {"latency_ms": {"max_increase": 0.0}},
        {"latency_ms": {"max_increase": 1.7e308}},
        {"size_bytes": {"max_increase": 1.7e308}},
        {"metrics": {"accuracy": 0.01}},
        {"accuracy": {"max_drop": 0.01}},
        {"size_bytes": {"level": "fatal"}},
    ],
)
def test_a_budget_without_sense_is_refused(settings):
    with pytest.raises(ValidationError):
        Budget.model_validate(settings)


sizes = st.integers(1, 10**12)
shares = st.floats(0, 1)
ratios = st.floats(1e-3, 1e3)


@given(st.tuples(sizes, sizes), st.tuples(shares, shares), st.tuples(ratios, ratios), st.floats(0.001, 1.0))
def test_a_model_that_is_nowhere_worse_never_fails(sizes, accuracies, ratios, half_width):
    before, now = (
        delivered(size_bytes=size, metrics={"accuracy": accuracy}, timed=latency(ratio, half_width))
        for size, accuracy, ratio in zip(sorted(sizes, reverse=True), sorted(accuracies), sorted(ratios), strict=True)
    )
    budget = {"size_bytes": {"max_increase": 0.0}, "metrics": {"accuracy": {"max_drop": 0.0}}}
    judged = verdicts(budget, now, before)
    assert (judged["size_bytes"].status, judged["accuracy"].status) == ("met", "met")
    assert judged["latency_ratio"].status != "unmet"


@given(sizes, sizes, st.floats(0, 10, width=16))
def test_a_size_is_met_exactly_up_to_its_share(before, now, share):
    found = one("size_bytes", {"max_increase": share}, delivered(size_bytes=now), delivered(size_bytes=before))
    assert (found.status == "met") == (10**20 * (now - before) <= round(10**20 * share) * before)
