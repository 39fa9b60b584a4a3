import json

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from compressor.config.pipeline_file import load
from compressor.distillation.distil import DistillationObjective
from compressor.distillation.feature import attention_transfer_loss, hint_loss
from compressor.distillation.learner import Learner
from compressor.distillation.losses import Hard, Losses
from compressor.distillation.panel import Panel
from compressor.distillation.relation import relational_angle_loss, relational_distance_loss, similarity_loss
from compressor.distillation.response import (
    correlation_loss,
    decoupled_distillation_loss,
    distillation_loss,
    jensen_shannon_loss,
    logit_mse,
    reverse_distillation_loss,
    soft_cross_entropy,
    standardize,
)
from compressor.distillation.teachers import Answers
from compressor.errors import ConfigError
from compressor.training.sampling import TrainingBatch

# Inputs and float64 values of an independent numpy implementation, shared/reference/loss_vectors.py.
STUDENT = torch.tensor([[2.0, 0.5, -1.0, 0.1], [0.3, 1.2, 0.0, -0.7], [-1.5, 0.4, 2.2, 0.9]], dtype=torch.float64)
TEACHER = torch.tensor([[3.0, 1.0, -2.0, 0.0], [0.0, 2.5, -0.5, -1.0], [-1.0, 0.0, 1.0, 3.0]], dtype=torch.float64)
TARGETS = torch.tensor([0, 1, 2])
MIXED = {
    "mixA_alpha0.9_T4": 0.4965081006890216,
    "mixB_lambda0.5_T2_noT2": 0.29044907276543497,
    "mixB_lambda0.5_T2_withT2": 0.48593048290331153,
    # λ · soft_ce_T1 + (1 - λ) · kl_batchmean_T1 with λ = 0.3
    "cross-entropy-and-divergence": 0.3 * 0.9979199841260233 + 0.7 * 0.4320662781621569,
}
SETTINGS = {
    "mixA_alpha0.9_T4": {"kd": {"temperature": 4, "weight": 0.9}, "hard": {"weight": 0.1}},
    "mixB_lambda0.5_T2_noT2": {
        "kd": {"temperature": 2, "weight": 0.5, "temperature_squared": False},
        "hard": {"weight": 0.5},
    },
    "mixB_lambda0.5_T2_withT2": {"kd": {"temperature": 2, "weight": 0.5}, "hard": {"weight": 0.5}},
    "cross-entropy-and-divergence": {
        "soft_cross_entropy": {"temperature": 1, "weight": 0.3},
        "kd": {"temperature": 1, "weight": 0.7},
    },
}
# What common mistakes give instead of T² times the sum over classes: by temperature, the mean over classes.
MISTAKES = {
    "BUG_kl_mean_T1": (1, 0.10801656954053923),
    "BUG_kl_mean_T2_T1": (1, 0.10801656954053923),
    "BUG_kl_mean_T2": (2, 0.03258023502297943),
    "BUG_kl_mean_T2_T2": (2, 0.13032094009191772),
    "BUG_kl_mean_T4": (4, 0.007837680210852889),
    "BUG_kl_mean_T2_T4": (4, 0.12540288337364622),
}
KD = {1: 0.4320662781621569, 2: 0.5212837603676709, 4: 0.5016115334945849}

