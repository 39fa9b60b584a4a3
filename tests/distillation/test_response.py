import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from compressor.distillation.response import (
    correlation_loss,
    decoupled_distillation_loss,
    distillation_loss,
    jensen_shannon_loss,
    logit_mse,
    reverse_distillation_loss,
    soft_cross_entropy,
    standardize,
    tail_bucket_loss,
    top_k,
)
from compressor.errors import InputError
from compressor.models.ensemble import combine_logits

# Inputs and float64 values of an independent numpy implementation, shared/reference/loss_vectors.py.
STUDENT = torch.tensor([[2.0, 0.5, -1.0, 0.1], [0.3, 1.2, 0.0, -0.7], [-1.5, 0.4, 2.2, 0.9]], dtype=torch.float64)
TEACHER = torch.tensor([[3.0, 1.0, -2.0, 0.0], [0.0, 2.5, -0.5, -1.0], [-1.0, 0.0, 1.0, 3.0]], dtype=torch.float64)
TARGETS = torch.tensor([0, 1, 2])
REFERENCE = {
    "kd_T2kl_batchmean_T1": 0.4320662781621569,
    "kd_T2kl_batchmean_T2": 0.5212837603676709,
    "kd_T2kl_batchmean_T4": 0.5016115334945849,
    "kl_batchmean_T4": 0.031350720843411554,
    "soft_ce_T4": 1.3394738107678554,
    "teacher_entropy_T4": 1.3081230899244438,
    "reverse_kl_T1": 0.48672223814008103,
    "gjsd_beta0.1": 0.03809050657213737,
    "gjsd_beta0.5": 0.10500366382042846,
    "gjsd_beta0.9": 0.04162989282684595,
    "mixA_alpha0.9_T4": 0.4965081006890216,
    "mixB_lambda0.5_T2_noT2": 0.29044907276543497,
    "mixB_lambda0.5_T2_withT2": 0.48593048290331153,
    "logit_mse_mean": 0.8866666666666667,
    "tckd_T1": 0.3330948427018909,
    "nckd_T1": 0.134843406852892,
    "dkd_a1_b8_T1": 1.411842097525027,
    "tckd_T4": 0.31558639067708044,
    "nckd_T4": 0.26062073225151666,
    "dkd_a1_b8_T4": 2.400552248689214,
    "dist_inter_tau1": 0.35662142701224886,
    "dist_intra_tau1": 0.015321595805844024,
    "dist_b1_g1_tau1": 0.3719430228180929,
    "dist_b1_g1_tau4": 3.808184647785474,
    "ls_kd_T2_ddof1": 0.13084453334665283,
    "ens_probmean_kd_T2": 0.7442794830899819,
    "ens_logitmean_kd_T2": 0.5561578205179463,
    "topk2_tail_bucket": 0.4298345564831889,
}
GRADIENT = {
    "grad_kdT2_T1_row0": [-0.045343271915885906, 0.014436566261978248, 0.009782247372145851, 0.021124458281761776],
    "grad_kdT2_T4_row0": [-0.08433087751729618, -0.012437569110319865, 0.06493174592230437, 0.03183670070531156],
    "grad_kdT2_T1000_row0": [-0.07506636141294913, -0.03325598521466041, 0.09157511159217184, 0.016747235035437697],
}
# What common mistakes give instead: the mean over classes, std with C in the denominator, a top k that is renormalised.
MISTAKES = {
    "BUG_kl_mean_T1": 0.10801656954053923,
    "BUG_kl_mean_T2_T1": 0.10801656954053923,
    "BUG_kl_mean_T2": 0.03258023502297943,
    "BUG_kl_mean_T2_T2": 0.13032094009191772,
    "BUG_kl_mean_T4": 0.007837680210852889,
    "BUG_kl_mean_T2_T4": 0.12540288337364622,
    "kl_batchmean_T4": 0.031350720843411554,
    "ls_kd_T2_ddof0": 0.1778218326081459,
    "topk2_zero_renorm": 0.5815472227401086,
}
VECTORS = Path(__file__).parents[2] / "../shared/reference/loss_vectors.json"

kd = distillation_loss
dkd = decoupled_distillation_loss
dist = correlation_loss
FAR = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [1e4, 1e4, 1e4], [0.0, 0.0, 0.0]])


def tail_bucket(student_logits, teacher_logits, k=2):
    return tail_bucket_loss(student_logits, top_k(teacher_logits, k))


