import copy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressor import Augmentation, Samples, Task
from compressor.distillation.distil import DistillationObjective, Student, distil
from compressor.distillation.distillation_settings import DistillationSettings
from compressor.distillation.learner import Learner, build_learner, layer_pairs
from compressor.distillation.losses import Losses
from compressor.distillation.panel import Panel
from compressor.distillation.setup import check_fit, training_data
from compressor.distillation.teachers import LiveTeacher
from compressor.errors import InputError
from compressor.export.to_onnx import to_onnx
from compressor.models.artifact import TorchModel
from compressor.references.reference import Reference
from compressor.stage import StageContext
from compressor.training.fit import fit
from compressor.training.sampling import TrainingBatch, TrainingData
from compressor.training.settings import Optimizer, TrainingSettings

CPU = torch.device("cpu")
SGD = Optimizer(name="sgd", learning_rate=0.1, momentum=0.0, weight_decay=0.0, schedule="constant", warmup=0.0)
PLAIN = Reference(factory="networks:PlainNetwork")
RESIDUAL = Reference(factory="networks:ResidualNetwork")
STACKED = Reference(factory="networks:StackedNetwork")
SEQUENCE = Reference(factory="example_models:SequenceNetwork")
HINT = {"hint": {"layers": {"pointwise": "conv2"}}}
"""From 16 channels to 32."""


class LinearNetwork(nn.Module):
    """The smallest classifier of digits: one minimum, no layer that knows other samples."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1))


class RowNetwork(nn.Module):
    """A class for each of the 8 rows, (N, 10, 8), each from that row alone."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(8, 16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.hidden(x.squeeze(1)))).transpose(1, 2)


class ForgetfulNetwork(LinearNetwork):
    """It has a layer that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.forgotten = nn.Linear(3, 3)


LINEAR, ROWS, FORGETFUL = (
    Reference(factory=f"{__name__}:{name}") for name in ("LinearNetwork", "RowNetwork", "ForgetfulNetwork")
)


def asking(losses, **changes) -> DistillationSettings:
    return DistillationSettings(**{"losses": losses, "epochs": 1, "batch_size": 64, **changes})


class Distillation:
    """A call of `distil`, with what it logs and records."""

    def __init__(self, student: TorchModel, teacher: TorchModel, task: Task, work_dir, losses, **changes) -> None:
        self.lines: list[str] = []
        self.epochs: list[dict[str, float]] = []
        self.models = Student.of(student), teacher, task
        self.context = StageContext(
            teacher, CPU, 0, work_dir, self.lines.append, lambda told: self.epochs.append(told.means)
        )
        self.settings = asking(losses, **changes)

    def run(self) -> "Distillation":
        self.module = distil(*self.models, self.settings, self.context)
        return self


@pytest.fixture
def distilled(digits_task, tmp_path):
    """Run `distil` on the digits, or on another task."""

    def run(student, teacher, losses, task=digits_task, **changes):
        return Distillation(student, teacher, task, tmp_path, losses, **changes).run()

    return run


def few(task: Task, samples: int) -> Task:
    return replace(task, train=Samples((task.train.inputs[0][:samples],), task.train.targets[:samples]))


def half_unlabeled(task: Task, samples: int) -> Task:
    """As many labeled samples as unlabeled ones, whose targets say nothing."""
    images = task.train.inputs[0]
    labeled = Samples((images[:samples],), task.train.targets[:samples])
    return replace(task, train=labeled, unlabeled=Samples((images[-samples:],), torch.full((samples,), 12345)))


def kd(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T² · KL(p ‖ q) as in Hinton's paper, with its own arithmetic, in float64."""
    p = F.softmax(teacher_logits.double() / temperature, dim=1)
    q = F.softmax(student_logits.double() / temperature, dim=1)
    return temperature**2 * (p * (p / q).log()).sum(dim=1)


