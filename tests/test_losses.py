import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from compressor.losses import Kd, Losses, distillation_loss

# Inputs and float64 values of an independent numpy implementation (see "kd" and "BUG_" in the shared loss vectors).
STUDENT = torch.tensor([[2.0, 0.5, -1.0, 0.1], [0.3, 1.2, 0.0, -0.7], [-1.5, 0.4, 2.2, 0.9]], dtype=torch.float64)
TEACHER = torch.tensor([[3.0, 1.0, -2.0, 0.0], [0.0, 2.5, -0.5, -1.0], [-1.0, 0.0, 1.0, 3.0]], dtype=torch.float64)
TARGETS = torch.tensor([0, 1, 2])
KD_BY_TEMPERATURE = {1.0: 0.4320662781621569, 2.0: 0.5212837603676709, 4.0: 0.5016115334945849}
VECTORS = Path(__file__).parents[1] / "../shared/reference/loss_vectors.json"


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_distillation_loss_equals_the_reference(temperature):
    loss = distillation_loss(STUDENT, TEACHER, temperature=temperature)
    assert loss.shape == (3,)
    assert loss.mean().item() == pytest.approx(KD_BY_TEMPERATURE[temperature], abs=1e-12)  # float64 rounding


def test_distillation_loss_equals_the_shared_vectors():
    if not VECTORS.exists():
        pytest.skip(f"needs {VECTORS}")
    vectors = json.loads(VECTORS.read_text())
    for temperature in (1, 2, 4):
        loss = distillation_loss(STUDENT, TEACHER, temperature=temperature).mean().item()
        assert loss == pytest.approx(vectors[f"kd_T2kl_batchmean_T{temperature}"], abs=1e-12)


def test_distillation_loss_is_none_of_the_known_mistakes():
    if not VECTORS.exists():
        pytest.skip(f"needs {VECTORS}")
    vectors = json.loads(VECTORS.read_text())
    loss = distillation_loss(STUDENT, TEACHER, temperature=4.0).mean().item()
    mistakes = {name: value for name, value in vectors.items() if name.startswith("BUG_")}
    mistakes["no T2"] = vectors["kl_batchmean_T4"]
    assert len(mistakes) > 1
    for name, value in mistakes.items():
        assert loss != pytest.approx(value, rel=1e-3), name


def test_gradient_keeps_its_size_over_temperatures():
    # d/dz of T² KL is T (q - p); for large T it tends to the centred difference of logits / C.
    student = STUDENT.clone().requires_grad_()
    distillation_loss(student, TEACHER, temperature=1000.0).mean().backward()
    centred = (STUDENT - STUDENT.mean(1, keepdim=True)) - (TEACHER - TEACHER.mean(1, keepdim=True))
    torch.testing.assert_close(student.grad, centred / (4 * 3), atol=2e-3, rtol=0)  # the limit's error is O(1/T)


def test_weighted_kd_and_hard_losses_equal_the_reference():
    hard = torch.nn.functional.cross_entropy(STUDENT, TARGETS)
    mixed = 0.9 * distillation_loss(STUDENT, TEACHER, temperature=4.0).mean() + 0.1 * hard
    assert mixed.item() == pytest.approx(0.49650810068904, abs=1e-12)


def test_distillation_loss_stays_finite_on_saturated_logits():
    saturated = torch.tensor([[1e4, -1e4, 0.0]])
    assert torch.isfinite(distillation_loss(saturated, -saturated, temperature=1.0)).all()


def test_losses_without_any_loss_are_refused():
    with pytest.raises(ValidationError, match="at least one of kd, hard"):
        Losses()


def test_losses_that_are_left_out_have_no_weight():
    assert Losses(kd=Kd(weight=0.5)).weights == {"kd": 0.5}
