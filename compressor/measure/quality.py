"""How good a classifier is and how true it stays to another, from logits and targets alone; knows no torch."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from compressor.records.measurements import ClassFall, Fidelity, Quality, SampleFall

Logits: TypeAlias = NDArray[np.floating[Any]]
Targets: TypeAlias = NDArray[np.integer[Any]]
PerSample: TypeAlias = NDArray[Any]

IGNORED = -100
"""Target of a sample that is not counted: the `ignore_index` of torch's losses."""
BINS = 15
"""Bins of the calibration error, as in Guo et al. 2017."""
MOST_LISTED_CLASSES = 1000
"""With more classes than this, a report lists nothing per class but the worst: it is for people to read."""
WORST = 10
"""How many classes and samples are named as the worst."""
LEAST_FALL = 1e-4
"""A smaller fall of a probability is no loss: a report would not show it, and float32 rounding alone makes 1e-6."""

_BLOCK = 1 << 20
"""Logits that are turned into float64 at a time, so that a large array is never copied whole."""


class Predictions(NamedTuple):
    """Finite logits, (N, C), and for each sample its class in [0, C) or IGNORED, (N,)."""

    logits: Logits
    targets: Targets


def is_classification(predictions: Predictions) -> bool:
    """Whether these are (N, C) with C >= 2 and integer targets (N,), each a class or IGNORED, not all ignored."""
    logits, targets = predictions
    if logits.ndim != 2 or logits.shape[1] < 2 or targets.shape != logits.shape[:1]:
        return False
    counted = targets != IGNORED
    if not np.issubdtype(targets.dtype, np.integer) or not counted.any():
        return False
    return bool(((targets >= 0) & (targets < logits.shape[1]) | ~counted).all())


def classification(predictions: Predictions) -> Quality:
    """Quality of one model on samples that `is_classification` accepts; ignored samples are left out."""
    logits, targets = _count(predictions)
    classes = logits.shape[1]
    accuracies = per_class_accuracy(logits, targets)
    listed = tuple(None if np.isnan(accuracy) else float(accuracy) for accuracy in accuracies)
    return Quality(
        samples=len(targets),
        top_k={k: top_k_accuracy(logits, targets, k) for k in ((1, 5) if classes > 5 else (1,))},
        macro_f1=macro_f1(logits, targets),
        per_class_accuracy=listed if classes <= MOST_LISTED_CLASSES else None,
        expected_calibration_error=expected_calibration_error(logits, targets),
    )


def comparison(baseline_logits: Logits, predictions: Predictions) -> Fidelity:
    """How true a model stays to the baseline, on samples that `is_classification` accepts, ignored ones left out.

    Raises ValueError if `baseline_logits` do not have the shape of the model's.
    """
    if baseline_logits.shape != predictions.logits.shape:
        msg = f"both models must give logits of one shape, got {baseline_logits.shape} and {predictions.logits.shape}"
        raise ValueError(msg)
    logits, targets = _count(predictions)
    baseline, _ = _count(Predictions(baseline_logits, predictions.targets))
    indices = np.flatnonzero(predictions.targets != IGNORED)
    return Fidelity(
        agreement=agreement(baseline, logits),
        kl_divergence=kl_divergence(baseline, logits),
        worst_classes=_worst_classes(baseline, logits, targets),
        worst_samples=_worst_samples(baseline, logits, targets, indices),
    )


def log_softmax(logits: Logits) -> NDArray[np.float64]:
    """Logarithms of the class probabilities, (N, C) to (N, C); finite for every finite float32."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def top_k_accuracy(logits: Logits, targets: Targets, k: int) -> float:
    """Share of samples whose class is among the `k` largest logits, in [0, 1].

    Of equal logits the lower class comes first, so that k = 1 is the accuracy of the argmax.
    """

    def rank(block: Logits, own: Targets) -> PerSample:
        true = np.take_along_axis(block, own[:, None], axis=1)
        before = np.arange(block.shape[1]) < own[:, None]
        return np.asarray(((block > true) | ((block == true) & before)).sum(axis=1))

    return float((_per_sample(rank, logits, targets) < k).mean())


def macro_f1(logits: Logits, targets: Targets) -> float:
    """Mean of the F1 score over the classes that occur among targets or predictions, in [0, 1]."""
    predicted, classes = _predict(logits), logits.shape[1]
    hits = np.bincount(targets[predicted == targets], minlength=classes)
    occurrences = np.bincount(targets, minlength=classes) + np.bincount(predicted, minlength=classes)
    occurs = occurrences > 0
    return float((2 * hits[occurs] / occurrences[occurs]).mean())


def per_class_accuracy(logits: Logits, targets: Targets) -> NDArray[np.float64]:
    """Share of each class's samples that are predicted as that class (recall), (C,); NaN for a class without any."""
    hits = np.bincount(targets[_predict(logits) == targets], minlength=logits.shape[1])
    samples = np.bincount(targets, minlength=logits.shape[1])
    shares = np.full(len(samples), np.nan)
    np.divide(hits, samples, out=shares, where=samples > 0)
    return shares


