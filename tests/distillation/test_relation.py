import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.distillation.relation import relational_angle_loss, relational_distance_loss, similarity_loss
from compressor.errors import InputError

# Inputs and float64 values of an independent numpy implementation, shared/reference/loss_vectors.py.
STUDENT = torch.tensor([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0], [1.0, -1.0]], dtype=torch.float64)
TEACHER = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 3.0], [1.0, 1.0, 1.0]], dtype=torch.float64)
STUDENT_FEATURES = torch.arange(1, 17, dtype=torch.float64).reshape(2, 2, 2, 2) / 10
TEACHER_FEATURES = (torch.arange(24, dtype=torch.float64).sin() + 1.5).reshape(2, 3, 2, 2)
REFERENCE = {
    "rkd_d": 0.07184507774515272,
    "rkd_a": 0.14086877688408048,
    "rkd_25d_50a": 8.839565787832843,
    "sp": 0.08113977923649436,
}
MISTAKE = {"rkd_d_offdiag_mean": 0.09579343699353697}  # the mean over pairs of two different samples
OURS = {
    "rkd_d": relational_distance_loss(STUDENT, TEACHER),
    "rkd_a": relational_angle_loss(STUDENT, TEACHER),
    "rkd_25d_50a": 25 * relational_distance_loss(STUDENT, TEACHER) + 50 * relational_angle_loss(STUDENT, TEACHER),
    "sp": similarity_loss(STUDENT_FEATURES, TEACHER_FEATURES),
}
VECTORS = Path(__file__).parents[2] / "../shared/reference/loss_vectors.json"

RKD = {"distance": relational_distance_loss, "angle": relational_angle_loss}
LOSSES = RKD | {"similarity": similarity_loss}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
fuzzed = settings(max_examples=50, deadline=None, derandomize=True, database=None)


def embeddings(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", REFERENCE)
def test_mean_over_samples_equals_the_reference(name):
    assert OURS[name].ndim == 1
    assert OURS[name].mean().item() == pytest.approx(REFERENCE[name], abs=1e-12)  # float64 rounding


def test_distance_loss_counts_a_sample_with_itself():
    assert OURS["rkd_d"].mean().item() != pytest.approx(MISTAKE["rkd_d_offdiag_mean"], rel=1e-3)


def test_values_in_this_file_equal_the_shared_vectors():
    if not VECTORS.exists():
        pytest.skip(f"needs {VECTORS}")
    vectors = json.loads(VECTORS.read_text())
    inlined = REFERENCE | MISTAKE
    for name, value in inlined.items():
        assert value == pytest.approx(vectors[name], abs=1e-12), name


def test_angle_loss_equals_the_mean_over_all_triples_one_by_one():
    student, teacher = embeddings(0, 4, 3), embeddings(1, 4, 5)

    def cosine(points, i, j, k):
        return F.cosine_similarity(points[j] - points[i], points[k] - points[i], dim=0)

    for i, loss in enumerate(relational_angle_loss(student, teacher)):
        pairs = [(j, k) for j in range(4) for k in range(4)]
        expected = [F.smooth_l1_loss(cosine(student, i, j, k), cosine(teacher, i, j, k)) for j, k in pairs]
        torch.testing.assert_close(loss, torch.stack(expected).mean())


@every_loss
def test_embeddings_of_any_shape_are_flattened(loss):
    student, teacher = embeddings(0, 4, 2, 3), embeddings(1, 4, 5)
    torch.testing.assert_close(loss(student, teacher), loss(student.flatten(1), teacher))


@every_loss
def test_loss_of_equal_embeddings_is_zero(loss):
    assert (loss(STUDENT, STUDENT) == 0).all()


@every_loss
def test_gradient_is_the_slope_of_the_loss(loss):
    student = embeddings(0, 5, 3).requires_grad_()
    teacher = embeddings(1, 5, 4)
    assert torch.autograd.gradcheck(lambda points: loss(points, teacher), (student,))


@every_loss
def test_coincident_samples_have_finite_losses_and_gradients(loss):
    pair = torch.tensor([[1.0, 2.0], [1.0, 2.0], [0.0, 0.0], [-3.0, 1.0]])
    for student in (pair, torch.ones(4, 2), torch.zeros(4, 2), 1e-30 * pair):
        for teacher in (STUDENT.float(), pair, torch.zeros(4, 2)):
            points = student.clone().requires_grad_()
            losses = loss(points, teacher)
            losses.sum().backward()
            assert torch.isfinite(losses).all()
            assert torch.isfinite(points.grad).all()


@every_loss
def test_coincident_samples_do_not_blow_up_the_gradient(loss):
    # A direction or a row of length 0 that is divided by a small number would get a gradient of 1e12.
    points = torch.tensor([[1.0, 2.0], [1.0, 2.0], [0.0, 0.0], [-3.0, 1.0]], requires_grad=True)
    loss(points, STUDENT.float()).sum().backward()
    assert points.grad.abs().max() < 10


@pytest.mark.parametrize("loss", RKD.values(), ids=RKD)
def test_many_close_samples_far_from_the_origin_keep_their_float32_precision(loss):
    # Distances of about 10 at 8000 from the origin: differences of squares would lose them, differences do not.
    student, teacher = ((1000 + embeddings(seed, 40, 64)).float() for seed in (0, 1))
    exact = loss(student.double(), teacher.double()).float()
    torch.testing.assert_close(loss(student, teacher), exact, atol=0, rtol=1e-5)


@every_loss
def test_one_sample_alone_has_no_relations(loss):
    torch.testing.assert_close(loss(embeddings(0, 1, 3), embeddings(1, 1, 3)), torch.zeros(1, dtype=torch.float64))


@every_loss
def test_half_precision_embeddings_whose_squares_overflow_give_the_float32_loss(loss):
    student, teacher = (100 * STUDENT).half(), (100 * TEACHER).half()
    losses = loss(student, teacher)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, loss(student.double(), teacher.double()).float())