def parameters(module: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def objective(losses, student: nn.Module, teacher: TorchModel, task: Task) -> tuple[DistillationObjective, Learner]:
    """What `distil` gives to `fit`."""
    settings = Losses.model_validate(losses)
    pairs = layer_pairs(settings, student, teacher.module)
    live = LiveTeacher.of(teacher, [path for of_loss in pairs.values() for _, path in of_loss], CPU)
    agreement = DistillationObjective(settings, pairs, live, Panel((1.0,), "mean_probability"), task)
    return agreement, build_learner(student, teacher.module, settings, pairs, task.example_inputs, seed=0)


def whole_batch(split: Samples) -> TrainingBatch:
    return TrainingBatch(split.inputs, split.targets, None, np.arange(len(split)), np.zeros(len(split), int))


# Responses


def test_student_that_is_its_teacher_has_no_loss_and_stays(distilled):
    teacher = TorchModel.build(SEQUENCE, seed=0)
    found = distilled(teacher, teacher, {"kd": {"weight": 1.0}}, epochs=3, optimizer=SGD)
    # Gradients p - q of equal logits are rounding, 1e-7, over 57 steps of size 0.1.
    torch.testing.assert_close(parameters(found.module), parameters(teacher.module), rtol=0, atol=1e-6)
    assert found.epochs[0]["kd"] == pytest.approx(0, abs=1e-6)


def test_teacher_and_student_are_left_as_they_were(distilled):
    teacher, student = (TorchModel.build(reference, seed=0) for reference in (PLAIN, RESIDUAL))
    before = [copy.deepcopy(model.module.state_dict()) for model in (teacher, student)]
    distilled(student, teacher, {"kd": {}, "hard": {}, **HINT})
    for model, state in zip((teacher, student), before, strict=True):
        assert not model.module.training
        assert all(parameter.requires_grad for parameter in model.module.parameters())
        assert not any(layer._forward_hooks for layer in model.module.modules())
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.module.state_dict().items())


def test_first_step_has_the_loss_of_the_formula(digits_task, distilled):
    task = few(digits_task, 100)
    student, teacher = (TorchModel.build(LINEAR, seed=seed) for seed in (0, 1))
    found = distilled(student, teacher, {"kd": {"temperature": 2.0}, "hard": {}}, task=task, batch_size=100)
    logits, theirs = (model.predict(task.train.inputs) for model in (student, teacher))
    expected = {
        "hard": F.cross_entropy(logits, task.train.targets).item(),
        "kd": kd(logits, theirs, 2.0).mean().item(),
    }
    assert found.epochs == [pytest.approx(expected, rel=1e-4)]  # float32


def test_teacher_sees_the_view_that_the_student_sees(digits_task, distilled):
    turned = Augmentation(1, lambda inputs, _: (inputs[0].flip(3),))
    task = replace(few(digits_task, 100), augmentation=turned)
    student, teacher = (TorchModel.build(LINEAR, seed=seed) for seed in (0, 1))
    found = distilled(student, teacher, {"kd": {"temperature": 2.0}}, task=task, batch_size=100)
    views = (task.train.inputs[0].flip(3),)
    expected = kd(student.predict(views), teacher.predict(views), 2.0).mean().item()
    assert found.epochs[0]["kd"] == pytest.approx(expected, rel=1e-4)


def test_teacher_answers_as_in_evaluation_whatever_its_mode(digits_task, distilled):
    task = few(digits_task, 100)
    student, teacher = TorchModel.build(LINEAR, seed=0), TorchModel.build(PLAIN, seed=1)
    answers = teacher.predict(task.train.inputs)
    teacher.module.train()
    found = distilled(student, teacher, {"kd": {}}, task=task, batch_size=100)
    expected = kd(student.predict(task.train.inputs), answers, 4.0).mean().item()
    assert found.epochs == [{"kd": pytest.approx(expected, rel=1e-4)}]
    assert teacher.module.bn1.num_batches_tracked == 0


def test_student_answers_as_its_teacher_does_at_temperature_1(digits_task, distilled):
    teacher = TorchModel.build(LINEAR, seed=1)
    teacher.module.head.weight.data *= 8
    student = TorchModel.build(LINEAR, seed=0)
    losses = {"kd": {"temperature": 4.0, "weight": 1.0}}
    settings = {"epochs": 30, "optimizer": Optimizer(learning_rate=2e-2, weight_decay=0.0)}
    trained = distilled(student, teacher, losses, **settings).module
    images = digits_task.test.inputs[0]
    with torch.no_grad():
        answers, theirs = F.softmax(trained(images), dim=1), F.softmax(teacher.module(images), dim=1)
    softened = F.softmax(teacher.predict((images,)) / 4, dim=1)
    assert (answers - theirs).abs().mean() < 0.01
    assert (softened - theirs).abs().mean() > 0.05  # what a student that kept its temperature would miss


