import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.distillation.feature import attention_map, attention_transfer_loss, hint_loss
from compressor.errors import InputError

# Inputs and float64 values of an independent numpy implementation, shared/reference/loss_vectors.py.
STUDENT = torch.arange(1, 17, dtype=torch.float64).reshape(2, 2, 2, 2) / 10
TEACHER = (torch.arange(24, dtype=torch.float64).sin() + 1.5).reshape(2, 3, 2, 2)
REGRESSOR = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, -1.0]], dtype=torch.float64)
REGRESSED = torch.einsum("oc,nchw->nohw", REGRESSOR, STUDENT)
REFERENCE = {
    "hint_mse_mean": 3.402214021600045,
    "at_code_mean": 0.030617220305582095,
    "at_paper_l2_batchmean": 0.3287952342579805,
}
# The sums over positions or features that some implementations take instead.
OTHERS = {"at_sum_sq_batchmean": 0.12246888122232838, "hint_half_sum_per_batch": 20.41328412960027}
OURS = {
    "hint_mse_mean": hint_loss(REGRESSED, TEACHER),
    "at_code_mean": attention_transfer_loss(STUDENT, TEACHER, normalization="mean_square"),
    "at_paper_l2_batchmean": attention_transfer_loss(STUDENT, TEACHER, normalization="euclidean"),
}
VECTORS = Path(__file__).parents[2] / "../shared/reference/loss_vectors.json"

both_forms = pytest.mark.parametrize("normalization", ["mean_square", "euclidean"])


