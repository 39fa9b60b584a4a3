import itertools

import pytest
import torch
import torch.nn.functional as F

from compressor.distillation.losses import Losses
from compressor.distillation.panel import Panel, logit_losses
from compressor.distillation.response import tail_bucket_loss, top_k
from compressor.errors import InputError
from compressor.models.output_kind import Outputs
from compressor.task import cross_entropy

# Inputs and float64 values of an independent numpy implementation, shared/reference/loss_vectors.py.
STUDENT = torch.tensor([[2.0, 0.5, -1.0, 0.1], [0.3, 1.2, 0.0, -0.7], [-1.5, 0.4, 2.2, 0.9]], dtype=torch.float64)
TEACHER = torch.tensor([[3.0, 1.0, -2.0, 0.0], [0.0, 2.5, -0.5, -1.0], [-1.0, 0.0, 1.0, 3.0]], dtype=torch.float64)
TARGETS = torch.tensor([0, 1, 2])
REFERENCE = {"mean_probability": 0.7442794830899819, "mean_logit": 0.5561578205179463}  # ens_*_kd_T2
TAIL_BUCKET = 0.4298345564831889  # topk2_tail_bucket

EVERY_RESPONSE = {name: {} for name in ("kd", "soft_cross_entropy", "reverse_kl", "jsd", "dkd", "dist", "logit_mse")}


def values(settings, answers, *, weights=None, combine="mean_probability", progress=0.0, targets=TARGETS):
    panel = Panel(weights or (1 / len(answers),) * len(answers), combine)
    losses = Losses.model_validate(settings)
    return logit_losses(losses, STUDENT, answers, panel, targets, task_loss=cross_entropy, progress=progress)


def kd(student, teacher, temperature):
    """T² · KL(p ‖ q) as in Hinton's paper, with its own arithmetic."""
    p, q = F.softmax(teacher / temperature, dim=1), F.softmax(student / temperature, dim=1)
    return temperature**2 * (p * (p / q).log()).sum(dim=1)


@pytest.mark.parametrize("combine", REFERENCE)
def test_two_teachers_as_one_equal_the_reference(combine):
    found = values({"kd": {"temperature": 2.0}}, [TEACHER, TEACHER.flip(1)], combine=combine)["kd"]
    assert found.mean().item() == pytest.approx(REFERENCE[combine], abs=1e-12)  # float64 rounding


def test_separate_teachers_have_the_weighted_mean_of_their_losses():
    answers, weights = [TEACHER, TEACHER.flip(1), TEACHER.roll(1, 1)], (0.5, 0.3, 0.2)
    found = values({"kd": {"temperature": 2.0}}, answers, weights=weights, combine="separate")["kd"]
    expected = sum(weight * kd(STUDENT, answer, 2.0) for weight, answer in zip(weights, answers, strict=True))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_weights_of_teachers_count_in_the_mean_of_probabilities():
    answers, weights = [TEACHER, TEACHER.flip(1)], (0.75, 0.25)
    found = values({"kd": {"temperature": 3.0}}, answers, weights=weights)["kd"]
    mean = 0.75 * F.softmax(TEACHER / 3, dim=1) + 0.25 * F.softmax(TEACHER.flip(1) / 3, dim=1)
    torch.testing.assert_close(found, kd(STUDENT, 3 * mean.log(), 3.0), rtol=0, atol=1e-12)


def test_teachers_as_one_ask_no_more_than_each_on_its_own():
    # KL is convex in its first argument
    settings, answers = {"kd": {"temperature": 2.0}}, [TEACHER, TEACHER.flip(1)]
    assert (values(settings, answers)["kd"] < values(settings, answers, combine="separate")["kd"]).all()


@pytest.mark.parametrize("combine", ["mean_probability", "mean_logit", "separate"])
def test_one_teacher_is_not_combined(combine):
    alone = values(EVERY_RESPONSE, [TEACHER], combine=combine)
    losses = Losses.model_validate(EVERY_RESPONSE).of_responses
    for name, loss in losses.items():
        assert torch.equal(alone[name], loss.compare(STUDENT, TEACHER, TARGETS, loss.temperature_at(0.0, "classes")))