def test_distilled_model_is_its_own_forward_and_nothing_else(digits_task, distilled, tmp_path):
    student, teacher = TorchModel.build(RESIDUAL, seed=0), TorchModel.build(PLAIN, seed=0)
    trained = distilled(student, teacher, {"kd": {"temperature": 8.0}, "hard": {}, **HINT}).module
    fresh = TorchModel.build(RESIDUAL, seed=5).module
    assert type(trained) is type(fresh)
    assert not trained.training
    assert trained.state_dict().keys() == fresh.state_dict().keys()
    fresh.load_state_dict(trained.state_dict())
    images = digits_task.test.inputs
    logits = TorchModel(trained, RESIDUAL).predict(images)
    assert torch.equal(fresh.eval()(*images), logits)
    exported = to_onnx(trained, digits_task, tmp_path / "student.onnx")
    torch.testing.assert_close(exported.predict(images), logits, rtol=0, atol=1e-5)  # float32 in another order


def test_without_a_loss_that_asks_the_teacher_it_is_not_run(distilled):
    class Refusing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError

    teacher = TorchModel(Refusing(), LINEAR)
    student = TorchModel.build(LINEAR, seed=0)
    found = distilled(student, teacher, {"hard": {}})
    assert list(found.epochs[0]) == ["hard"]


# Schedules


class Recorded:
    """An objective that keeps the weights and values it gives."""

    def __init__(self, objective: DistillationObjective) -> None:
        self.objective = objective
        self.given: list[dict[str, float]] = []
        self.progress: list[float] = []

    def weights(self, progress):
        self.given.append(dict(self.objective.weights(progress)))
        return self.objective.weights(progress)

    def losses(self, module, batch, progress):
        self.progress.append(progress)
        return self.objective.losses(module, batch, progress)


def test_weights_follow_their_course_from_the_first_step_to_the_last(digits_task):
    student, teacher = (TorchModel.build(LINEAR, seed=seed) for seed in (0, 1))
    losses = {"kd": {"weight": {"start": 1.0, "end": 0.0}}, "hard": {"weight": {"start": 0.0, "end": 2.0}}}
    agreement, learning = objective(losses, student.module, teacher, digits_task)
    recorded = Recorded(agreement)
    settings = TrainingSettings(epochs=2, batch_size=256, optimizer=SGD)
    fit(learning, recorded, TrainingData(digits_task.train), settings, StageContext(teacher, CPU, 0, Path(), print))
    steps = 8
    assert recorded.progress == [step / (steps - 1) for step in range(steps)]
    assert recorded.given[0] == {"hard": 0.0, "kd": 1.0}
    assert recorded.given[-1] == {"hard": 2.0, "kd": 0.0}
    for step, weights in enumerate(recorded.given):
        assert weights == pytest.approx({"hard": 2 * step / 7, "kd": 1 - step / 7})


@pytest.mark.parametrize("setting", ["weight", "temperature"])
@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_course_that_stays_gives_the_weights_of_the_constant_and_one_that_moves_others(setting, shape, distilled):
    student, teacher = (TorchModel.build(LINEAR, seed=seed) for seed in (0, 1))

    def trained(value) -> Tensor:
        losses = {"kd": {setting: value}, "hard": {"weight": 0.5}}
        return parameters(distilled(student, teacher, losses, optimizer=SGD).module)

    constant, staying, moving = (
        trained(value) for value in (1.3, *({"start": 1.3, "end": end, "shape": shape} for end in (1.3, 6.0)))
    )
    assert torch.equal(staying, constant)
    assert not torch.allclose(moving, constant, rtol=0, atol=1e-4)


# Features


def test_regressors_are_trained_and_stay_behind(digits_task, distilled):
    student, teacher = TorchModel.build(RESIDUAL, seed=0), TorchModel.build(PLAIN, seed=0)
    agreement, learning = objective({**HINT, "kd": {}}, student.module, teacher, digits_task)
    settings, context = TrainingSettings(epochs=1, batch_size=64), StageContext(teacher, CPU, 0, Path(), print)
    trained = fit(learning, agreement, TrainingData(digits_task.train), settings, context)
    before, after = parameters(learning.regressors), parameters(trained.regressors)
    assert len(before) == 16 * 32 + 32  # a 1 x 1 convolution
    assert (before - after).abs().min() > 0
    same = distilled(student, teacher, {**HINT, "kd": {}}).module
    assert torch.equal(parameters(same), parameters(trained.student))