RESPONSES = [
    ("kd", {}, lambda s, t, _: distillation_loss(s, t, temperature=4.0)),
    ("kd", {"temperature": 2}, lambda s, t, _: distillation_loss(s, t, temperature=2.0)),
    (
        "kd",
        {"temperature": 2, "temperature_squared": False},
        lambda s, t, _: distillation_loss(s, t, temperature=2.0, temperature_squared=False),
    ),
    (
        "kd",
        {"temperature": 2, "standardize": True},
        lambda s, t, _: distillation_loss(standardize(s), standardize(t), temperature=2.0),
    ),
    ("soft_cross_entropy", {"temperature": 3.5}, lambda s, t, _: soft_cross_entropy(s, t, temperature=3.5)),
    ("reverse_kl", {"temperature": 2}, lambda s, t, _: reverse_distillation_loss(s, t, temperature=2.0)),
    ("jsd", {}, lambda s, t, _: jensen_shannon_loss(s, t, beta=0.5, temperature=4.0)),
    (
        "jsd",
        {"beta": 0.9, "temperature": 2},
        lambda s, t, _: jensen_shannon_loss(s, t, beta=0.9, temperature=2.0),
    ),
    ("dkd", {}, lambda s, t, y: decoupled_distillation_loss(s, t, y, alpha=1.0, beta=2.0, temperature=4.0)),
    (
        "dkd",
        {"alpha": 0.5, "beta": 8, "temperature": 1, "standardize": True},
        lambda s, t, y: decoupled_distillation_loss(
            standardize(s), standardize(t), y, alpha=0.5, beta=8.0, temperature=1.0
        ),
    ),
    ("dist", {}, lambda s, t, _: correlation_loss(s, t, inter=1.0, intra=1.0, temperature=1.0)),
    (
        "dist",
        {"inter": 2, "intra": 0, "temperature": 4},
        lambda s, t, _: correlation_loss(s, t, inter=2.0, intra=0.0, temperature=4.0),
    ),
    ("logit_mse", {}, lambda s, t, _: logit_mse(s, t)),
    ("logit_mse", {"temperature": 2}, lambda s, t, _: logit_mse(s, t) / 4),
]
FEATURES = [
    ("hint", {}, hint_loss),
    ("attention_transfer", {}, lambda s, t: attention_transfer_loss(s, t, normalization="mean_square")),
    ("attention_distance", {}, lambda s, t: attention_transfer_loss(s, t, normalization="euclidean")),
    ("rkd_distance", {}, relational_distance_loss),
    ("rkd_angle", {}, relational_angle_loss),
    ("similarity_preserving", {}, similarity_loss),
]


def from_json(settings) -> Losses:
    return Losses.model_validate_json(json.dumps(settings))


def names(rows):
    return ["-".join([name, *settings]) for name, settings, _ in rows]


def of_objective(settings, task) -> dict[str, torch.Tensor]:
    """What the student learns to lower, for a network that answers its inputs unchanged: value by name, and total."""
    losses = from_json(settings)
    identity = nn.Linear(4, 4, bias=False)
    nn.init.eye_(identity.weight)
    objective = DistillationObjective(
        losses, {}, lambda _: Answers([TEACHER.float()], {}), Panel((1.0,), "mean_probability"), task
    )
    values = objective.losses(
        Learner(identity, {}, {}), TrainingBatch((STUDENT.float(),), TARGETS, None, np.arange(3), np.zeros(3, int)), 0
    )
    means = {name: value.mean() for name, value in values.items()}
    return {**means, "total": sum(weight * means[name] for name, weight in objective.weights(0).items())}


@pytest.mark.parametrize(("name", "settings", "expected"), RESPONSES, ids=names(RESPONSES))
def test_comparison_of_logits_is_the_function_it_stands_for(name, settings, expected):
    loss = from_json({name: settings}).of_responses[name]
    compared = loss.compare(STUDENT, TEACHER, TARGETS, loss.temperature_at(0.5, "classes"))
    assert compared.shape == (3,)
    torch.testing.assert_close(compared, expected(STUDENT, TEACHER, TARGETS), rtol=0, atol=1e-15)


@pytest.mark.parametrize(("name", "settings", "expected"), FEATURES, ids=names(FEATURES))
def test_comparison_of_features_is_the_function_it_stands_for(name, settings, expected):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(5, 3, 4, 4, generator=generator) for _ in range(2))
    loss = from_json({name: {"layers": {"conv1": "conv2"}, **settings}}).of_features[name]
    compared = loss.compare(student, teacher)
    assert compared.shape == (5,)
    assert torch.equal(compared, expected(student, teacher))


def test_every_name_is_among_those_compared_here():
    assert {name for name, *_ in RESPONSES + FEATURES} | {"hard"} == set(Losses.model_fields)


def test_only_losses_with_a_target_class_need_labels():
    needy = {name for name, *_ in RESPONSES if from_json({name: {}}).of_responses[name].needs_targets}
    assert needy == {"dkd"}


def test_only_hints_pass_a_regressor():
    made = {name: from_json({name: {"layers": {"a": "b"}}}).of_features[name] for name, *_ in FEATURES}
    assert [name for name, loss in made.items() if loss.regresses] == ["hint"]


@pytest.mark.parametrize("name", MIXED)
def test_mixture_of_losses_equals_the_reference(name, digits_task):
    # the objective computes in float32; T² of 16 multiplies its rounding
    assert of_objective(SETTINGS[name], digits_task)["total"].item() == pytest.approx(MIXED[name], rel=1e-5)