@pytest.mark.parametrize("combine", ["mean_probability", "mean_logit", "separate"])
def test_two_equal_teachers_teach_like_one(combine):
    alone, twice = (values(EVERY_RESPONSE, [TEACHER] * count, combine=combine) for count in (1, 2))
    # A mean of probabilities leaves open what is added to all logits, which the squared difference of logits sees.
    compared = EVERY_RESPONSE.keys() - ({"logit_mse"} if combine == "mean_probability" else set())
    for name in compared:  # float64 rounding of logits, times T² of 16
        torch.testing.assert_close(twice[name], alone[name], rtol=0, atol=1e-12)


def test_probabilities_are_combined_at_the_temperature_of_each_loss():
    settings = {"kd": {"temperature": 1.0}, "reverse_kl": {"temperature": 8.0}}
    found = values(settings, [TEACHER, TEACHER.flip(1)])
    for name, temperature in (("kd", 1.0), ("reverse_kl", 8.0)):
        mean = sum(F.softmax(answer / temperature, dim=1) for answer in (TEACHER, TEACHER.flip(1))) / 2
        combined = temperature * mean.log()
        sides = (STUDENT, combined) if name == "kd" else (combined, STUDENT)
        torch.testing.assert_close(found[name], kd(*sides, temperature), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("progress", "temperature"), [(0.0, 8.0), (0.5, 4.5), (1.0, 1.0)])
def test_temperature_follows_its_course(progress, temperature):
    found = values({"kd": {"temperature": {"start": 8.0, "end": 1.0}}}, [TEACHER], progress=progress)["kd"]
    torch.testing.assert_close(found, kd(STUDENT, TEACHER, temperature), rtol=0, atol=1e-12)


def test_losses_that_need_labels_have_values_of_the_labeled_samples_alone():
    found = values(EVERY_RESPONSE, [TEACHER], targets=TARGETS[:2])
    whole = values(EVERY_RESPONSE, [TEACHER])
    assert {name: len(value) for name, value in found.items()} == {**dict.fromkeys(EVERY_RESPONSE, 3), "dkd": 2}
    assert torch.equal(found["dkd"], whole["dkd"][:2])


def test_top_classes_are_compared_with_the_rest_as_one_bucket():
    found = values({"kd": {"temperature": 1.0}}, [top_k(TEACHER, 2)])["kd"]
    assert found.mean().item() == pytest.approx(TAIL_BUCKET, abs=1e-12)


def test_top_classes_of_several_teachers_are_not_combined():
    answers, weights = [top_k(TEACHER, 2), top_k(TEACHER.flip(1), 2)], (0.75, 0.25)
    expected = 0.75 * tail_bucket_loss(STUDENT, answers[0]) + 0.25 * tail_bucket_loss(STUDENT, answers[1])
    for combine in ("mean_probability", "mean_logit", "separate"):
        found = values({"kd": {"temperature": 1.0}}, answers, weights=weights, combine=combine)["kd"]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-15)


def test_tokens_are_combined_one_by_one():
    student, first, second = (torch.stack([one, one.flip(0)], dim=2) for one in (STUDENT, TEACHER, TEACHER.flip(1)))
    losses, panel = Losses.model_validate({"kd": {"temperature": 2.0}}), Panel((0.5, 0.5), "mean_probability")
    targets = torch.stack([TARGETS, TARGETS.flip(0)], dim=1)
    found = logit_losses(losses, student, [first, second], panel, targets, task_loss=cross_entropy, progress=0.0)["kd"]
    expected = values({"kd": {"temperature": 2.0}}, [TEACHER, TEACHER.flip(1)])["kd"]
    torch.testing.assert_close(found, torch.stack([expected, expected.flip(0)], dim=1), rtol=0, atol=1e-12)


def test_order_of_teachers_does_not_matter():
    answers = [TEACHER, TEACHER.flip(1), TEACHER.roll(1, 1)]
    found = [values(EVERY_RESPONSE, list(order)) for order in itertools.permutations(answers)]
    for name in EVERY_RESPONSE:
        for other in found[1:]:
            torch.testing.assert_close(other[name], found[0][name], rtol=0, atol=1e-12)