def test_hint_brings_features_closer(distilled):
    student, teacher = TorchModel.build(RESIDUAL, seed=0), TorchModel.build(PLAIN, seed=0)
    epochs = distilled(student, teacher, HINT, epochs=3, optimizer=Optimizer(learning_rate=1e-2)).epochs
    assert epochs[2]["hint"] < epochs[0]["hint"] / 2


def test_layers_named_by_a_glob_are_compared_pair_by_pair(digits_task):
    student, teacher = (TorchModel.build(STACKED, seed=seed) for seed in (0, 1))
    losses = {"hint": {"layers": {"stack1.*": "stack2.*"}}, "attention_transfer": {"layers": {"stem": "stem"}}}
    agreement, learning = objective(losses, student.module, teacher, digits_task)
    batch = whole_batch(few(digits_task, 20).train)
    learning.eval()
    with torch.no_grad():
        found = agreement.losses(learning, batch, 0.0)
        ours, theirs = student.module.stem(*batch.inputs), teacher.module.stem(*batch.inputs)
        maps = [F.normalize(stem.square().sum(dim=1).flatten(1), dim=1) for stem in (ours, theirs)]
        expected, theirs = torch.zeros(20), teacher.module.stack1(theirs)
        for block, other in zip(student.module.stack1, teacher.module.stack2, strict=True):
            ours, theirs = block(ours), other(theirs)
            expected += (ours - theirs).square().mean(dim=(1, 2, 3))
    assert not any(parameter.numel() for parameter in learning.regressors.parameters())  # channels are equal
    torch.testing.assert_close(found["hint"], expected)
    torch.testing.assert_close(found["attention_transfer"], (maps[0] - maps[1]).square().mean(dim=1))


def test_blocks_of_a_residual_network_are_paired_by_glob_whatever_their_size(distilled):
    images = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    split = Samples((images,), torch.arange(64) % 10)
    task = Task(split, split, split, split, example_inputs=(images[:2],))
    student, teacher = (
        TorchModel.build(Reference(factory="example_models:CifarResNet", blocks=i), seed=i) for i in (1, 2)
    )
    layers = {"layer?.0.conv1": "layer?.1.conv2", "conv1": "layer3.0"}
    losses = {"hint": {"layers": layers}, "attention_transfer": {"layers": layers}, "kd": {}}
    agreement, learning = objective(losses, student.module, teacher, task)
    assert agreement.pairs["hint"] == (
        *((f"layer{i}.0.conv1", f"layer{i}.1.conv2") for i in (1, 2, 3)),
        ("conv1", "layer3.0"),  # (16, 32, 32) to (64, 8, 8)
    )
    assert [sum(p.numel() for p in one.parameters()) for one in learning.regressors["hint"]] == [0, 0, 0, 16 * 64 + 64]
    found = distilled(student, teacher, losses, task=task, epochs=2, batch_size=16)
    assert found.epochs[1]["hint"] < found.epochs[0]["hint"]
    assert found.module.state_dict().keys() == student.module.state_dict().keys()


def test_features_of_tokens_pass_a_linear_regressor(digits_task, distilled):
    student, teacher = (TorchModel.build(SEQUENCE, seed=seed) for seed in (0, 1))
    losses = {"hint": {"layers": {"embedding": "query_key_value", "norm": "norm"}}}
    agreement, learning = objective(losses, student.module, teacher, digits_task)
    regressors = [one.channels for one in learning.regressors["hint"]]
    assert [type(one) for one in regressors] == [nn.Linear, nn.Identity]
    batch = whole_batch(few(digits_task, 20).train)
    with torch.no_grad():
        found = agreement.losses(learning, batch, 0.0)["hint"]
        rows = batch.inputs[0].squeeze(1)
        ours, theirs = (model.module.embedding(rows) for model in (student, teacher))
        norms = [model.module.norm(tokens) for model, tokens in ((student, ours), (teacher, theirs))]
        first = (regressors[0](ours) - teacher.module.query_key_value(norms[1])).square().mean(dim=(1, 2))
        second = (norms[0] - norms[1]).square().mean(dim=(1, 2))
    torch.testing.assert_close(found, first + second)
    epochs = distilled(student, teacher, losses, epochs=3, optimizer=Optimizer(learning_rate=1e-2)).epochs
    assert epochs[2]["hint"] < epochs[0]["hint"]