# Every loss as a function of (student, teacher, targets); "columns" alone depends on the other samples of the batch.
OF_ONE_SAMPLE = {
    "distillation": lambda s, t, _: kd(s, t, temperature=4.0),
    "soft_cross_entropy": lambda s, t, _: soft_cross_entropy(s, t, temperature=4.0),
    "reverse": lambda s, t, _: reverse_distillation_loss(s, t, temperature=4.0),
    "jensen_shannon": lambda s, t, _: jensen_shannon_loss(s, t, beta=0.3, temperature=4.0),
    "decoupled": lambda s, t, y: dkd(s, t, y, alpha=1.0, beta=8.0, temperature=4.0),
    "rows": lambda s, t, _: dist(s, t, inter=1.0, intra=0.0, temperature=4.0),
    "standardized": lambda s, t, _: kd(standardize(s), standardize(t), temperature=2.0),
    "logit_mse": lambda s, t, _: logit_mse(s, t),
    "tail_bucket": lambda s, t, _: tail_bucket(s, t),
}
LOSSES = OF_ONE_SAMPLE | {"columns": lambda s, t, _: dist(s, t, inter=0.0, intra=1.0, temperature=4.0)}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
every_loss_of_one_sample = pytest.mark.parametrize("loss", OF_ONE_SAMPLE.values(), ids=OF_ONE_SAMPLE)


def mixed(weight_soft, weight_hard, *, temperature, temperature_squared=True):
    soft = kd(STUDENT, TEACHER, temperature=temperature, temperature_squared=temperature_squared)
    return weight_soft * soft + weight_hard * F.cross_entropy(STUDENT, TARGETS, reduction="none")


def of_ensemble(combine):
    members = [TEACHER, TEACHER.flip(1)]
    return kd(STUDENT, combine_logits(members, weights=[0.5, 0.5], combine=combine, temperature=2.0), temperature=2.0)


OURS = {
    "kd_T2kl_batchmean_T1": kd(STUDENT, TEACHER, temperature=1.0),
    "kd_T2kl_batchmean_T2": kd(STUDENT, TEACHER, temperature=2.0),
    "kd_T2kl_batchmean_T4": kd(STUDENT, TEACHER, temperature=4.0),
    "kl_batchmean_T4": kd(STUDENT, TEACHER, temperature=4.0, temperature_squared=False),
    "soft_ce_T4": soft_cross_entropy(STUDENT, TEACHER, temperature=4.0, temperature_squared=False),
    "teacher_entropy_T4": soft_cross_entropy(TEACHER, TEACHER, temperature=4.0, temperature_squared=False),
    "reverse_kl_T1": reverse_distillation_loss(STUDENT, TEACHER, temperature=1.0),
    "gjsd_beta0.1": jensen_shannon_loss(STUDENT, TEACHER, beta=0.1, temperature=1.0),
    "gjsd_beta0.5": jensen_shannon_loss(STUDENT, TEACHER, beta=0.5, temperature=1.0),
    "gjsd_beta0.9": jensen_shannon_loss(STUDENT, TEACHER, beta=0.9, temperature=1.0),
    "mixA_alpha0.9_T4": mixed(0.9, 0.1, temperature=4.0),
    "mixB_lambda0.5_T2_noT2": mixed(0.5, 0.5, temperature=2.0, temperature_squared=False),
    "mixB_lambda0.5_T2_withT2": mixed(0.5, 0.5, temperature=2.0),
    "logit_mse_mean": logit_mse(STUDENT, TEACHER),
    "tckd_T1": dkd(STUDENT, TEACHER, TARGETS, alpha=1.0, beta=0.0, temperature=1.0),
    "nckd_T1": dkd(STUDENT, TEACHER, TARGETS, alpha=0.0, beta=1.0, temperature=1.0),
    "dkd_a1_b8_T1": dkd(STUDENT, TEACHER, TARGETS, alpha=1.0, beta=8.0, temperature=1.0),
    "tckd_T4": dkd(STUDENT, TEACHER, TARGETS, alpha=1.0, beta=0.0, temperature=4.0),
    "nckd_T4": dkd(STUDENT, TEACHER, TARGETS, alpha=0.0, beta=1.0, temperature=4.0),
    "dkd_a1_b8_T4": dkd(STUDENT, TEACHER, TARGETS, alpha=1.0, beta=8.0, temperature=4.0),
    "dist_inter_tau1": dist(STUDENT, TEACHER, inter=1.0, intra=0.0, temperature=1.0),
    "dist_intra_tau1": dist(STUDENT, TEACHER, inter=0.0, intra=1.0, temperature=1.0),
    "dist_b1_g1_tau1": dist(STUDENT, TEACHER, inter=1.0, intra=1.0, temperature=1.0),
    "dist_b1_g1_tau4": dist(STUDENT, TEACHER, inter=1.0, intra=1.0, temperature=4.0),
    "ls_kd_T2_ddof1": kd(standardize(STUDENT), standardize(TEACHER), temperature=2.0),
    "ens_probmean_kd_T2": of_ensemble("mean_probability"),
    "ens_logitmean_kd_T2": of_ensemble("mean_logit"),
    "topk2_tail_bucket": tail_bucket(STUDENT, TEACHER),
}