# Labels and values

LABELS, VALUES = Outputs("labels"), Outputs("values")


def of_kind(settings, outputs, answers=(TEACHER,), combine="separate"):
    panel = Panel((1 / len(answers),) * len(answers), combine, outputs)
    losses = Losses.model_validate(settings)
    return logit_losses(losses, STUDENT, answers, panel, TARGETS, task_loss=cross_entropy, progress=0.0)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_kd_of_labels_is_the_divergence_of_each_sigmoid(temperature):
    p, q = (TEACHER / temperature).sigmoid(), (STUDENT / temperature).sigmoid()
    each = F.binary_cross_entropy(q, p, reduction="none") - F.binary_cross_entropy(p, p, reduction="none")
    found = of_kind({"kd": {"temperature": temperature}}, LABELS)["kd"]
    torch.testing.assert_close(found, temperature**2 * each.mean(dim=1), rtol=0, atol=1e-12)


def test_labels_are_compared_as_they_are_unless_a_temperature_is_given():
    for name in ("kd", "soft_cross_entropy", "reverse_kl", "jsd"):
        plain, at_one = of_kind({name: {}}, LABELS)[name], of_kind({name: {"temperature": 1.0}}, LABELS)[name]
        assert plain.shape == (3,)
        assert torch.equal(plain, at_one)


def test_members_of_an_ensemble_of_labels_agree_on_the_mean_of_each_probability():
    answers = (TEACHER, TEACHER.flip(1))
    mean = (TEACHER.sigmoid() + TEACHER.flip(1).sigmoid()) / 2
    found = of_kind({"kd": {}}, LABELS, answers, "mean_probability")["kd"]
    torch.testing.assert_close(found, of_kind({"kd": {}}, LABELS, (mean.logit(),))["kd"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(3, 4), (12,), (3, 2, 2)])
def test_kd_of_values_is_their_squared_difference_whatever_the_temperature(shape):
    student, teacher = STUDENT.reshape(shape), TEACHER.reshape(shape)
    losses = Losses.model_validate({"kd": {"temperature": 3.0}, "logit_mse": {}})
    found = logit_losses(
        losses, student, [teacher], Panel((1.0,), "separate", VALUES), TARGETS, task_loss=cross_entropy, progress=0.0
    )
    each = (student - teacher).square()
    expected = each if len(shape) == 1 else each.mean(dim=1)
    torch.testing.assert_close(found["kd"], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(found["logit_mse"], expected, rtol=0, atol=1e-12)


def test_squared_difference_of_labels_is_that_of_their_logits():
    found = of_kind({"logit_mse": {}}, LABELS)["logit_mse"]
    torch.testing.assert_close(found, (STUDENT - TEACHER).square().mean(dim=1), rtol=0, atol=1e-12)


def test_classes_in_the_last_dimension_teach_as_in_dimension_1():
    student, teacher = (torch.stack([one, one.flip(0)], dim=1) for one in (STUDENT, TEACHER))  # (3, 2 tokens, 4)
    targets = torch.stack([TARGETS, TARGETS.flip(0)], dim=1)
    losses = Losses.model_validate(EVERY_RESPONSE)
    last, first = (
        logit_losses(
            losses, one, [other], Panel((1.0,), "separate", outputs), targets, task_loss=cross_entropy, progress=0.0
        )
        for one, other, outputs in (
            (student, teacher, Outputs("classes", 2)),
            (student.transpose(1, 2), teacher.transpose(1, 2), Outputs("classes")),
        )
    )
    for name in EVERY_RESPONSE:
        assert last[name].shape == (3, 2)
        assert torch.equal(last[name], first[name])


def test_mean_of_probabilities_is_refused_for_values():
    with pytest.raises(InputError, match="combine must be 'mean_logit' or 'separate' where outputs are values"):
        Panel((0.5, 0.5), "mean_probability", VALUES)