def expected_calibration_error(logits: Logits, targets: Targets) -> float:
    """Mean distance between confidence and accuracy over 15 bins of equal width, in [0, 1].

    Guo et al. 2017, eq. 3: bin m holds confidences in ((m - 1) / 15, m / 15] and weighs as much as it has samples.
    """
    confidences = _per_sample(lambda block: np.exp(log_softmax(block).max(axis=1)), logits)
    bins = np.digitize(confidences, np.linspace(0, 1, BINS + 1)[1:-1], right=True)
    surplus = confidences - (_predict(logits) == targets)
    return float(np.abs(np.bincount(bins, weights=surplus)).sum() / len(targets))


def agreement(baseline_logits: Logits, logits: Logits) -> float:
    """Share of samples on which both models have their largest logit at one class, in [0, 1]."""
    return float((_predict(baseline_logits) == _predict(logits)).mean())


def kl_divergence(baseline_logits: Logits, logits: Logits) -> float:
    """KL(baseline ‖ model) of the class probabilities at temperature 1, mean over samples, in nats, >= 0."""

    def divergence(baseline_block: Logits, block: Logits) -> PerSample:
        wanted, found = log_softmax(baseline_block), log_softmax(block)
        return np.asarray((np.exp(wanted) * (wanted - found)).sum(axis=1))

    # rounding may leave a little below 0
    return float(_per_sample(divergence, baseline_logits, logits).clip(min=0).mean())


def _worst_classes(baseline_logits: Logits, logits: Logits, targets: Targets) -> tuple[ClassFall, ...]:
    before, after = per_class_accuracy(baseline_logits, targets), per_class_accuracy(logits, targets)
    samples = np.bincount(targets, minlength=logits.shape[1])
    falls = np.nan_to_num(before - after)
    return tuple(
        ClassFall(
            target=int(target),
            samples=int(samples[target]),
            baseline_accuracy=float(before[target]),
            accuracy=float(after[target]),
        )
        for target in _largest(falls, above=0)
    )


def _worst_samples(
    baseline_logits: Logits, logits: Logits, targets: Targets, indices: PerSample
) -> tuple[SampleFall, ...]:
    before, after = _true_probabilities(baseline_logits, targets), _true_probabilities(logits, targets)
    expected, predicted = _predict(baseline_logits), _predict(logits)
    return tuple(
        SampleFall(
            index=int(indices[row]),
            target=int(targets[row]),
            baseline_predicted=int(expected[row]),
            predicted=int(predicted[row]),
            baseline_probability=float(before[row]),
            probability=float(after[row]),
        )
        for row in _largest(before - after, above=LEAST_FALL)
    )


def _largest(falls: PerSample, *, above: float) -> PerSample:
    """Indices of the WORST largest of `falls` that are above `above`, the largest first, of equals the lower."""
    order = np.argsort(-falls, kind="stable")[:WORST]
    return np.asarray(order[falls[order] > above])


def _predict(logits: Logits) -> NDArray[np.int64]:
    return np.asarray(logits.argmax(axis=1))


def _true_probabilities(logits: Logits, targets: Targets) -> PerSample:
    def true(block: Logits, own: Targets) -> PerSample:
        return np.exp(np.take_along_axis(log_softmax(block), own[:, None], axis=1)[:, 0])

    return _per_sample(true, logits, targets)


def _count(predictions: Predictions) -> Predictions:
    counted = predictions.targets != IGNORED
    return predictions if counted.all() else Predictions(predictions.logits[counted], predictions.targets[counted])


def _per_sample(function: Callable[..., PerSample], logits: Logits, *others: PerSample) -> PerSample:
    """Join what `function` gives, (n,), for blocks of n rows of all arrays."""
    return np.concatenate([function(logits[rows], *(other[rows] for other in others)) for rows in _blocks(logits)])


def _blocks(logits: Logits) -> Iterator[slice]:
    rows = max(1, _BLOCK // logits.shape[1])
    return (slice(start, start + rows) for start in range(0, len(logits), rows))