@pytest.mark.parametrize("name", ["hint", "attention_transfer", "rkd_distance", "rkd_angle", "similarity_preserving"])
def test_loss_of_features_teaches_beside_the_labels(name, digits_task, distilled):
    student, teacher = TorchModel.build(RESIDUAL, seed=0), TorchModel.build(PLAIN, seed=0)
    losses = {name: {"layers": {"pointwise": "conv2"}}, "hard": {"weight": 1.0}}
    found = distilled(student, teacher, losses, task=few(digits_task, 256), batch_size=32, epochs=2)
    assert [set(epoch) for epoch in found.epochs] == [{"hard", name}] * 2
    assert found.epochs[1][name] < found.epochs[0][name]
    assert name in found.lines[-1]


@pytest.mark.parametrize(
    ("student", "layers", "complaint"),
    [
        pytest.param(RESIDUAL, {"pointwis": "conv2"}, "did you mean 'pointwise'", id="student-path"),
        pytest.param(RESIDUAL, {"pointwise": "conv3"}, "did you mean 'conv2'", id="teacher-path"),
        pytest.param(RESIDUAL, {"block*": "conv2"}, r"must have a layer 'block\*'", id="glob"),
        pytest.param(RESIDUAL, {"bn*": "conv*"}, "must name equally many layers", id="unequal-numbers"),
        pytest.param(FORGETFUL, {"forgotten": "fc1"}, "'forgotten' .* it is never called", id="never-fires"),
        pytest.param(FORGETFUL, {"head": "conv2"}, "outputs of equally many dimensions", id="other-dimensions"),
    ],
)
def test_layers_that_cannot_be_compared_are_refused_before_the_first_step(
    student, layers, complaint, digits_task, tmp_path
):
    student, teacher = TorchModel.build(student, seed=0), TorchModel.build(PLAIN, seed=0)
    losses = {"hint": {"layers": layers}, "hard": {}}
    distillation = Distillation(student, teacher, digits_task, tmp_path, losses)
    with pytest.raises(InputError, match=complaint):
        distillation.run()
    assert distillation.epochs == distillation.lines == []
    with pytest.raises(InputError, match=complaint):
        check_fit(student, teacher, digits_task, asking(losses))


@pytest.mark.parametrize(
    ("losses", "complaint"),
    [
        pytest.param(
            {"attention_transfer": {"layers": {"head": "fc2"}}}, r"'head' with 'fc2', but features", id="no-maps"
        ),
        pytest.param({"attention_transfer": {"layers": {"norm": "conv2"}}}, "must have one shape", id="token-counts"),
    ],
)
def test_features_without_a_map_are_refused_before_the_first_step(losses, complaint, digits_task, tmp_path):
    student, teacher = TorchModel.build(SEQUENCE, seed=0), TorchModel.build(PLAIN, seed=0)
    distillation = Distillation(student, teacher, digits_task, tmp_path, losses)
    with pytest.raises(InputError, match=complaint):
        distillation.run()
    assert distillation.epochs == []
    with pytest.raises(InputError, match=complaint):
        check_fit(student, teacher, digits_task, asking(losses))


# Unlabeled samples


def test_labels_are_asked_of_labeled_samples_alone_and_the_teacher_of_all(digits_task):
    student, teacher = (TorchModel.build(LINEAR, seed=seed) for seed in (0, 1))
    task = half_unlabeled(digits_task, 50)
    agreement, learning = objective({"hard": {}, "kd": {}, "dkd": {}}, student.module, teacher, task)
    data = training_data(task, asking(agreement.settings, unlabeled_share=0.5), seed=0)
    inputs = data.inputs(np.arange(100))
    values = agreement.losses(
        learning, TrainingBatch(inputs, task.train.targets, None, np.arange(100), np.zeros(100, int)), 0.0
    )
    assert {name: len(value) for name, value in values.items()} == {"hard": 50, "kd": 100, "dkd": 50}
    logits, theirs = (model.predict(inputs) for model in (student, teacher))
    expected = F.cross_entropy(logits[:50], task.train.targets, reduction="none")
    torch.testing.assert_close(values["hard"], expected)
    torch.testing.assert_close(values["kd"].double(), kd(logits, theirs, 4.0), rtol=0, atol=1e-5)  # float32, T² of 16


