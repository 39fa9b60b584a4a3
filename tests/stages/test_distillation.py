import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from compressor import Samples, Task
from compressor.config.pipeline_file import load
from compressor.distillation.losses import Losses
from compressor.distillation.panel import Panel
from compressor.errors import ConfigError, InputError
from compressor.models.artifact import TorchModel
from compressor.references.reference import Reference
from compressor.run.pipeline import run
from compressor.stage import StageContext
from compressor.stages.distillation import Distillation
from compressor.stages.mutual_learning import MutualLearning, MutualObjective, Peers
from compressor.training.sampling import TrainingBatch
from compressor.training.settings import Optimizer

CPU = torch.device("cpu")
PLAIN = Reference(factory="networks:PlainNetwork")
RESIDUAL = Reference(factory="networks:ResidualNetwork")
STACKED = Reference(factory="networks:StackedNetwork")
SEQUENCE = Reference(factory="example_models:SequenceNetwork")
TIED = Reference(factory="networks:TiedNetwork")
SGD = Optimizer(name="sgd", learning_rate=0.1, momentum=0.0, weight_decay=0.0, schedule="constant", warmup=0.0)


class Applied:
    """What a stage gave, and what it told while it ran."""

    def __init__(self, stage, model: TorchModel, task: Task, work_dir: Path, *, seed: int = 0) -> None:
        self.lines: list[str] = []
        self.epochs: list[dict[str, float]] = []
        context = StageContext(
            model, CPU, seed, work_dir, self.lines.append, lambda told: self.epochs.append(told.means)
        )
        self.model = stage.apply(model, task, context)
        self.rehearsed = stage.rehearse(model, model, task)


@pytest.fixture
def apply(digits_task, tmp_path):
    """Apply a stage to a model and the first digits."""

    def applied(stage, model, task=None, **settings):
        return Applied(stage, model, task or few(digits_task), tmp_path, **settings)

    return applied


def few(task: Task, samples: int = 256) -> Task:
    return replace(task, train=Samples((task.train.inputs[0][:samples],), task.train.targets[:samples]))


def built(reference: Reference, seed: int = 0) -> TorchModel:
    return TorchModel.build(reference, seed=seed)


def parameters(model: TorchModel) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.module.parameters()])