@pytest.mark.parametrize("name", REFERENCE)
def test_mean_over_samples_equals_the_reference(name):
    assert OURS[name].shape == (3,)
    assert OURS[name].mean().item() == pytest.approx(REFERENCE[name], abs=1e-12)  # float64 rounding


def test_values_in_this_file_equal_the_shared_vectors():
    if not VECTORS.exists():
        pytest.skip(f"needs {VECTORS}")
    vectors = json.loads(VECTORS.read_text())
    inlined = REFERENCE | GRADIENT | MISTAKES
    for name, value in inlined.items():
        assert value == pytest.approx(vectors[name], abs=1e-12), name
    assert {name for name in vectors if name.startswith("BUG_")} <= MISTAKES.keys()


# T = 4 only for distillation: with C = 4 and T = 2 a mean over classes times T² equals a sum without T².
@pytest.mark.parametrize("name", ["kd_T2kl_batchmean_T4", "dkd_a1_b8_T4", "ls_kd_T2_ddof1", "topk2_tail_bucket"])
def test_loss_is_none_of_the_known_mistakes(name):
    for mistake, value in MISTAKES.items():
        assert OURS[name].mean().item() != pytest.approx(value, rel=1e-3), mistake


@pytest.mark.parametrize("temperature", [1.0, 4.0, 1000.0])
def test_gradient_of_distillation_equals_the_reference_at_every_temperature(temperature):
    student = STUDENT.clone().requires_grad_()
    kd(student, TEACHER, temperature=temperature).mean().backward()
    reference = torch.tensor(GRADIENT[f"grad_kdT2_T{temperature:g}_row0"], dtype=torch.float64)
    # T times a difference of probabilities: their rounding, 1e-16, is multiplied by T.
    torch.testing.assert_close(student.grad[0], reference, atol=1e-12, rtol=0)


def test_soft_cross_entropy_is_distillation_plus_the_teachers_entropy():
    arguments = {"temperature": 4.0}
    entropy = soft_cross_entropy(TEACHER, TEACHER, **arguments)
    torch.testing.assert_close(
        soft_cross_entropy(STUDENT, TEACHER, **arguments), kd(STUDENT, TEACHER, **arguments) + entropy
    )


@pytest.mark.parametrize(
    "loss", [kd, soft_cross_entropy, reverse_distillation_loss, partial(jensen_shannon_loss, beta=0.3)]
)
def test_leaving_out_the_squared_temperature_divides_by_it(loss):
    without = loss(STUDENT, TEACHER, temperature=4.0, temperature_squared=False)
    torch.testing.assert_close(loss(STUDENT, TEACHER, temperature=4.0), 16 * without)


