"""Whether outputs are classes, labels or values follows from the loss, the metrics and the targets of a task."""

import pytest
import torch
import torch.nn.functional as F

from compressor.models.output_kind import Outputs, outputs_of
from compressor.task import IGNORED, Metric, Samples, Task, accuracy, cross_entropy

GENERATOR = torch.Generator().manual_seed(0)
CLASSES = torch.randint(0, 4, (32,), generator=GENERATOR)
BITS = torch.randint(0, 2, (32, 4), generator=GENERATOR).float()
NUMBERS = torch.randn(32, 4, generator=GENERATOR)
TOKENS = torch.randint(0, 5, (32, 6), generator=GENERATOR)
LOGITS = torch.randn(32, 4, generator=GENERATOR)


def total(name, count):
    return Metric(name, lambda outputs, targets: count(outputs, targets).double().reshape(1), float)


ERROR = total("error", lambda outputs, targets: (outputs.flatten()[:8] - targets.flatten()[:8].float()).square().sum())
RANKS = total("ranks", lambda outputs, targets: ((outputs > 0).sum(dim=1) == targets).sum())


def kind(given, targets, loss, metric=ERROR, **settings):
    split = Samples((torch.zeros(len(targets), 1),), targets)
    task = Task(split, split, split, split, (torch.zeros(2, 1),), loss=loss, metrics=(metric,), **settings)
    return outputs_of(task, given, targets)


def mean(elementwise):
    return lambda outputs, targets: elementwise(outputs, targets, reduction="none").flatten(1).mean(dim=1)


def last_dimension(outputs, targets):
    return F.cross_entropy(outputs.transpose(1, 2), targets, reduction="none")


def brier(outputs, targets):
    return (outputs.softmax(dim=1) - F.one_hot(targets, 4)).square().sum(dim=1)


def ordinal(outputs, targets):
    """CORAL: the logit of each rank says whether it is passed."""
    passed = (targets[:, None] > torch.arange(4)).float()
    return F.binary_cross_entropy_with_logits(outputs, passed, reduction="none").mean(dim=1)


def one_vs_all(outputs, targets):
    return mean(F.binary_cross_entropy_with_logits)(outputs, F.one_hot(targets, 4).float())


@pytest.mark.parametrize(
    ("loss", "targets", "metric"),
    [
        pytest.param(cross_entropy, CLASSES, ERROR, id="cross-entropy"),
        pytest.param(lambda o, t: F.nll_loss(o, t, reduction="none"), CLASSES, ERROR, id="log-probabilities"),
        pytest.param(lambda o, t: F.cross_entropy(o, t, reduction="none", label_smoothing=0.1), CLASSES, ERROR, id="s"),
        pytest.param(lambda o, t: F.multi_margin_loss(o, t, reduction="none"), CLASSES, ERROR, id="margin"),
        pytest.param(brier, CLASSES, ERROR, id="brier"),
        pytest.param(one_vs_all, CLASSES, accuracy, id="sigmoids-and-argmax"),
        pytest.param(cross_entropy, torch.where(CLASSES == 1, IGNORED, CLASSES), ERROR, id="some-ignored"),
        pytest.param(cross_entropy, torch.where(CLASSES == 1, 9, CLASSES), ERROR, id="some-out-of-range"),
        pytest.param(lambda o, t: F.cross_entropy(o, t, reduction="none"), NUMBERS.softmax(1), ERROR, id="soft"),
    ],
)
def test_logits_to_which_a_number_may_be_added_are_classes(loss, targets, metric):
    assert kind(LOGITS, targets, loss, metric) == Outputs("classes")


def test_classes_may_stand_in_the_last_dimension():
    outputs = torch.randn(32, 6, 5, generator=GENERATOR)
    found = kind(outputs, TOKENS, last_dimension)
    assert found == Outputs("classes", 2)
    assert torch.equal(found.as_logits(outputs), outputs.transpose(1, 2))
    # as many tokens as classes: sizes cannot tell, the loss does
    square = torch.randn(32, 6, 6, generator=GENERATOR)
    assert kind(square, TOKENS, last_dimension) == Outputs("classes", 2)
    assert kind(square, TOKENS, cross_entropy) == Outputs("classes", 1)


def test_probabilities_become_logits():
    probabilities = LOGITS.softmax(dim=1)
    found = kind(probabilities, CLASSES, lambda o, t: F.nll_loss(o.log(), t, reduction="none"), accuracy)
    assert found == Outputs("classes", are_probabilities=True)
    torch.testing.assert_close(found.as_logits(probabilities).softmax(dim=1), probabilities)


@pytest.mark.parametrize(
    ("loss", "targets"),
    [
        pytest.param(mean(F.binary_cross_entropy_with_logits), BITS, id="float"),
        pytest.param(lambda o, t: mean(F.binary_cross_entropy_with_logits)(o, t.float()), BITS.long(), id="integer"),
        pytest.param(lambda o, t: mean(F.binary_cross_entropy_with_logits)(o, t.float()), BITS.bool(), id="bool"),
        pytest.param(lambda o, t: F.softplus(-o * t).mean(dim=1), 2 * BITS - 1, id="signs"),
        pytest.param(lambda o, t: F.relu(1 - o * (2 * t - 1)).mean(dim=1), BITS, id="hinge"),
        pytest.param(lambda o, t: (o.sigmoid() - t).square().mean(dim=1), BITS, id="brier"),
        pytest.param(mean(F.binary_cross_entropy_with_logits), torch.zeros_like(BITS), id="no-label-is-set"),
    ],
)
def test_logits_whose_sign_is_the_answer_are_labels(loss, targets):
    assert kind(LOGITS, targets, loss) == Outputs("labels")


@pytest.mark.parametrize("shape", [(32,), (32, 1)])
def test_one_yes_or_no_is_a_label(shape):
    def loss(outputs, targets):
        return F.binary_cross_entropy_with_logits(outputs.flatten(), targets.flatten().float(), reduction="none")

    assert kind(torch.randn(shape), BITS[:, 0].long(), loss) == Outputs("labels")


@pytest.mark.parametrize(
    ("loss", "targets", "metric"),
    [
        pytest.param(mean(F.mse_loss), NUMBERS, ERROR, id="squares"),
        pytest.param(mean(F.mse_loss), BITS, ERROR, id="squares-of-bits"),
        pytest.param(mean(F.l1_loss), NUMBERS, ERROR, id="distances"),
        pytest.param(lambda o, t: (o.exp() - o * t).mean(dim=1), BITS, ERROR, id="poisson"),
        pytest.param(ordinal, CLASSES, RANKS, id="ordinal"),
        pytest.param(lambda o, t: (o.mean(dim=1) - t).square(), CLASSES, ERROR, id="integers"),
    ],
)
def test_all_else_is_values(loss, targets, metric):
    assert kind(LOGITS, targets, loss, metric) == Outputs("values")


def test_probabilities_of_labels_are_values():
    # binary cross-entropy of probabilities refuses logits, so that only a distance compares them
    assert kind(LOGITS.sigmoid(), BITS, mean(F.binary_cross_entropy)) == Outputs("values")


@pytest.mark.parametrize("said", ["classes", "labels", "values"])
def test_what_the_task_says_counts(said):
    assert kind(LOGITS, CLASSES, cross_entropy, outputs=said).kind == said
