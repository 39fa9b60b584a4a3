import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from compressor import Augmentation, Samples, Task
from compressor.distillation.answering import answer, check_replayable, data_of, origin_of
from compressor.distillation.distil import Student, distil
from compressor.distillation.distillation_settings import DistillationSettings
from compressor.distillation.losses import Losses
from compressor.errors import InputError, StageError
from compressor.models.artifact import TorchModel
from compressor.models.ensemble import Ensemble
from compressor.models.soft_label_file import FILE_NAME, SoftLabelFile
from compressor.references.reference import Reference
from compressor.stage import StageContext
from compressor.training.settings import Optimizer
from networks import PlainNetwork, ResidualNetwork

CPU = torch.device("cpu")
SHIFTED = Augmentation(2, lambda inputs, uniform: (shifted(inputs[0], (uniform * 3).long()),))


def shifted(images, offsets):
    """Images, (N, 1, H, W), each moved by -1, 0 or 1 pixel in both directions."""
    padded = nn.functional.pad(images, (1, 1, 1, 1))
    return torch.stack([one[:, y : y + 8, x : x + 8] for one, (y, x) in zip(padded, offsets.tolist(), strict=True)])


class CountingNetwork(nn.Module):
    """A linear layer that notes how many samples each call brought, and can be stopped at one."""

    calls: ClassVar[list[int]] = []
    stop_at: ClassVar[list[int]] = []

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        if len(x) > 2:  # more than the example inputs
            if len(self.calls) in self.stop_at:
                raise KeyboardInterrupt
            self.calls.append(len(x))
        return self.head(x.flatten(1))


@pytest.fixture
def counting() -> Iterator[TorchModel]:
    CountingNetwork.calls.clear()
    torch.manual_seed(0)
    yield TorchModel(CountingNetwork().eval(), Reference(factory="networks:counting"))
    CountingNetwork.calls.clear()
    CountingNetwork.stop_at.clear()


@pytest.fixture(scope="module")
def task(digits_task) -> Task:
    return replace(digits_task, augmentation=SHIFTED)


def answered(model: TorchModel, task: Task, directory: Path, *, views: int = 1, seed: int = 0, log=print) -> TorchModel:
    """`model` with soft labels."""
    directory.mkdir(exist_ok=True)
    made_from = origin_of(model, task, seed=seed, views=views, top_k=None)
    return model.with_attachment(answer(model, data_of(task, seed=seed), made_from, directory, device=CPU, log=log))


def learned(student: nn.Module, model: TorchModel, task: Task, **changes) -> torch.Tensor:
    """Weights of `student` after four epochs with `model` as its teacher."""
    lines: list[str] = []
    context = StageContext(model, CPU, 0, Path(), lines.append)
    asked = {"epochs": 4, "batch_size": 128, "optimizer": Optimizer(name="sgd", learning_rate=0.05), **changes}
    settings = DistillationSettings(losses=Losses(kd={}, hard={}), **asked)
    trained = distil(Student(student), model, task, settings, context)
    assert any("read from soft labels" in line for line in lines) == (model.attachment(SoftLabelFile) is not None)
    return torch.cat([parameter.detach().flatten() for parameter in trained.parameters()])


def student() -> nn.Module:
    """A network whose training draws random numbers of its own."""
    torch.manual_seed(5)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 10))


def confident(network: type[nn.Module], seed: int) -> nn.Module:
    """A network whose logits differ between samples, by up to 3."""
    torch.manual_seed(seed)
    module = network().eval()
    with torch.no_grad():
        list(module.children())[-1].weight.mul_(30)
    return module


@pytest.fixture(scope="module")
def teacher() -> TorchModel:
    return TorchModel(confident(PlainNetwork, 1), Reference(factory="networks:PlainNetwork"))


@pytest.fixture(scope="module")
def panel() -> TorchModel:
    members = [confident(PlainNetwork, 2), confident(ResidualNetwork, 3)]
    return TorchModel(Ensemble(members, weights=[1, 3]), Reference(factory="compressor:ensemble"))


WITHIN_FLOAT16 = {"rtol": 0.0, "atol": 2e-5}
"""Logits below 4 are rounded by up to 2^-10, with either sign: in the mean over 128 samples by 5e-5, of which 36 steps
of at most 0.05, with signs of their own, make 36^0.5 * 0.05 * 5e-5 = 1.5e-5. Another view makes 100 times as much."""