def features(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", REFERENCE)
def test_mean_over_samples_equals_the_reference(name):
    assert OURS[name].shape == (2,)
    assert OURS[name].mean().item() == pytest.approx(REFERENCE[name], abs=1e-12)  # float64 rounding
    for other, value in OTHERS.items():
        assert OURS[name].mean().item() != pytest.approx(value, rel=1e-3), other


def test_values_in_this_file_equal_the_shared_vectors():
    if not VECTORS.exists():
        pytest.skip(f"needs {VECTORS}")
    vectors = json.loads(VECTORS.read_text())
    inlined = REFERENCE | OTHERS
    for name, value in inlined.items():
        assert value == pytest.approx(vectors[name], abs=1e-12), name


def test_hint_loss_of_each_sample_is_its_mean_squared_error():
    student, teacher = features(0, 3, 4, 5), features(1, 3, 4, 5)
    expected = torch.stack([F.mse_loss(one, other) for one, other in zip(student, teacher, strict=True)])
    torch.testing.assert_close(hint_loss(student, teacher), expected)


def test_features_that_would_broadcast_are_refused():
    with pytest.raises(InputError, match=r"one shape, got \(3, 4\) and \(3, 1\)"):
        hint_loss(features(0, 3, 4), features(1, 3, 1))


def test_attention_map_of_images_and_tokens_is_the_same_place_by_place():
    images = features(0, 2, 3, 4, 5)
    tokens = images.flatten(2).mT  # (N, L, D)
    attention = attention_map(images)
    assert attention.shape == (2, 20)
    torch.testing.assert_close(attention, attention_map(tokens))
    torch.testing.assert_close(attention.square().sum(dim=1), torch.ones(2, dtype=torch.float64))
    square = images[1, :, 2, 3].square().sum() / images[1].square().sum(dim=0).square().sum().sqrt()
    torch.testing.assert_close(attention[1, 2 * 5 + 3], square)


@both_forms
def test_convolutional_student_learns_from_as_many_tokens(normalization):
    images, teacher = features(0, 2, 3, 4, 4), features(1, 2, 16, 8)
    by_tokens = attention_transfer_loss(images.flatten(2).mT, teacher, normalization=normalization)
    torch.testing.assert_close(attention_transfer_loss(images, teacher, normalization=normalization), by_tokens)


@both_forms
def test_larger_features_are_pooled_to_the_smaller(normalization):
    small, large = features(0, 2, 3, 2, 3), features(1, 2, 5, 4, 9)
    pooled = large.reshape(2, 5, 2, 2, 3, 3).mean(dim=(3, 5))
    expected = attention_transfer_loss(small, pooled, normalization=normalization)
    torch.testing.assert_close(attention_transfer_loss(small, large, normalization=normalization), expected)
    torch.testing.assert_close(attention_transfer_loss(large, small, normalization=normalization), expected)


def test_attention_map_of_half_precision_features_whose_squares_overflow_is_float32():
    attention = attention_map((1000 * TEACHER).half())
    torch.testing.assert_close(attention, attention_map(TEACHER).float(), atol=0, rtol=2e-3)  # half keeps 11 bits


def test_features_of_other_dimensions_are_refused():
    with pytest.raises(InputError, match=r"\(N, C, H, W\) or tokens \(N, L, D\), got \(2, 3\)"):
        attention_map(features(0, 2, 3))


def test_tokens_of_different_number_are_refused():
    with pytest.raises(InputError, match=r"one shape, got \(2, 5\) and \(2, 4\)"):
        attention_transfer_loss(features(0, 2, 5, 3), features(1, 2, 4, 3), normalization="euclidean")


def test_features_of_different_samples_are_refused():
    with pytest.raises(InputError, match="the same samples, got 2 and 1"):
        attention_transfer_loss(features(0, 2, 5, 3), features(1, 1, 5, 3), normalization="euclidean")


@both_forms
def test_gradient_is_the_slope_of_attention_transfer(normalization):
    student = features(0, 2, 3, 4, 4).requires_grad_()
    teacher = features(1, 2, 5, 2, 2)
    assert torch.autograd.gradcheck(
        lambda values: attention_transfer_loss(values, teacher, normalization=normalization), (student,)
    )


def test_gradient_is_the_slope_of_the_hint_loss():
    assert torch.autograd.gradcheck(lambda values: hint_loss(values, TEACHER), (REGRESSED.clone().requires_grad_(),))


@both_forms
def test_features_that_are_zero_or_equal_have_finite_gradients(normalization):
    equal = STUDENT.clone()
    for student, teacher in ((torch.zeros_like(STUDENT), TEACHER), (equal, STUDENT), (STUDENT.clone(), 0 * TEACHER)):
        student.requires_grad_()
        losses = attention_transfer_loss(student, teacher, normalization=normalization)
        losses.sum().backward()
        assert torch.isfinite(losses).all()
        assert torch.isfinite(student.grad).all()


@both_forms
def test_half_precision_features_whose_squares_overflow_give_the_float32_loss(normalization):
    student, teacher = (1000 * STUDENT).half(), (1000 * TEACHER).half()
    losses = attention_transfer_loss(student, teacher, normalization=normalization)
    assert losses.dtype == torch.float32
    expected = attention_transfer_loss(student.double(), teacher.double(), normalization=normalization)
    torch.testing.assert_close(losses, expected.float(), atol=1e-6, rtol=1e-5)  # float32 rounding


@both_forms
@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 2**31), st.floats(1e-2, 1e2), st.floats(1e-2, 1e2))
def test_attention_transfer_ignores_the_scale_of_features(normalization, seed, student_scale, teacher_scale):
    student, teacher = features(seed, 2, 3, 4, 4), features(seed + 1, 2, 5, 4, 4)
    loss = attention_transfer_loss(student, teacher, normalization=normalization)
    scaled = attention_transfer_loss(student_scale * student, teacher_scale * teacher, normalization=normalization)
    torch.testing.assert_close(scaled, loss)


@pytest.mark.parametrize(
    "loss",
    [
        hint_loss,
        lambda s, t: attention_transfer_loss(s, t, normalization="mean_square"),
        lambda s, t: attention_transfer_loss(s, t, normalization="euclidean"),
    ],
    ids=["hint", "mean_square", "euclidean"],
)
def test_loss_of_a_batch_is_the_losses_of_its_parts_in_their_order(loss):
    student, teacher = features(0, 5, 3, 4, 4), features(1, 5, 3, 4, 4)
    losses = loss(student, teacher)
    torch.testing.assert_close(torch.cat([loss(student[:2], teacher[:2]), loss(student[2:], teacher[2:])]), losses)
    torch.testing.assert_close(loss(student.flip(0), teacher.flip(0)), losses.flip(0))