def test_first_step_with_unlabeled_samples_has_the_losses_and_weights_of_the_formula(digits_task, distilled):
    student, teacher = (TorchModel.build(LINEAR, seed=seed) for seed in (0, 1))
    task = half_unlabeled(digits_task, 50)  # a batch of 100 holds them all, in whatever order
    losses = {"kd": {"temperature": 2.0, "weight": 0.7}, "hard": {"weight": 0.3}}
    found = distilled(student, teacher, losses, task=task, batch_size=100, optimizer=SGD)
    module = copy.deepcopy(student.module)
    images = torch.cat([task.train.inputs[0], task.unlabeled.inputs[0]])
    logits = module(images)
    soft = kd(logits, teacher.predict((images,)), 2.0).mean()
    hard = F.cross_entropy(logits[:50], task.train.targets)
    assert found.epochs == [pytest.approx({"hard": hard.item(), "kd": soft.item()}, rel=1e-4)]  # float32
    (0.7 * soft + 0.3 * hard).backward()
    expected = torch.cat([(one - 0.1 * one.grad).flatten() for one in module.parameters()])
    torch.testing.assert_close(parameters(found.module), expected.detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("share", "unlabeled"), [(None, 32), (0.25, 16), (0.75, 48), (0, 0)])
def test_share_of_unlabeled_samples_in_a_batch_is_a_setting(share, unlabeled, digits_task):
    task = half_unlabeled(digits_task, 320)
    data = training_data(task, asking({"kd": {}, "hard": {}}, unlabeled_share=share), seed=0)
    assert round(64 * data.unlabeled_share) == unlabeled
    assert (data.unlabeled is None) == (unlabeled == 0)


@pytest.mark.parametrize("losses", [{"hard": {}}, {"dkd": {}, "hard": {}}])
def test_losses_that_all_need_labels_leave_unlabeled_samples_alone(losses, digits_task):
    task = half_unlabeled(digits_task, 320)
    assert training_data(task, asking(losses), seed=0).unlabeled is None
    with pytest.raises(InputError, match=f"but {', '.join(sorted(losses, reverse=True))} need labels; add"):
        training_data(task, asking(losses, unlabeled_share=0.5), seed=0)


def test_share_of_unlabeled_samples_that_the_task_does_not_have_is_refused(digits_task, tmp_path):
    student, teacher = (TorchModel.build(LINEAR, seed=seed) for seed in (0, 1))
    distillation = Distillation(student, teacher, digits_task, tmp_path, {"kd": {}}, unlabeled_share=0.5)
    with pytest.raises(InputError, match=r"unlabeled_share is 0\.5, .* but it has none"):
        distillation.run()
    assert distillation.epochs == []


def test_unlabeled_samples_alone_can_teach(digits_task, distilled):
    images = digits_task.train.inputs[0]
    task = replace(few(digits_task, 64), unlabeled=Samples((images,), torch.full((len(images),), -1)))
    teacher, student = (TorchModel.build(LINEAR, seed=seed) for seed in (1, 0))
    settings = {"epochs": 10, "optimizer": Optimizer(learning_rate=1e-2, weight_decay=0.0)}
    losses = {"kd": {"weight": 1.0}}

    def agreement(share) -> float:
        trained = distilled(student, teacher, losses, task=task, unlabeled_share=share, **settings).module
        answers = trained(*digits_task.test.inputs).argmax(dim=1)
        return (answers == teacher.predict(digits_task.test.inputs).argmax(dim=1)).float().mean().item()

    assert agreement(0.75) > agreement(0) + 0.05


# Tokens


def rows_task(task: Task) -> Task:
    """A class for each row, a third of the rows without one."""

    def per_row(split: Samples, samples: int) -> Samples:
        targets = (split.targets[:samples, None] + torch.arange(8)) % 10
        ignored = (torch.arange(samples)[:, None] + torch.arange(8)) % 3 == 0
        return Samples((split.inputs[0][:samples],), targets.masked_fill(ignored, -100))

    return replace(task, train=per_row(task.train, 60), validation=per_row(task.validation, 30))