@pytest.mark.parametrize("views", [4, 5])
def test_student_of_soft_labels_is_that_of_the_live_teacher_with_augmentation_and_dropout(
    teacher, task, tmp_path, views
):
    live = learned(student(), teacher, task)
    stored = learned(student(), answered(teacher, task, tmp_path, views=views), task)
    assert not torch.equal(stored, live)
    torch.testing.assert_close(stored, live, **WITHIN_FLOAT16)


def test_fewer_views_than_epochs_are_seen_in_turns_and_make_another_student(teacher, task, tmp_path):
    live = learned(student(), teacher, task)
    two = answered(teacher, task, tmp_path / "two", views=2)
    assert (learned(student(), two, task) - live).abs().max() > 20 * WITHIN_FLOAT16["atol"]
    one = replace(task, augmentation=replace(SHIFTED, apply=lambda inputs, _uniform: inputs))
    # where all views are equal, it does not matter how many there are
    stored = learned(student(), answered(teacher, one, tmp_path / "one", views=1), one)
    torch.testing.assert_close(stored, learned(student(), teacher, one), **WITHIN_FLOAT16)


@pytest.mark.parametrize("combine", ["mean_probability", "mean_logit", "separate"])
def test_members_of_an_ensemble_are_stored_each_and_teach_as_they_do_live(panel, task, tmp_path, combine):
    with_labels = answered(panel, task, tmp_path, views=4)
    rows = np.array([3, 1200])
    inputs = data_of(task, seed=0).view(data_of(task, seed=0).inputs(rows), rows, 2)
    said = with_labels.attachment(SoftLabelFile).read(rows, 2)["logits"]
    for index, member in enumerate(panel.module.members):
        torch.testing.assert_close(said[:, index], member(*inputs).detach(), rtol=2**-11, atol=1e-5)
    live = learned(student(), panel, task, combine=combine)
    torch.testing.assert_close(learned(student(), with_labels, task, combine=combine), live, **WITHIN_FLOAT16)


def test_unlabeled_samples_are_answered_behind_the_labeled_ones_and_learned_from(teacher, task, tmp_path):
    few = replace(
        task,
        train=Samples((task.train.inputs[0][:300],), task.train.targets[:300]),
        unlabeled=Samples((task.train.inputs[0][300:],), torch.zeros(957)),
    )
    with_labels = answered(teacher, few, tmp_path, views=12)  # labeled samples are drawn thrice in each of four epochs
    rows = np.array([299, 300, 1256])  # both splits in one view
    inputs = data_of(few, seed=0).view((task.train.inputs[0][rows],), rows, 1)
    said = with_labels.attachment(SoftLabelFile).read(rows, 1)["logits"][:, 0]
    torch.testing.assert_close(said, teacher.predict(inputs), rtol=2**-11, atol=1e-5)
    live = learned(student(), teacher, few)
    torch.testing.assert_close(learned(student(), with_labels, few), live, **WITHIN_FLOAT16)
    assert not torch.equal(live, learned(student(), teacher, few, unlabeled_share=0.25))


def test_answers_that_are_cut_off_go_on_at_the_shard_and_give_equal_bytes(counting, task, tmp_path):
    whole = answered(counting, task, tmp_path / "whole", views=4).attachment(SoftLabelFile).path.read_bytes()
    calls = CountingNetwork.calls.copy()
    assert calls == [256, 256, 256, 256, 233] * 4  # one shard for each view
    CountingNetwork.calls.clear()
    CountingNetwork.stop_at.append(12)  # in the third shard
    with pytest.raises(KeyboardInterrupt):
        answered(counting, task, tmp_path / "cut", views=4)
    assert not (tmp_path / "cut" / FILE_NAME).exists()
    CountingNetwork.stop_at.clear()
    CountingNetwork.calls.clear()
    lines: list[str] = []
    resumed = answered(counting, task, tmp_path / "cut", views=4, log=lines.append)
    assert lines == ["2 of 4 shards are there from an interrupted run", "view 3/4", "view 4/4"]
    assert CountingNetwork.calls == calls[10:]
    assert resumed.attachment(SoftLabelFile).path.read_bytes() == whole


def test_shards_behind_one_that_is_missing_are_computed_again(counting, task, tmp_path):
    whole = answered(counting, task, tmp_path / "whole", views=4).attachment(SoftLabelFile).path.read_bytes()
    CountingNetwork.calls.clear()
    CountingNetwork.stop_at.append(15)
    with pytest.raises(KeyboardInterrupt):
        answered(counting, task, tmp_path / "cut", views=4)
    first, second, third = sorted((tmp_path / "cut").rglob("*.logits"))
    second.unlink()
    CountingNetwork.stop_at.clear()
    CountingNetwork.calls.clear()
    resumed = answered(counting, task, tmp_path / "cut", views=4)
    assert len(CountingNetwork.calls) == 15
    assert resumed.attachment(SoftLabelFile).path.read_bytes() == whole
    assert not first.exists()
    assert not third.exists()