@pytest.mark.parametrize("name", MISTAKES)
def test_objective_does_not_make_a_well_known_mistake(name, digits_task):
    temperature, mistake = MISTAKES[name]
    found = of_objective({"kd": {"temperature": temperature, "weight": 1}}, digits_task)["total"].item()
    assert found == pytest.approx(KD[temperature], rel=1e-5)
    assert abs(found - mistake) > 0.1 * mistake


def test_objective_standardizes_with_one_degree_of_freedom_less(digits_task):
    found = of_objective({"kd": {"temperature": 2, "standardize": True}}, digits_task)["kd"].item()
    assert found == pytest.approx(0.13084453334665283, rel=1e-5)  # ls_kd_T2_ddof1, float32
    assert abs(found - 0.1778218326081459) > 0.01  # ls_kd_T2_ddof0, the mistake


def test_weights_are_given_by_name_for_the_losses_that_take_part():
    losses = from_json({"hard": {}, "kd": {"weight": {"start": 1, "end": 0}}, "dist": {"weight": 3}})
    assert losses.weights(0.0) == {"hard": 0.1, "kd": 1.0, "dist": 3.0}
    assert losses.weights(0.25) == {"hard": 0.1, "kd": 0.75, "dist": 3.0}
    assert list(losses.terms) == ["hard", "kd", "dist"]
    assert isinstance(losses.terms["hard"], Hard)


def test_settings_survive_json():
    losses = from_json(
        {name: settings for name, settings, _ in RESPONSES}
        | {name: {"layers": {"conv*": "layer?"}, **settings} for name, settings, _ in FEATURES}
        | {"hard": {"weight": {"start": 0, "end": 1, "shape": "cosine"}}}
    )
    assert set(losses.terms) == set(Losses.model_fields)
    assert Losses.model_validate_json(losses.model_dump_json()) == losses


@pytest.mark.parametrize(
    ("losses", "problem"),
    [
        pytest.param("{kdd: {}}", "7:14: unknown key 'kdd' in stages.0.losses; did you mean 'kd'?", id="unknown-loss"),
        pytest.param("{}", "7:13: stages.0.losses: losses must name at least one of hard, kd, soft", id="no-loss"),
        pytest.param("{kd: {weight: 0}}", "losses.kd.weight must be greater than 0", id="no-weight"),
        pytest.param("{kd: {weight: {start: 0, end: 0}}}", "start or end must be greater than 0", id="no-weight-ever"),
        pytest.param("{kd: {temperature: -1}}", "kd.temperature must be greater than 0", id="negative-temperature"),
        pytest.param("{kd: {temprature: 2}}", "losses.kd; did you mean 'temperature'?", id="unknown-setting"),
        pytest.param("{kd: {layers: {a: b}}}", "unknown key 'layers' in stages.0.losses.kd", id="layers-of-logits"),
        pytest.param("{hard: {temperature: 2}}", "'temperature' in stages.0.losses.hard", id="temperature-of-labels"),
        pytest.param("{jsd: {beta: 1}}", "losses.jsd.beta must be less than 1", id="beta"),
        pytest.param("{hint: {}}", "stages.0.losses.hint needs the key 'layers'", id="layers-missing"),
        pytest.param("{hint: {layers: {}}}", "losses.hint.layers must have at least 1 item", id="no-layers"),
        pytest.param("{hint: {layers: conv1}}", "losses.hint.layers must be a mapping, got 'conv1'", id="one-layer"),
    ],
)
def test_faults_in_a_pipeline_file_are_told_with_their_place(tmp_path, losses, problem):
    file = tmp_path / "faulty.yaml"
    file.write_text(
        "name: faulty\nmodel: {factory: networks:PlainNetwork}\ntask: {factory: networks:not_a_module}\n"
        f"stages:\n  - stage: distillation\n    epochs: 1\n    losses: {losses}\n"
    )
    with pytest.raises(ConfigError) as caught:
        load(file)
    assert problem in str(caught.value)


def test_loss_without_settings_is_refused_rather_than_left_out():
    with pytest.raises(ValidationError, match=r"kd must be a mapping, \{\} for its defaults"):
        Losses.model_validate_json('{"kd": null, "hard": {}}')


def test_losses_write_the_ones_that_take_part_and_no_others():
    losses = Losses.model_validate({"kd": {"weight": 0.5}, "hard": {}})
    assert json.loads(losses.model_dump_json()).keys() == {"kd", "hard"}
    assert Losses.model_validate_json(losses.model_dump_json()) == losses