@every_loss
def test_embeddings_of_different_samples_are_refused(loss):
    with pytest.raises(InputError, match="the same samples, got 4 and 3"):
        loss(STUDENT, TEACHER[:3])


@every_loss
def test_order_of_samples_does_not_matter(loss):
    student, teacher = embeddings(0, 6, 3), embeddings(1, 6, 4)
    order = torch.tensor([3, 0, 5, 2, 1, 4])
    torch.testing.assert_close(loss(student[order], teacher[order]), loss(student, teacher)[order])


@pytest.mark.parametrize("loss", RKD.values(), ids=RKD)
@fuzzed
@given(st.integers(0, 2**31), st.floats(1e-2, 1e2), st.floats(-10, 10))
def test_relational_losses_ignore_scale_place_and_rotation(loss, seed, scale, shift):
    student, teacher = embeddings(seed, 5, 3), embeddings(seed + 1, 5, 4)

    def moved(points):
        rotation = torch.linalg.qr(embeddings(seed + 2, points.shape[1], points.shape[1])).Q
        return scale * points @ rotation + shift

    expected = loss(student, teacher)
    # A shift of 10 beside points of 0.01 costs three of float64's sixteen digits.
    torch.testing.assert_close(loss(moved(student), teacher), expected, atol=1e-9, rtol=0)
    torch.testing.assert_close(loss(student, moved(teacher)), expected, atol=1e-9, rtol=0)


@fuzzed
@given(st.integers(0, 2**31), st.floats(1e-2, 1e2))
def test_similarity_loss_ignores_scale_and_rotation(seed, scale):
    student, teacher = embeddings(seed, 5, 3), embeddings(seed + 1, 5, 4)
    rotation = torch.linalg.qr(embeddings(seed + 2, 3, 3)).Q
    torch.testing.assert_close(similarity_loss(scale * student @ rotation, teacher), similarity_loss(student, teacher))