def test_jensen_shannon_tends_to_distillation_and_its_reverse():
    small = 1e-7  # the limit's error is of this order; float64 rounding is divided by it: 1e-9
    forward = jensen_shannon_loss(STUDENT, TEACHER, beta=small, temperature=2.0) / small
    reverse = jensen_shannon_loss(STUDENT, TEACHER, beta=1 - small, temperature=2.0) / small
    torch.testing.assert_close(forward, kd(STUDENT, TEACHER, temperature=2.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(reverse, reverse_distillation_loss(STUDENT, TEACHER, temperature=2.0), atol=1e-5, rtol=0)


# Tokens, precision, gradients


@every_loss
def test_tokens_have_the_values_that_they_have_as_samples(loss):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(4, 5, 2, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    targets = torch.randint(5, (4, 2, 3), generator=generator)
    as_samples = [logits.movedim(1, -1).reshape(-1, 5) for logits in (student, teacher)]
    losses = loss(student, teacher, targets)
    expected = loss(*as_samples, targets.flatten()).reshape(4, 2, 3)
    # A loss of the whole batch has one value; the mean of it is a scalar that every token is given.
    torch.testing.assert_close(losses.expand(4, 2, 3), expected)


@every_loss
def test_gradient_is_the_slope_of_the_loss(loss):
    student = STUDENT.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: loss(logits, TEACHER, TARGETS), (student,))


@every_loss
def test_half_precision_logits_give_the_float32_loss(loss):
    for dtype in (torch.float16, torch.bfloat16):
        student, teacher = STUDENT.to(dtype), TEACHER.to(dtype)
        losses = loss(student, teacher, TARGETS)
        assert losses.dtype == torch.float32
        torch.testing.assert_close(losses, loss(student.float(), teacher.float(), TARGETS), atol=0, rtol=0)


@every_loss
def test_saturated_logits_have_finite_losses_and_gradients(loss):
    for teacher in (FAR, -FAR, FAR.roll(1, dims=0)):
        student = FAR.clone().requires_grad_()
        losses = loss(student, teacher, torch.tensor([0, 1, 2, 0]))
        losses.sum().backward()
        assert torch.isfinite(losses).all()
        assert torch.isfinite(student.grad).all()


def test_decoupled_loss_of_a_sure_and_wrong_student_is_its_margin():
    # p = (1, 0), q = (0, 1) at a margin of 2e4: KL is the log-odds; a loss that goes through log(0) gives inf.
    loss = dkd(FAR[:1], -FAR[:1], torch.tensor([1]), alpha=1.0, beta=0.0, temperature=1.0)
    torch.testing.assert_close(loss, torch.tensor([2e4]))


def test_ignored_targets_have_no_loss_and_no_gradient_even_if_their_logits_are_nan():
    student, teacher = STUDENT.clone(), TEACHER.clone()
    student[1], teacher[1] = torch.nan, torch.inf
    student.requires_grad_()
    losses = dkd(student, teacher, torch.tensor([0, -100, 2]), alpha=1.0, beta=8.0, temperature=4.0)
    losses.sum().backward()
    assert losses[1] == 0
    assert (student.grad[1] == 0).all()
    torch.testing.assert_close(losses[[0, 2]], OURS["dkd_a1_b8_T4"][[0, 2]])
    assert student.grad[[0, 2]].abs().min() > 0


def test_probabilities_that_do_not_vary_correlate_with_nothing_and_get_no_gradient():
    student = torch.zeros(3, 4, requires_grad=True)
    losses = dist(student, TEACHER.float(), inter=2.0, intra=3.0, temperature=1.0)
    losses.sum().backward()
    torch.testing.assert_close(losses, torch.full((3,), 5.0))
    assert (student.grad == 0).all()


def test_samples_beside_one_that_does_not_vary_keep_their_gradients():
    student = torch.tensor([[0.0, 0.0, 0.0, 0.0], [2.0, 0.5, -1.0, 0.1]], requires_grad=True)
    dist(student, TEACHER[:2].float(), inter=1.0, intra=0.0, temperature=1.0).sum().backward()
    assert (student.grad[0] == 0).all()
    assert student.grad[1].abs().min() > 0


def test_correlation_of_one_sample_has_no_part_over_samples():
    loss = dist(STUDENT[:1], TEACHER[:1], inter=0.0, intra=1.0, temperature=1.0)
    torch.testing.assert_close(loss, torch.ones(1, dtype=torch.float64))


def test_standardizing_equal_logits_gives_zero_and_finite_gradients():
    logits = torch.ones(2, 3, requires_grad=True)
    standardized = standardize(logits)
    standardized[0, 0].backward()
    assert (standardized == 0).all()
    assert torch.isfinite(logits.grad).all()


# Teachers that are combined or cut to their top classes


def test_combined_logits_soften_to_the_weighted_mean_of_the_members():
    members, weights = [TEACHER, STUDENT, TEACHER.flip(1)], [0.5, 0.25, 0.25]
    combined = combine_logits(members, weights=weights, combine="mean_probability", temperature=3.0)
    softened = [F.softmax(member / 3, dim=1) for member in members]
    torch.testing.assert_close(F.softmax(combined / 3, dim=1), (2 * softened[0] + softened[1] + softened[2]) / 4)


def test_mean_logit_is_the_weighted_mean_of_the_members():
    combined = combine_logits([TEACHER, STUDENT], weights=[0.25, 0.75], combine="mean_logit", temperature=3.0)
    torch.testing.assert_close(combined, TEACHER / 4 + STUDENT * 3 / 4)


def test_saturated_members_combine_to_finite_logits():
    combined = combine_logits([FAR, -FAR], weights=[0.5, 0.5], combine="mean_probability")
    assert torch.isfinite(combined).all()


def test_logits_of_different_shapes_are_refused():
    with pytest.raises(InputError, match=r"one shape, got \(3, 4\) and \(3, 1\)"):
        kd(STUDENT, TEACHER[:, :1], temperature=1.0)


def test_top_classes_and_tail_are_the_teachers_probabilities():
    logits = torch.stack([TEACHER, STUDENT], dim=2)  # (N, C, tokens)
    top = top_k(logits, 3)
    probabilities = F.softmax(logits, dim=1)
    sorted_probabilities, order = probabilities.sort(dim=1, descending=True)
    assert top.classes.dtype == torch.int64
    torch.testing.assert_close(top.classes, order[:, :3])
    torch.testing.assert_close(top.log_probabilities.exp(), sorted_probabilities[:, :3])
    torch.testing.assert_close(top.tail.exp(), sorted_probabilities[:, 3])


def test_tail_below_the_rounding_of_one_keeps_its_digits():
    logits = torch.tensor([[50.0, 50.0, 0.0, 0.0]])
    # The tail is 2 e⁰ of 2 e⁵⁰; 1 minus the top two would be 0, its logarithm -inf. Float32 logits of 50: 4e-6.
    torch.testing.assert_close(top_k(logits, 2).tail, torch.tensor([-50.0]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("k", [0, 4, 5])
def test_top_classes_that_leave_no_tail_are_refused(k):
    with pytest.raises(InputError, match=f"at least 1 and less than all 4, got {k}"):
        top_k(TEACHER, k)


# Properties, on random logits

fuzzed = settings(max_examples=50, deadline=None, derandomize=True, database=None)
temperatures = st.floats(0.5, 20.0)


@st.composite
def two_logits(draw, bound=30.0, samples=4):
    shape = (draw(st.integers(1, samples)), draw(st.integers(2, 6)))
    elements = st.floats(-bound, bound)
    return tuple(torch.from_numpy(draw(arrays("float64", shape, elements=elements))) for _ in range(2))


def random_logits(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@fuzzed
@given(two_logits(), temperatures)
def test_losses_of_equal_logits_are_zero(logits, temperature):
    student, _ = logits
    assert (kd(student, student, temperature=temperature) == 0).all()
    assert (reverse_distillation_loss(student, student, temperature=temperature) == 0).all()
    assert (logit_mse(student, student) == 0).all()
    targets = torch.zeros(len(student), dtype=torch.int64)
    assert (dkd(student, student, targets, alpha=1.0, beta=8.0, temperature=temperature) == 0).all()
    # These two sum what is equal in another order: 1e-16 times logits of 60, times T² of 400.
    for loss in (
        jensen_shannon_loss(student, student, beta=0.3, temperature=temperature),
        tail_bucket(student, student, 1),
    ):
        torch.testing.assert_close(loss, torch.zeros_like(loss), atol=1e-10, rtol=0)


@fuzzed
@given(two_logits(), temperatures, st.floats(-100, 100), st.floats(-100, 100))
def test_adding_a_constant_to_logits_changes_nothing(logits, temperature, student_shift, teacher_shift):
    student, teacher = logits
    targets = torch.zeros(len(student), dtype=torch.int64)
    for loss in (
        partial(kd, temperature=temperature),
        partial(soft_cross_entropy, temperature=temperature),
        partial(reverse_distillation_loss, temperature=temperature),
        partial(jensen_shannon_loss, beta=0.3, temperature=temperature),
        partial(dkd, targets=targets, alpha=1.0, beta=8.0, temperature=temperature),
        partial(tail_bucket, k=1),
    ):
        shifted = loss(student + student_shift, teacher + teacher_shift)
        # Rounding of logits of 130, 3e-14, times T² of 400 times beta of 8.
        torch.testing.assert_close(shifted, loss(student, teacher), atol=1e-9, rtol=1e-9)


@fuzzed
@given(two_logits(bound=3.0))
def test_distillation_at_high_temperature_is_half_the_squared_difference_of_centred_logits(logits):
    student, teacher = (side - side.mean(dim=1, keepdim=True) for side in logits)
    # The next term of the expansion is the third moment of logits of at most 6, over T: about 36 · 6 / 1e5.
    high = kd(student, teacher, temperature=1e5)
    torch.testing.assert_close(high, logit_mse(student, teacher) / 2, atol=5e-3, rtol=0)


@fuzzed
@given(two_logits(), temperatures, st.data())
def test_distillation_is_the_target_part_plus_the_rest_part_by_its_probability(logits, temperature, data):
    student, teacher = logits
    classes = st.integers(0, student.shape[1] - 1)
    targets = torch.tensor(data.draw(st.lists(classes, min_size=len(student), max_size=len(student))))
    parts = partial(dkd, student, teacher, targets, temperature=temperature)
    rest = 1 - F.softmax(teacher / temperature, dim=1).gather(1, targets.unsqueeze(1)).squeeze(1)
    whole = parts(alpha=1.0, beta=0.0) + rest * parts(alpha=0.0, beta=1.0)
    # float64 rounding of logits of 60 and of 1 - p, times T² of 400
    torch.testing.assert_close(whole, kd(student, teacher, temperature=temperature), atol=1e-9, rtol=1e-9)


@fuzzed
@given(two_logits(), st.data())
def test_tail_bucket_is_between_zero_and_the_loss_over_all_classes(logits, data):
    student, teacher = logits
    k = data.draw(st.integers(1, student.shape[1] - 1))
    loss, full = tail_bucket(student, teacher, k), kd(student, teacher, temperature=1.0)
    assert (loss >= -1e-12).all()
    assert (loss <= full + 1e-12).all()
    if k == student.shape[1] - 1:  # then the tail is a class
        torch.testing.assert_close(loss, full, atol=1e-12, rtol=1e-9)


@fuzzed
@given(two_logits(), temperatures, st.floats(0.05, 0.95))
def test_jensen_shannon_is_symmetric_and_bounded(logits, temperature, beta):
    student, teacher = logits
    loss = jensen_shannon_loss(student, teacher, beta=beta, temperature=temperature)
    swapped = jensen_shannon_loss(teacher, student, beta=1 - beta, temperature=temperature)
    torch.testing.assert_close(loss, swapped, atol=1e-10, rtol=1e-9)
    assert (loss <= temperature**2 * math.log(2) + 1e-10).all()


@fuzzed
@given(st.integers(0, 2**31), st.floats(0.5, 10.0), st.floats(-10, 10))
def test_standardized_teacher_may_be_scaled_and_shifted(seed, scale, shift):
    student, teacher = random_logits(seed, 3, 10), random_logits(seed + 1, 3, 10)
    loss = kd(standardize(student), standardize(teacher), temperature=2.0)
    moved = kd(standardize(student), standardize(scale * teacher + shift), temperature=2.0)
    # 1e-7 beside a standard deviation of about 1 changes standardized logits, and the loss, by about that share.
    torch.testing.assert_close(moved, loss, atol=2e-6, rtol=0)


@fuzzed
@given(st.integers(0, 2**31), st.floats(0.2, 1.0))
def test_correlation_ignores_positive_affine_maps_of_the_probabilities(seed, share):
    student, teacher = random_logits(seed, 6, 5), random_logits(seed + 1, 6, 5)
    probabilities = F.softmax(teacher, dim=1)
    other = F.softmax(random_logits(seed + 2, 5), dim=0)
    # Mixed with any one distribution, each column is mapped affinely; with the uniform one, each row too.
    by_column, by_row = share * probabilities + (1 - share) * other, share * probabilities + (1 - share) / 5
    rows = partial(dist, student, inter=1.0, intra=0.0, temperature=1.0)
    columns = partial(dist, student, inter=0.0, intra=1.0, temperature=1.0)
    # 1e-8 beside a product of norms of at least 1e-3
    torch.testing.assert_close(rows(by_row.log()), rows(teacher), atol=1e-5, rtol=0)
    torch.testing.assert_close(columns(by_column.log()), columns(teacher), atol=1e-5, rtol=0)


@every_loss
def test_order_of_samples_does_not_matter(loss):
    student, teacher = random_logits(0, 7, 5), random_logits(1, 7, 5)
    targets = torch.arange(7) % 5
    order = torch.tensor([3, 0, 6, 2, 5, 1, 4])
    permuted = loss(student[order], teacher[order], targets[order])
    torch.testing.assert_close(permuted, loss(student, teacher, targets)[order])


@every_loss_of_one_sample
def test_loss_of_a_batch_is_the_losses_of_its_parts(loss):
    student, teacher = random_logits(0, 7, 5), random_logits(1, 7, 5)
    targets = torch.arange(7) % 5
    parts = [loss(student[part], teacher[part], targets[part]) for part in (slice(0, 3), slice(3, 7))]
    torch.testing.assert_close(torch.cat(parts), loss(student, teacher, targets))