def test_answers_that_were_whole_are_not_computed_again(counting, task, tmp_path):
    whole = answered(counting, task, tmp_path, views=2).attachment(SoftLabelFile).path.read_bytes()
    CountingNetwork.calls.clear()
    again = answered(counting, task, tmp_path, views=2)
    assert CountingNetwork.calls == []
    assert again.attachment(SoftLabelFile).path.read_bytes() == whole


@pytest.mark.parametrize("stop_at", [[], [6]], ids=["whole", "cut-off"])
def test_work_that_another_origin_left_is_not_used(counting, task, tmp_path, stop_at):
    CountingNetwork.stop_at.extend(stop_at)
    try:
        answered(counting, task, tmp_path / "left", views=2)
    except KeyboardInterrupt:
        assert list((tmp_path / "left").rglob("*.logits"))
    CountingNetwork.stop_at.clear()
    CountingNetwork.calls.clear()
    fresh = answered(counting, task, tmp_path / "fresh", views=2, seed=1)
    calls = CountingNetwork.calls.copy()
    CountingNetwork.calls.clear()
    found = answered(counting, task, tmp_path / "left", views=2, seed=1)
    assert CountingNetwork.calls == calls
    assert found.attachment(SoftLabelFile).path.read_bytes() == fresh.attachment(SoftLabelFile).path.read_bytes()
    assert [path.name for path in (tmp_path / "left").iterdir()] == [FILE_NAME]


@pytest.mark.parametrize(("bias", "found"), [(70_000.0, "7e\\+04"), (float("inf"), "inf"), (float("nan"), "nan")])
def test_logits_that_float16_cannot_hold_are_refused(counting, task, tmp_path, bias, found):
    with torch.no_grad():
        counting.module.head.bias[3] = bias
    with pytest.raises(StageError, match=f"within ±65504, the range of float16, got {found}"):
        answered(counting, task, tmp_path)
    assert not (tmp_path / FILE_NAME).exists()


def test_more_samples_than_a_shard_has_stay_in_their_order(counting, task, tmp_path):
    images = task.train.inputs[0].repeat(4, 1, 1, 1)
    many = replace(task, train=Samples((images,), task.train.targets.repeat(4)), augmentation=None)
    labels = answered(counting, many, tmp_path).attachment(SoftLabelFile)
    assert labels.origin.samples == 5028  # 2 shards of 2048 and a rest
    rows = np.array([0, 2047, 2048, 4095, 4096, 5027])
    said = SoftLabelFile.open(labels.path).read(rows, 0)["logits"][:, 0]
    torch.testing.assert_close(said, counting.predict((images[rows],)), rtol=2**-11, atol=1e-5)


def test_damaged_pieces_of_a_killed_run_are_made_again(teacher, task, tmp_path):
    whole = answered(teacher, task, tmp_path / "whole", views=2).attachment(SoftLabelFile).path.read_bytes()
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / FILE_NAME).write_bytes(whole[:-100])
    made_from = origin_of(teacher, task, seed=0, views=2, top_k=None)
    name = hashlib.sha256(made_from.model_dump_json().encode()).hexdigest()[:16]
    (tmp_path / "cut" / "shards" / name).mkdir(parents=True)
    (tmp_path / "cut" / "shards" / name / "000000.logits").write_bytes(bytes(100))
    assert answered(teacher, task, tmp_path / "cut", views=2).attachment(SoftLabelFile).path.read_bytes() == whole


@pytest.mark.parametrize(
    ("apply", "message"),
    [
        (lambda inputs, _: (inputs[0] + torch.rand(1),), "depend on its inputs and `uniform` alone"),
        (lambda inputs, _: (inputs[0] - inputs[0].mean(),), "treat each sample by itself"),
    ],
)
def test_augmentation_that_cannot_be_replayed_is_refused(apply, message, digits_task):
    task = replace(digits_task, augmentation=Augmentation(1, apply))
    with pytest.raises(InputError, match=message):
        check_replayable(data_of(task, seed=0))


def test_samples_that_differ_each_time_are_refused(digits_task):
    class Noisy(torch.utils.data.Dataset):
        def __len__(self):
            return 20

        def __getitem__(self, index):
            return torch.rand(1, 8, 8), index % 10

    with pytest.raises(InputError, match="must give the same samples every time"):
        check_replayable(data_of(replace(digits_task, train=Noisy()), seed=0))
