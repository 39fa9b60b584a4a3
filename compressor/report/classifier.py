"""What compression changed in a classifier, in tables and words: the delivered model beside the baseline."""

from compressor.records.measurements import Fidelity, Quality
from compressor.records.report import Report
from compressor.text.figures import printable, share

_MEANINGS = (
    "top-k accuracy: share of samples whose class is among the k that the model finds most probable.",
    "macro-F1: the F1 score of a class falls with each of its samples that is missed and with each sample that is "
    "wrongly given to it; this is its mean over classes, so that rare classes count as much as common ones.",
    "expected calibration error: how far the probability that a model gives its answer is from how often it is right, "
    "in the mean over 15 ranges of probability; 0 % is best.",
    "KL divergence: how far the probabilities of all classes are from those of the baseline, in the mean over samples; "
    "0 nats means equal.",
)


def summary(report: Report) -> str:
    """How often the delivered model says what the baseline says, in words; empty where `quality_cells` is."""
    quality, fidelity = report.rows[-1].quality, report.rows[-1].fidelity
    if quality is None or fidelity is None:
        return ""
    return (
        f"The delivered model names the same class as the baseline, right or wrong, for {share(fidelity.agreement)} of "
        f"the {quality.samples:,} test samples that have a label. The outputs of both are read as logits."
    )


def quality_cells(report: Report) -> list[list[str]]:
    """One row per figure, headings first; empty unless baseline and delivered model are two classifiers."""
    baseline, delivered, fidelity = report.rows[0].quality, report.rows[-1].quality, report.rows[-1].fidelity
    if baseline is None or delivered is None or fidelity is None:
        return []
    same = Fidelity(agreement=1.0, kl_divergence=0.0, worst_classes=(), worst_samples=())
    before, after = (
        {**quality_figures(found), **fidelity_figures(to)} for found, to in ((baseline, same), (delivered, fidelity))
    )
    return [["figure", "baseline", "delivered"], *([name, before[name], after[name]] for name in before)]


def quality_figures(quality: Quality) -> dict[str, str]:
    """How good a classifier is, as texts by name."""
    return {
        **{f"top-{k} accuracy": share(accuracy) for k, accuracy in quality.top_k.items()},
        "macro-F1": share(quality.macro_f1),
        "expected calibration error": share(quality.expected_calibration_error),
    }


def fidelity_figures(fidelity: Fidelity) -> dict[str, str]:
    """How true a classifier stays to the baseline, as texts by name."""
    return {
        "agreement with the baseline": share(fidelity.agreement),
        "KL divergence from the baseline": f"{fidelity.kl_divergence:.3g} nats",
    }


def meanings(report: Report) -> tuple[str, ...]:
    """What the figures of `quality_cells` mean, one sentence each."""
    return _MEANINGS if quality_cells(report) else ()


def class_name(index: int, report: Report) -> str:
    """Label of a class with its index, which alone is unique; the index alone if the task gives no label."""
    label = printable(report.labels[index]) if index < len(report.labels) else ""
    return str(index) if label in {"", str(index)} else f"{label} ({index})"


def class_cells(report: Report) -> list[list[str]]:
    """The classes that lost most, one per row, headings first; empty if none did."""
    fidelity = report.rows[-1].fidelity
    if fidelity is None or not fidelity.worst_classes:
        return []
    head = ["class", "test samples", "accuracy of the baseline", "of the delivered model", "change"]
    return [
        head,
        *(
            [
                class_name(fall.target, report),
                f"{fall.samples:,}",
                share(fall.baseline_accuracy),
                share(fall.accuracy),
                f"{100 * (fall.accuracy - fall.baseline_accuracy):+.2f} points",
            ]
            for fall in fidelity.worst_classes
        ),
    ]


def sample_cells(report: Report) -> list[list[str]]:
    """The test samples whose class lost most probability, one per row, headings first; empty if none did."""
    fidelity = report.rows[-1].fidelity
    if fidelity is None or not fidelity.worst_samples:
        return []
    head = [
        "test sample",
        "class",
        "baseline says",
        "delivered says",
        "probability of the class, baseline",
        "delivered",
    ]
    return [
        head,
        *(
            [
                str(fall.index),
                *(class_name(index, report) for index in (fall.target, fall.baseline_predicted, fall.predicted)),
                share(fall.baseline_probability),
                share(fall.probability),
            ]
            for fall in fidelity.worst_samples
        ),
    ]