def kd(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T² · KL(p ‖ q) as in Hinton's paper, with its own arithmetic, in float64."""
    p = F.softmax(teacher_logits.double() / temperature, dim=1)
    q = F.softmax(student_logits.double() / temperature, dim=1)
    return temperature**2 * (p * (p / q).log()).sum(dim=1)


# The student


def test_student_comes_from_its_factory(apply):
    found = apply(Distillation(student=RESIDUAL, epochs=1), built(PLAIN))
    assert found.model.factory == RESIDUAL
    assert type(found.model.module).__name__ == "ResidualNetwork"
    assert found.epochs[0].keys() == {"kd", "hard"}
    assert not torch.equal(parameters(found.model), parameters(built(RESIDUAL)))


def test_student_without_settings_is_a_new_network_of_the_teachers_kind(apply):
    teacher = built(TIED, seed=3)
    still = Optimizer(name="sgd", learning_rate=1e-30, weight_decay=0.0)
    found = apply(Distillation(epochs=1, optimizer=still), teacher, seed=7).model
    assert torch.equal(parameters(found), parameters(built(TIED, seed=8)))


def test_student_by_depth_keeps_layers_and_weights_of_its_teacher(apply):
    teacher = built(STACKED)
    still = Optimizer(name="sgd", learning_rate=1e-30, weight_decay=0.0)
    found = apply(Distillation(depth={"stack1": 2, "stack2": 3}, epochs=1, optimizer=still), teacher).model
    assert (len(found.module.stack1), len(found.module.stack2)) == (2, 3)
    assert torch.equal(found.module.stack1[1].conv.weight, teacher.module.stack1[5].conv.weight)
    assert torch.equal(found.module.head.weight, teacher.module.head.weight)
    assert len(teacher.module.stack1) == 6


def test_student_by_width_keeps_channels_and_weights_of_its_teacher(apply):
    teacher = built(PLAIN)
    still = Optimizer(name="sgd", learning_rate=1e-30, weight_decay=0.0)
    found = apply(Distillation(width=0.5, epochs=1, optimizer=still), teacher).model
    assert (found.module.conv1.out_channels, found.module.conv2.out_channels) == (8, 16)
    kept = found.module.conv1.weight.flatten(1).tolist()
    assert all(row in teacher.module.conv1.weight.flatten(1).tolist() for row in kept)


def test_student_by_depth_and_width_is_smaller_in_both(apply):
    stage = Distillation(depth={"stack*": 2}, width=0.5, epochs=1)
    found = apply(stage, built(STACKED))
    assert [len(found.model.module.stack1), len(found.model.module.stack2)] == [2, 2]
    assert found.model.module.stem.out_channels == 8
    left, foretold = (
        {name: tensor.shape for name, tensor in one.module.state_dict().items()}
        for one in (found.model, found.rehearsed)
    )
    assert left == foretold


def test_cut_student_is_saved_and_loads_with_equal_outputs(apply, digits_task, tmp_path):
    found = apply(Distillation(depth={"stack*": 3}, width=0.5, epochs=1), built(STACKED)).model
    (tmp_path / "model").mkdir()
    found.save(tmp_path / "model")
    loaded = TorchModel.load(tmp_path / "model")
    assert torch.equal(loaded.predict(digits_task.test.inputs), found.predict(digits_task.test.inputs))


def test_student_and_a_cut_of_the_teacher_exclude_each_other():
    for cut in ({"depth": {"stack1": 2}}, {"width": 0.5}):
        with pytest.raises(ValidationError, match="student must stand alone"):
            Distillation(student=PLAIN, epochs=1, **cut)


def test_layers_to_compare_may_be_those_a_cut_left(apply):
    losses = Losses.model_validate({"hint": {"layers": {"stack1.*": "stack1.[135]"}}, "kd": {}})
    found = apply(Distillation(depth={"stack1": 3}, losses=losses, epochs=1), built(STACKED))
    assert found.epochs[0].keys() == {"hint", "kd"}


# Generations and teachers


def test_each_generation_learns_from_the_one_before(apply):
    teacher = built(TIED, seed=9)
    settings = {"epochs": 1, "batch_size": 64}
    twice = apply(Distillation(student=SEQUENCE, generations=2, **settings), teacher, seed=5)
    first = apply(Distillation(student=SEQUENCE, **settings), teacher, seed=5)
    second = apply(Distillation(**settings), first.model, seed=6)
    assert not torch.equal(parameters(twice.model), parameters(first.model))
    assert torch.equal(parameters(twice.model), parameters(second.model))
    assert twice.epochs == first.epochs + second.epochs
    assert twice.model.factory == SEQUENCE


def test_born_again_student_of_a_cut_has_its_shape(apply):
    stage = Distillation(width=0.5, generations=2, epochs=1)
    found = apply(stage, built(PLAIN))
    assert found.model.module.conv1.out_channels == 8
    assert len(found.epochs) == 2


def test_another_teacher_may_be_named(apply, tmp_path):
    teacher = built(PLAIN, seed=4)
    (tmp_path / "teacher").mkdir()
    teacher.save(tmp_path / "teacher")
    file = tmp_path / "teacher/model.safetensors"
    reference = Reference(factory="networks:PlainNetwork", weights_file=file)
    named = apply(Distillation(student=SEQUENCE, teacher=reference, epochs=1), built(RESIDUAL)).model
    entering = apply(Distillation(student=SEQUENCE, epochs=1), teacher).model
    other = apply(Distillation(student=SEQUENCE, epochs=1), built(RESIDUAL)).model
    assert torch.equal(parameters(named), parameters(entering))
    assert not torch.equal(parameters(named), parameters(other))


def save_members(directory: Path) -> tuple[list[TorchModel], Reference]:
    """Two models, and a reference to their ensemble that counts the first three times."""
    members = [built(SEQUENCE, seed=1), built(TIED, seed=2)]
    named = []
    for position, member in enumerate(members):
        part = directory / f"member{position}"
        part.mkdir()
        member.save(part)
        named.append({"factory": member.factory.factory, "weights_file": str(part / "model.safetensors")})
    return members, Reference(factory="compressor:ensemble", members=named, weights=[3.0, 1.0])


@pytest.mark.parametrize("combine", ["mean_probability", "mean_logit", "separate"])
def test_ensemble_teaches_in_each_way(combine, apply, digits_task, tmp_path):
    members, reference = save_members(tmp_path)
    task = few(digits_task, 100)
    losses = Losses.model_validate({"kd": {"temperature": 2.0}})
    stage = Distillation(
        student=SEQUENCE, teacher=reference, combine=combine, losses=losses, epochs=1, batch_size=100, optimizer=SGD
    )
    found = apply(stage, built(PLAIN), task)
    logits = built(SEQUENCE).predict(task.train.inputs)
    one, other = (member.predict(task.train.inputs).double() for member in members)
    if combine == "separate":
        expected = 0.75 * kd(logits, one, 2.0) + 0.25 * kd(logits, other, 2.0)
    elif combine == "mean_logit":
        expected = kd(logits, 0.75 * one + 0.25 * other, 2.0)
    else:
        mean = 0.75 * F.softmax(one / 2, dim=1) + 0.25 * F.softmax(other / 2, dim=1)
        expected = kd(logits, 2 * mean.log(), 2.0)
    assert found.epochs == [{"kd": pytest.approx(expected.mean().item(), rel=1e-4)}]  # float32


def test_layers_of_an_ensembles_member_teach(apply, tmp_path):
    _, reference = save_members(tmp_path)
    losses = Losses.model_validate({"hint": {"layers": {"embedding": "members.0.query_key_value"}}, "hard": {}})
    found = apply(Distillation(student=SEQUENCE, teacher=reference, losses=losses, epochs=3), built(PLAIN))
    assert found.epochs[2]["hint"] < found.epochs[0]["hint"]


def test_unlabeled_samples_of_the_task_are_learned_from(apply, digits_task):
    task = replace(few(digits_task), unlabeled=Samples((digits_task.train.inputs[0][256:],), torch.zeros(1001)))
    with_them, without = (
        apply(Distillation(student=SEQUENCE, epochs=1, unlabeled_share=share), built(PLAIN), task).model
        for share in (None, 0.0)
    )
    assert not torch.equal(parameters(with_them), parameters(without))
    alone = apply(Distillation(student=SEQUENCE, epochs=1), built(PLAIN), few(digits_task)).model
    assert torch.equal(parameters(without), parameters(alone))


# Mutual learning


def peers(count: int) -> list[TorchModel]:
    return [built(reference, seed) for seed, reference in enumerate([SEQUENCE, TIED, SEQUENCE][:count])]


@pytest.mark.parametrize("combine", ["separate", "mean_probability", "mean_logit"])
@pytest.mark.parametrize("count", [2, 3])
def test_each_peer_learns_from_the_labels_and_from_the_others(count, combine, digits_task):
    students, task = peers(count), few(digits_task, 50)
    losses = Losses.model_validate({"kd": {"temperature": 2.0, "weight": 0.6}, "hard": {"weight": 0.4}})
    exchange = MutualObjective(losses, Panel((1 / (count - 1),) * (count - 1), combine), task)
    together = Peers([copy.deepcopy(student.module) for student in students])
    batch = TrainingBatch(task.train.inputs, task.train.targets, None, np.arange(50), np.zeros(50, int))
    values = exchange.losses(together, batch, 0.0)
    total = sum(weight * values[name].mean() for name, weight in exchange.weights(0.0).items())
    total.backward()
    answers = [student.predict(batch.inputs).double() for student in students]
    summed = 0.0
    for position, student in enumerate(students):
        others = [answer for i, answer in enumerate(answers) if i != position]
        logits = student.module(*batch.inputs)
        if combine == "separate":
            soft = sum(kd(logits, other, 2.0) for other in others) / len(others)
        elif combine == "mean_logit":
            soft = kd(logits, sum(others) / len(others), 2.0)
        else:
            soft = kd(logits, 2 * (sum(F.softmax(other / 2, dim=1) for other in others) / len(others)).log(), 2.0)
        alone = 0.6 * soft.mean() + 0.4 * F.cross_entropy(logits, batch.targets)
        summed += alone.item()
        # what a student learns is the gradient of its own loss: its peers' answers stand still
        for ours, theirs in zip(
            together.students[position].parameters(),
            torch.autograd.grad(alone, list(student.module.parameters())),
            strict=True,
        ):
            torch.testing.assert_close(ours.grad, theirs, rtol=1e-4, atol=1e-6)  # float32
    assert total.item() == pytest.approx(summed, rel=1e-5)


def test_first_step_of_three_peers_has_the_loss_of_the_formula(apply, digits_task):
    task = few(digits_task, 50)
    losses = Losses.model_validate({"kd": {"temperature": 2.0}, "hard": {}})
    stage = MutualLearning(students=(SEQUENCE, TIED, TIED), losses=losses, epochs=1, batch_size=50, optimizer=SGD)
    found = apply(stage, built(PLAIN), task, seed=4)
    students = [built(SEQUENCE, seed=4), built(TIED, seed=5), built(TIED, seed=6)]
    answers = [student.predict(task.train.inputs) for student in students]
    hard = sum(F.cross_entropy(answer, task.train.targets) for answer in answers)
    soft = sum(kd(one, other, 2.0).mean() for one in answers for other in answers) / 2  # one's own is 0
    assert found.epochs == [pytest.approx({"kd": soft.item() / 3, "hard": hard.item() / 3}, rel=1e-4)]  # float32


@pytest.mark.parametrize("count", [2, 3])
def test_first_of_the_students_leaves(count, apply, digits_task):
    references = (SEQUENCE, TIED, TIED)[:count]
    found = apply(MutualLearning(students=references, epochs=1), built(PLAIN), seed=3)
    assert found.model.factory == SEQUENCE
    assert type(found.model.module).__name__ == "SequenceNetwork"
    assert found.model.predict(digits_task.example_inputs).shape == (2, 10)
    assert not torch.equal(parameters(found.model), parameters(built(SEQUENCE, seed=3)))
    assert found.epochs[0].keys() == {"kd", "hard"}


def test_students_of_one_kind_start_from_different_weights(apply):
    stage = MutualLearning(students=(TIED, TIED), epochs=1, losses=Losses.model_validate({"kd": {"weight": 1.0}}))
    assert apply(stage, built(PLAIN)).epochs[0]["kd"] > 1e-4  # equal students would agree


def test_mutual_learning_changes_what_a_student_learns(apply):
    settings = {"students": (SEQUENCE, TIED), "epochs": 1}
    alone = Losses.model_validate({"hard": {"weight": 1.0}})
    together, apart = (
        apply(stage, built(PLAIN)).model
        for stage in (MutualLearning(**settings), MutualLearning(losses=alone, **settings))
    )
    assert not torch.allclose(parameters(together), parameters(apart), rtol=0, atol=1e-4)


def test_peers_learn_from_unlabeled_samples_too(digits_task):
    students, task = peers(2), few(digits_task, 50)
    exchange = MutualObjective(Losses.model_validate({"kd": {}, "hard": {}}), Panel((1.0,), "separate"), task)
    batch = TrainingBatch(task.train.inputs, task.train.targets[:20], None, np.arange(50), np.zeros(50, int))
    values = exchange.losses(Peers([student.module for student in students]), batch, 0.0)
    assert {name: len(value) for name, value in values.items()} == {"kd": 50, "hard": 20}


def test_losses_of_features_are_refused_among_peers():
    losses = Losses.model_validate({"hint": {"layers": {"head": "head"}}, "kd": {}})
    with pytest.raises(ValidationError, match="must compare answers among peers, got hint"):
        MutualLearning(students=(PLAIN, PLAIN), losses=losses, epochs=1)


def test_one_student_alone_is_refused():
    with pytest.raises(ValidationError, match="at least 2"):
        MutualLearning(students=(PLAIN,), epochs=1)


def test_born_again_student_does_not_start_where_its_teacher_started(apply):
    still = Optimizer(name="sgd", learning_rate=1e-30, weight_decay=0.0)
    teacher = built(TIED, seed=5)
    found = apply(Distillation(epochs=1, optimizer=still), teacher, seed=5).model
    assert not torch.equal(parameters(found), parameters(teacher))


def test_model_that_enters_learns_on_from_another_teacher(apply):
    still = Optimizer(name="sgd", learning_rate=1e-30, weight_decay=0.0)
    model = built(SEQUENCE, seed=5)
    found = apply(Distillation(teacher=PLAIN, epochs=1, optimizer=still), model).model
    torch.testing.assert_close(parameters(found), parameters(model), rtol=0, atol=1e-20)


@pytest.mark.parametrize("combine", ["mean_logit", "mean_probability"])
def test_ensemble_teaches_as_it_answers_unless_told_otherwise(combine, apply):
    members = [{"factory": "networks:TiedNetwork"}, {"factory": "example_models:SequenceNetwork"}]
    teacher = Reference(factory="compressor:ensemble", members=members, combine=combine)
    losses = Losses.model_validate({"kd": {}})
    settings = {"student": PLAIN, "teacher": teacher, "losses": losses, "epochs": 1}
    silent, told = (apply(Distillation(**settings, combine=how), built(PLAIN)).epochs for how in (None, combine))
    other = {"mean_logit": "mean_probability", "mean_probability": "mean_logit"}[combine]
    assert silent == told
    assert silent != apply(Distillation(**settings, combine=other), built(PLAIN)).epochs


def test_round_to_without_width_is_refused():
    with pytest.raises(ValidationError, match="round_to goes with width"):
        Distillation(round_to=4, epochs=1)


# Pipelines

CODE = """
import torch
from sklearn.datasets import load_digits
from torch import nn

from compressor import Samples, Task


def network(width=32):
    return nn.Sequential(
        nn.Conv2d(1, width, 3), nn.ReLU(), nn.Conv2d(width, width, 3), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4 * width, 10),
    )


def seven_classes():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 7))


def task():
    digits = load_digits()
    images = (torch.from_numpy(digits.images).float() / 16).unsqueeze(1)
    targets = torch.from_numpy(digits.target).long()

    def split(start, stop):
        return Samples((images[start:stop],), targets[start:stop])

    return Task(
        train=split(0, 600), validation=split(900, 1000), test=split(1400, 1797), calibration=split(0, 64),
        example_inputs=(images[:2],),
    )
"""
HEAD = "name: small\nmodel: {factory: taught:network}\ntask: {factory: taught:task}\nstages:\n"


def written(directory: Path, stages: str) -> Path:
    (directory / "taught.py").write_text(CODE)
    (directory / "small.yaml").write_text(HEAD + stages)
    return directory / "small.yaml"


MUTUAL = """
  - stage: mutual_learning
    students: [{factory: taught:network, width: 32}, {factory: taught:network, width: 16}]
    epochs: 6
    batch_size: 32
    optimizer: {learning_rate: 5.0e-3}
  - stage: distillation
    student: {factory: taught:network, width: 8}
    losses: {kd: {temperature: {start: 4, end: 1, shape: cosine}}, hint: {layers: {"0": "0"}}, hard: {weight: 0.2}}
    epochs: 4
    batch_size: 32
    optimizer: {learning_rate: 5.0e-3}
  - {stage: training, epochs: 1, batch_size: 32}
"""


def test_mutual_learning_makes_the_baseline_of_an_untrained_model_and_training_may_come_last(tmp_path):
    report = run(load(written(tmp_path, MUTUAL)), tmp_path / "runs", device=CPU, max_seconds=0)
    assert [row.stage for row in report.rows] == ["mutual_learning", "distillation", "training"]
    baseline, student, tuned = report.rows
    assert baseline.fidelity is None
    assert baseline.measurement.metrics["accuracy"] > 0.8
    assert student.fidelity.agreement > 0.7  # with the baseline
    assert student.measurement.parameters < baseline.measurement.parameters / 4
    assert [set(row.losses[0]) for row in report.rows] == [{"kd", "hard"}, {"kd", "hint", "hard"}, {"hard"}]
    assert [len(row.losses) for row in report.rows] == [6, 4, 1]
    assert tuned.measurement.metrics["accuracy"] > 0.5  # the labels alone, for one epoch
    written_down = json.loads((tmp_path / "runs/report.json").read_text())
    assert written_down["rows"][1]["losses"][-1]["hint"] < written_down["rows"][1]["losses"][0]["hint"]


@pytest.mark.parametrize(
    ("stage", "complaint"),
    [
        pytest.param("student: {factory: taught:seven_classes}", r"\(2, 10\), got \(2, 7\)", id="student"),
        pytest.param("teacher: {factory: taught:seven_classes}", r"\(2, 10\), got \(2, 7\)", id="teacher"),
        pytest.param(
            "teacher: {factory: compressor:ensemble, members: [{factory: taught:seven_classes}]}",
            r"\(2, 10\), got \(2, 7\)",
            id="ensemble",
        ),
        pytest.param(
            "losses: {hint: {layers: {conv: '0'}}}",
            "must have a layer 'conv'",
            id="layer",
        ),
        pytest.param("depth: {'9': 2}", "must have a layer '9'", id="stack"),
        pytest.param("unlabeled_share: 0.5", "the task must have an unlabeled split", id="unlabeled"),
    ],
)
def test_distillation_that_cannot_work_is_refused_before_any_stage_runs(tmp_path, stage, complaint):
    file = written(
        tmp_path, f"  - {{stage: training, epochs: 1}}\n  - stage: distillation\n    epochs: 1\n    {stage}\n"
    )
    with pytest.raises(InputError, match=complaint):
        run(load(file), tmp_path / "runs", device=CPU, max_seconds=0)
    assert not list((tmp_path / "runs").glob("stages/*"))


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        pytest.param(
            "[{factory: taught:network}, {factory: taught:network}]\n    losses: {hint: {layers: {'0': '0'}}}",
            "losses must compare answers among peers, got hint",
            id="features",
        ),
        pytest.param("[{factory: taught:network}]", "students must have at least 2 items", id="one-student"),
    ],
)
def test_faults_of_mutual_learning_are_told_with_their_place(tmp_path, settings, problem):
    file = written(tmp_path, f"  - stage: mutual_learning\n    epochs: 1\n    students: {settings}\n")
    with pytest.raises(ConfigError, match=rf"small\.yaml:\d+:\d+: .*{problem}"):
        load(file)


def test_peers_of_other_classes_are_refused_before_any_stage_runs(tmp_path):
    students = "[{factory: taught:network}, {factory: taught:seven_classes}]"
    file = written(tmp_path, f"  - stage: mutual_learning\n    epochs: 1\n    students: {students}\n")
    with pytest.raises(InputError, match=r"\(2, 10\), got \(2, 7\)"):
        run(load(file), tmp_path / "runs", device=CPU, max_seconds=0)
    assert not list((tmp_path / "runs").glob("stages/*"))