def test_ignored_tokens_count_in_no_loss_and_no_gradient(digits_task, distilled):
    student, teacher = (TorchModel.build(ROWS, seed=seed) for seed in (0, 1))
    task = rows_task(digits_task)
    losses = {"kd": {"temperature": 2.0, "weight": 0.7}, "hard": {"weight": 0.3}, "dkd": {"weight": 0.1}}
    found = distilled(student, teacher, losses, task=task, batch_size=60, optimizer=SGD)
    module = copy.deepcopy(student.module)
    images, targets = task.train.inputs[0], task.train.targets
    counted = targets != -100
    # as if the other tokens were not there: every row a sample of its own
    logits, theirs = (one(images).transpose(1, 2)[counted] for one in (module, teacher.module))
    soft = kd(logits, theirs.detach(), 2.0).mean()
    hard = F.cross_entropy(logits, targets[counted])
    decoupled = Losses.model_validate({"dkd": {}}).of_responses["dkd"]
    dkd = decoupled.compare(logits, theirs.detach(), targets[counted], 4.0).mean()
    expected = {"hard": hard.item(), "kd": soft.item(), "dkd": dkd.item()}
    assert found.epochs == [pytest.approx(expected, rel=1e-4)]  # float32
    (0.7 * soft + 0.3 * hard + 0.1 * dkd).backward()
    stepped = torch.cat([(one - 0.1 * one.grad).flatten() for one in module.parameters()])
    torch.testing.assert_close(parameters(found.module), stepped.detach(), rtol=0, atol=1e-6)


def test_student_of_tokens_learns_from_its_teacher_and_can_be_exported(digits_task, distilled, tmp_path):
    student, teacher = (TorchModel.build(ROWS, seed=seed) for seed in (0, 1))
    task = rows_task(digits_task)
    losses = {"kd": {}, "hint": {"layers": {"hidden": "hidden"}}}
    settings = {"batch_size": 20, "epochs": 8, "optimizer": Optimizer(learning_rate=1e-2)}
    found = distilled(student, teacher, losses, task=task, **settings)
    assert found.epochs[-1]["kd"] < found.epochs[0]["kd"] / 2
    assert found.epochs[-1]["hint"] < found.epochs[0]["hint"]
    exported = to_onnx(found.module, task, tmp_path / "rows.onnx")
    logits = TorchModel(found.module, ROWS).predict(digits_task.test.inputs)
    assert logits.shape == (360, 10, 8)
    torch.testing.assert_close(exported.predict(digits_task.test.inputs), logits, rtol=0, atol=1e-5)


# What cannot be compared


def flat_task(outputs: int | None) -> tuple[Task, TorchModel]:
    """Regression on digits: (N, `outputs`), or (N,) for None."""
    images, targets = torch.rand(20, 64), torch.rand(20, outputs) if outputs else torch.rand(20)
    split = Samples((images,), targets)
    layers = [nn.Linear(64, outputs or 1), *([] if outputs else [nn.Flatten(0)])]
    model = TorchModel(nn.Sequential(*layers).eval(), Reference(factory="networks:PlainNetwork"))
    return Task(split, split, split, split, (images[:2],), loss=lambda one, other: (one - other).square()), model


@pytest.mark.parametrize("name", ["dkd", "dist", "soft_cross_entropy", "reverse_kl", "jsd"])
def test_loss_that_compares_classes_is_refused_for_values_before_training(name):
    task, model = flat_task(3)
    with pytest.raises(
        InputError, match=rf"{name} compares classes, but .* are values, no classes; write `losses: {{kd"
    ):
        check_fit(model, model, task, asking({name: {}}, batch_size=4))


def test_loss_that_cannot_compare_the_outputs_is_refused_before_training():
    task, model = flat_task(3)
    task = replace(task, outputs="classes")
    with pytest.raises(
        InputError, match=r"dkd must be able to compare outputs \(2, 3\), targets torch.float32 \(2, 3\)"
    ):
        check_fit(model, model, task, asking({"dkd": {}}, batch_size=4))


