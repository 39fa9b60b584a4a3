"""Against scikit-learn and scipy, on classifiers of real digits and on logits that hypothesis draws."""

import subprocess
import sys
import warnings
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from scipy.stats import entropy
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import confusion_matrix, f1_score, top_k_accuracy_score

from compressor.measure.quality import (
    Predictions,
    agreement,
    classification,
    comparison,
    expected_calibration_error,
    is_classification,
    kl_divergence,
    macro_f1,
    per_class_accuracy,
    top_k_accuracy,
)

ROUNDING = 1e-12
"""Sums of up to a few thousand float64 in another order."""


@pytest.fixture(scope="module")
def digits():
    """Logits of a good classifier and of one that sees half of the image, targets, and their own probabilities."""
    images, targets = load_digits(return_X_y=True)
    half = images * (np.arange(64) < 32)
    models = []
    for seen in (images, half):
        model = LogisticRegression(C=0.1, max_iter=3000).fit(seen[:900] / 16, targets[:900])
        models.append((model.decision_function(seen[900:] / 16), model.predict_proba(seen[900:] / 16)))
    (good, good_probabilities), (poor, poor_probabilities) = models
    return good, poor, targets[900:].astype(np.int64), good_probabilities, poor_probabilities


@st.composite
def drawn(draw):
    """Two models' logits and targets: few distinct values, so that many are equal, and classes that may be absent."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    samples, classes = draw(st.integers(1, 60)), draw(st.integers(3, 9))
    levels = draw(st.sampled_from([2, 5, 1000]))
    first, second = (
        (generator.integers(0, levels, (samples, classes)) / levels * 8 - 4).astype(np.float32) for _ in range(2)
    )
    return first, second, generator.integers(0, draw(st.integers(1, classes)), samples)


@given(drawn(), st.integers(1, 2))
def test_top_k_accuracy_is_that_of_scikit_learn_with_the_lower_of_equal_classes_first(found, k):
    logits, _, targets = found
    classes = logits.shape[1]
    # scikit-learn takes the higher of equal classes first, so it is shown them in reverse order
    reversed_targets = classes - 1 - targets
    wanted = top_k_accuracy_score(reversed_targets, logits[:, ::-1], k=k, labels=np.arange(classes))
    assert top_k_accuracy(logits, targets, k) == pytest.approx(wanted, abs=ROUNDING)


@given(drawn())
def test_macro_f1_and_accuracy_per_class_are_those_of_scikit_learn(found):
    logits, _, targets = found
    predicted, classes = logits.argmax(axis=1), np.arange(logits.shape[1])
    assert macro_f1(logits, targets) == pytest.approx(f1_score(targets, predicted, average="macro"), abs=ROUNDING)
    confusion = confusion_matrix(targets, predicted, labels=classes)
    with np.errstate(invalid="ignore"):
        wanted = confusion.diagonal() / confusion.sum(axis=1)
    np.testing.assert_array_equal(per_class_accuracy(logits, targets), wanted)


@given(drawn())
def test_kl_divergence_is_the_relative_entropy_of_scipy(found):
    baseline, logits, _ = found
    wanted = entropy(softmax(baseline.astype(float), axis=1), softmax(logits.astype(float), axis=1), axis=1).mean()
    assert kl_divergence(baseline, logits) == pytest.approx(wanted, abs=ROUNDING)


def calibration_error(probabilities: np.ndarray, targets: np.ndarray) -> float:
    """Guo et al. 2017, eq. 3, one sample at a time."""
    edges = np.linspace(0, 1, 16)
    error = 0.0
    for low, high in pairwise(edges):
        inside = [row for row, shares in enumerate(probabilities) if low < max(shares) <= high]
        if inside:
            right = sum(np.argmax(probabilities[row]) == targets[row] for row in inside) / len(inside)
            sure = sum(max(probabilities[row]) for row in inside) / len(inside)
            error += len(inside) / len(targets) * abs(right - sure)
    return error


@given(drawn())
@settings(max_examples=50)
def test_calibration_error_is_the_sum_over_bins_one_sample_at_a_time(found):
    logits, _, targets = found
    wanted = calibration_error(softmax(logits.astype(np.float64), axis=1), targets)
    assert expected_calibration_error(logits, targets) == pytest.approx(wanted, abs=ROUNDING)


def test_quality_of_a_classifier_of_digits_is_that_of_its_own_probabilities(digits):
    good, _, targets, probabilities, _ = digits
    quality = classification(Predictions(good, targets))
    predicted = probabilities.argmax(axis=1)
    assert quality.samples == 897
    assert quality.top_k == {
        1: (predicted == targets).mean(),
        5: pytest.approx(top_k_accuracy_score(targets, probabilities, k=5), abs=ROUNDING),
    }
    assert quality.macro_f1 == pytest.approx(f1_score(targets, predicted, average="macro"), abs=ROUNDING)
    confusion = confusion_matrix(targets, predicted)
    assert quality.per_class_accuracy == tuple(confusion.diagonal() / confusion.sum(axis=1))
    wanted = calibration_error(probabilities, targets)
    assert quality.expected_calibration_error == pytest.approx(wanted, abs=ROUNDING)
    assert 0.02 < wanted < 0.5  # regularisation left it less sure than right, so there is an error to find


def test_fidelity_of_a_poorer_classifier_is_that_of_both_models_own_probabilities(digits):
    good, poor, targets, good_probabilities, poor_probabilities = digits
    fidelity = comparison(good, Predictions(poor, targets))
    assert fidelity.agreement == (good_probabilities.argmax(axis=1) == poor_probabilities.argmax(axis=1)).mean()
    wanted = entropy(good_probabilities, poor_probabilities, axis=1).mean()
    assert fidelity.kl_divergence == pytest.approx(wanted, rel=1e-9)  # logarithms of probabilities down to 1e-6


def test_worst_classes_are_those_of_the_largest_falls_of_the_confusion_matrices(digits):
    good, poor, targets, *_ = digits
    before, after = (confusion_matrix(targets, logits.argmax(axis=1)) for logits in (good, poor))
    samples = before.sum(axis=1)
    fallen = [
        (before[c, c] / samples[c] - after[c, c] / samples[c], c) for c in range(10) if after[c, c] < before[c, c]
    ]
    wanted = [c for _, c in sorted(fallen, key=lambda fall: (-fall[0], fall[1]))]
    found = comparison(good, Predictions(poor, targets)).worst_classes
    assert [fall.target for fall in found] == wanted
    assert len(wanted) > 5
    for fall in found:
        c = fall.target
        assert (fall.samples, fall.baseline_accuracy, fall.accuracy) == (
            samples[c],
            before[c, c] / samples[c],
            after[c, c] / samples[c],
        )


def test_worst_samples_are_the_ten_of_the_largest_falls_of_the_true_class_probability(digits):
    good, poor, targets, good_probabilities, poor_probabilities = digits
    rows = range(len(targets))
    falls = [good_probabilities[row, targets[row]] - poor_probabilities[row, targets[row]] for row in rows]
    wanted = sorted(rows, key=lambda row: -falls[row])[:10]
    found = comparison(good, Predictions(poor, targets)).worst_samples
    assert [fall.index for fall in found] == wanted
    for fall, row in zip(found, wanted, strict=True):
        assert (fall.target, fall.baseline_predicted, fall.predicted) == (
            targets[row],
            good[row].argmax(),
            poor[row].argmax(),
        )
        assert fall.baseline_probability == pytest.approx(good_probabilities[row, targets[row]], abs=ROUNDING)
        assert fall.probability == pytest.approx(poor_probabilities[row, targets[row]], abs=ROUNDING)


def test_ignored_samples_change_nothing_and_keep_the_numbers_of_the_others(digits):
    good, poor, targets, *_ = digits
    ignored = np.arange(len(targets)) % 3 == 0
    marked = np.where(ignored, -100, targets)
    kept = Predictions(poor[~ignored], targets[~ignored])
    assert classification(Predictions(poor, marked)) == classification(kept)
    found, wanted = comparison(good, Predictions(poor, marked)), comparison(good[~ignored], kept)
    positions = np.flatnonzero(~ignored)
    moved = tuple(fall.model_copy(update={"index": int(positions[fall.index])}) for fall in wanted.worst_samples)
    assert found == wanted.model_copy(update={"worst_samples": moved})


def test_class_without_samples_has_no_accuracy_and_counts_for_f1_only_if_predicted():
    logits = np.array([[3, 0, 0, 0], [0, 3, 0, 0], [0, 0, 3, 0]], np.float32)
    targets = np.array([0, 1, 1])
    quality = classification(Predictions(logits, targets))
    assert quality.per_class_accuracy == (1.0, 0.5, None, None)
    assert quality.macro_f1 == pytest.approx((1 + 2 / 3 + 0) / 3)  # the class that is neither does not count
    assert comparison(logits, Predictions(logits, targets)).worst_classes == ()


@given(drawn())
def test_model_that_is_the_baseline_agrees_with_it_and_has_lost_nothing(found):
    logits, _, targets = found
    fidelity = comparison(logits, Predictions(logits, targets))
    assert (fidelity.agreement, fidelity.kl_divergence) == (1.0, 0.0)
    assert fidelity.worst_classes == fidelity.worst_samples == ()


def test_fall_by_rounding_alone_is_no_loss(digits):
    good, _, targets, *_ = digits
    nearly = good + 1e-6 * np.sin(np.arange(good.size)).reshape(good.shape)
    assert comparison(good, Predictions(nearly, targets)).worst_samples == ()


def test_largest_float32_logits_give_finite_figures():
    largest = np.finfo(np.float32).max
    baseline = np.array([[largest, -largest, 0], [0, largest, largest]], np.float32)
    logits, targets = -baseline, np.array([0, 2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quality = classification(Predictions(logits, targets))
        fidelity = comparison(baseline, Predictions(logits, targets))
    assert quality.expected_calibration_error == 1.0  # sure, and wrong
    assert fidelity.kl_divergence == pytest.approx(float(largest) * 1.5)  # (2 + 1) / 2 samples
    assert [fall.baseline_probability for fall in fidelity.worst_samples] == [1.0, 0.5]


def test_one_sample_is_enough():
    baseline, logits = np.array([[0.0, 2.0]]), np.array([[2.0, 0.0]])
    quality = classification(Predictions(logits, np.array([1])))
    fidelity = comparison(baseline, Predictions(logits, np.array([1])))
    assert (quality.top_k, quality.per_class_accuracy, quality.macro_f1) == ({1: 0.0}, (None, 0.0), 0.0)
    assert quality.expected_calibration_error == pytest.approx(1 / (1 + np.exp(-2)))
    assert fidelity.agreement == 0.0
    assert [fall.target for fall in fidelity.worst_classes] == [1]


@pytest.mark.parametrize(("classes", "ks"), [(5, [1]), (6, [1, 5])])
def test_top_5_is_given_for_more_than_five_classes(classes, ks):
    quality = classification(Predictions(np.eye(classes), np.arange(classes)))
    assert list(quality.top_k) == ks


@pytest.mark.parametrize(("classes", "listed"), [(1000, True), (1001, False)])
def test_with_more_than_a_thousand_classes_only_the_worst_are_listed(classes, listed):
    targets = np.arange(classes)
    predictions = Predictions(np.roll(np.eye(classes), 1, axis=1), targets)
    assert (classification(predictions).per_class_accuracy is not None) is listed
    assert [fall.target for fall in comparison(np.eye(classes), predictions).worst_classes] == list(range(10))


def test_arrays_larger_than_a_block_are_taken_whole_and_may_lie_on_disk(tmp_path):
    generator = np.random.default_rng(0)
    baseline, logits = generator.normal(size=(2, 3000, 500)).astype(np.float32)  # 1.5 million numbers each
    targets = generator.integers(0, 500, 3000)
    np.save(tmp_path / "baseline.npy", baseline)
    fidelity = comparison(np.load(tmp_path / "baseline.npy", mmap_mode="r"), Predictions(logits, targets))
    divergences = entropy(softmax(baseline.astype(float), axis=1), softmax(logits.astype(float), axis=1), axis=1)
    assert fidelity.kl_divergence == pytest.approx(divergences.mean(), rel=1e-9)
    assert fidelity.agreement == agreement(baseline, logits) == (baseline.argmax(1) == logits.argmax(1)).mean()


@pytest.mark.parametrize(
    ("logits", "targets", "accepted"),
    [
        pytest.param(np.zeros((3, 2)), np.array([0, 1, -100]), True, id="classes-and-ignored"),
        pytest.param(np.zeros((3, 2)), np.array([0, 1, 2]), False, id="no-such-class"),
        pytest.param(np.zeros((3, 2)), np.array([0, 1, -1]), False, id="negative"),
        pytest.param(np.zeros((3, 2)), np.full(3, -100), False, id="all-ignored"),
        pytest.param(np.zeros((3, 2)), np.array([0.0, 1.0, 0.0]), False, id="real-targets"),
        pytest.param(np.zeros((3, 1)), np.array([0, 0, 0]), False, id="one-output"),
        pytest.param(np.zeros((3, 2, 4)), np.array([0, 1, 0]), False, id="outputs-per-position"),
        pytest.param(np.zeros((3, 2)), np.zeros((3, 2), int), False, id="several-labels"),
        pytest.param(np.zeros((3, 2)), np.array([0, 1]), False, id="fewer-targets"),
    ],
)
def test_classification_is_told_by_shapes_and_targets(logits, targets, accepted):
    assert is_classification(Predictions(logits, targets)) is accepted


def test_models_of_other_classes_are_not_compared():
    with pytest.raises(ValueError, match=r"one shape, got \(2, 3\) and \(2, 4\)"):
        comparison(np.zeros((2, 3)), Predictions(np.zeros((2, 4)), np.array([0, 1])))


def test_quality_is_computed_without_torch():
    subprocess.run(
        [sys.executable, "-c", "import sys, compressor.measure.quality; assert 'torch' not in sys.modules"], check=True
    )