def test_one_class_alone_is_refused_before_training():
    task, model = flat_task(1)
    with pytest.raises(InputError, match=r"kd must compare outputs .* at least 2 classes, got \(2, 1\)"):
        check_fit(model, model, replace(task, outputs="classes"), asking({"kd": {}}, batch_size=4))


@pytest.mark.parametrize("outputs", [None, 1, 3])
@pytest.mark.parametrize("losses", [{"kd": {}, "hard": {}}, {"logit_mse": {}}])
def test_regression_learns_from_a_distance(outputs, losses, distilled):
    task, model = flat_task(outputs)
    student = TorchModel(copy.deepcopy(model.module), model.factory)
    nn.init.zeros_(student.module[0].weight)
    check_fit(student, model, task, asking(losses, batch_size=4))
    found = distilled(student, model, losses, task=task, batch_size=20)
    name = next(iter(losses))
    expected = (student.predict(task.train.inputs) - model.predict(task.train.inputs)).square().mean().item()
    assert found.epochs[0][name] == pytest.approx(expected, rel=1e-5)  # float32


def label_task() -> Task:
    """Four labels of ten numbers, each with its own yes or no."""
    inputs = torch.randn(3600, 10, generator=torch.Generator().manual_seed(0))
    found = [inputs[:, 0] * 3, inputs[:, 1] ** 2, inputs[:, 2] - inputs[:, 3], inputs[:, 4].abs() * 2]
    labels = (torch.stack(found, dim=1) > 0.5).float()
    train, test = (Samples((inputs[part],), labels[part]) for part in (slice(600), slice(600, None)))

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(outputs, targets, reduction="none").mean(dim=1)

    return Task(train, test, test, train, (inputs[:2],), loss=loss)


def labeler(*widths: int) -> TorchModel:
    torch.manual_seed(0)
    hidden = [layer for sizes in pairwise([10, *widths]) for layer in (nn.Linear(*sizes), nn.ReLU())]
    layers = [*hidden, nn.Linear(widths[-1], 4)]
    return TorchModel(nn.Sequential(*layers).eval(), Reference(factory="networks:PlainNetwork"))


def test_teacher_of_labels_teaches_no_worse_than_the_labels_alone(distilled):
    task = label_task()
    settings = {"task": task, "batch_size": 64, "epochs": 60, "optimizer": Optimizer(learning_rate=3e-3)}
    teacher = distilled(labeler(64, 64), labeler(1), {"hard": {}}, **settings).module
    taught = TorchModel(teacher, Reference(factory="networks:PlainNetwork"))

    def bit_accuracy(losses) -> float:
        outputs = distilled(labeler(32), taught, losses, **settings).module(*task.test.inputs)
        return ((outputs > 0) == (task.test.targets > 0.5)).float().mean().item()

    # of 12,000 bits; a softmax over the labels gave 14 points less
    assert bit_accuracy({"kd": {}, "hard": {}}) >= bit_accuracy({"hard": {}})


class BatchSecond(nn.Module):
    """Its encoder works on (L, N, D), as torch's transformers do unless told otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(8, 16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(x.squeeze(1).transpose(0, 1)).mean(0))


def test_layer_that_does_not_have_the_batch_first_is_refused(digits_task):
    model = TorchModel(BatchSecond().eval(), Reference(factory="networks:PlainNetwork"))
    losses = {"rkd_distance": {"layers": {"encoder": "encoder"}}}
    with pytest.raises(InputError, match=r"'encoder' must give outputs \(N, …\), the batch first"):
        check_fit(model, model, digits_task, asking(losses, batch_size=4))


def test_loss_between_samples_needs_two_of_them(digits_task):
    model = TorchModel.build(Reference(factory="networks:PlainNetwork"), seed=0)
    with pytest.raises(InputError, match="for dist compare them, got 1"):
        check_fit(model, model, digits_task, asking({"dist": {}}, batch_size=1))


def test_attention_between_signals_whose_channels_come_first_is_refused(digits_task):
    model = TorchModel.build(Reference(factory="example_models:SignalNetwork"), seed=0)
    losses = {"attention_transfer": {"layers": {"conv1": "conv1"}}}
    with pytest.raises(InputError, match=r"maps \(N, C, H, W\) or tokens \(N, L, D\), but 'conv1' gives \(N, C, L\)"):
        check_fit(model, model, digits_task, asking(losses, batch_size=4))
