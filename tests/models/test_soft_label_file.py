import json
import os
import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn

from compressor import Augmentation, Samples, Task
from compressor.distillation.answering import origin_of
from compressor.distillation.distil import Student, distil
from compressor.distillation.distillation_settings import DistillationSettings
from compressor.distillation.losses import Losses
from compressor.distillation.response import tail_bucket_loss
from compressor.distillation.teachers import StoredTeacher
from compressor.errors import InputError
from compressor.models.artifact import TorchModel
from compressor.models.soft_label_file import FILE_NAME, Origin, SoftLabelFile
from compressor.references.reference import Reference
from compressor.stage import StageContext
from compressor.stages.soft_labels import SoftLabels as SoftLabelsStage
from compressor.training.sampling import TrainingBatch, TrainingData

ROLLED = Augmentation(1, lambda inputs, uniform: (torch.where(uniform[:, :, None, None] < 0.5, *rolled(inputs[0])),))
MIRRORED = Augmentation(1, lambda inputs, uniform: (torch.where(uniform[:, :, None, None] < 0.5, *flipped(inputs[0])),))
LARGEST_ROUNDING = 2**-11
"""Of float16, relative: it has 11 significant bits."""


def rolled(images):
    return images, images.roll(1, dims=-1)


def flipped(images):
    return images, images.flip(-1)


def teacher(name: str = "PlainNetwork", **arguments) -> TorchModel:
    return TorchModel.build(Reference(factory=f"networks:{name}", **arguments), seed=0)


def context(model: TorchModel, directory: Path) -> StageContext:
    return StageContext(model, torch.device("cpu"), 0, directory, lambda _line: None)


def labeled(model: TorchModel, task: Task, directory: Path, **settings) -> TorchModel:
    directory.mkdir(exist_ok=True)
    return SoftLabelsStage(**settings).apply(model, task, context(model, directory))


@pytest.fixture(scope="module")
def task(digits_task) -> Task:
    """Digits that are rolled by a pixel in half of the views."""
    return replace(digits_task, augmentation=ROLLED)


@pytest.fixture(scope="module")
def model(task, tmp_path_factory) -> TorchModel:
    """A teacher with soft labels of two views."""
    return labeled(teacher(), task, tmp_path_factory.mktemp("labels"), views=2)


def origin(**changes) -> dict:
    found = {
        "teacher": "a",
        "data": "b",
        "transform": "c",
        "seed": 0,
        "views": 2,
        "samples": 3,
        "members": 1,
        "answer": [5],
        "top_k": None,
    }
    return {**found, **changes}


def tensors(shape=(2, 3, 1, 5), kind: str = "F16", end: int = 60) -> dict:
    return {"logits": {"dtype": kind, "shape": list(shape), "data_offsets": [0, end]}}


def file_of(path: Path, made_from: object, parts: Mapping, size: int = 60) -> Path:
    """A file in the safetensors format, written by hand."""
    header = json.dumps({"__metadata__": {"origin": json.dumps(made_from)}, **parts}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))
    return path


def test_file_is_what_the_safetensors_library_reads_and_says_what_it_was_made_from(model, task):
    with safe_open(model.attachment(SoftLabelFile).path, framework="np") as found:
        assert list(found.keys()) == ["logits"]
        logits = found.get_tensor("logits")
        said = json.loads(found.metadata()["origin"])
    assert logits.dtype == np.float16
    assert logits.shape == (2, len(task.train), 1, 10)
    assert (said["views"], said["samples"], said["members"], said["answer"]) == (2, len(task.train), 1, [10])
    assert said["teacher"] == model.digest
    rows = np.array([7, 1000, 3])
    assert np.array_equal(
        model.attachment(SoftLabelFile).read(rows, 1)["logits"].numpy(), logits[1, rows].astype(np.float32)
    )


@pytest.mark.parametrize("view", [0, 1])
def test_rows_are_the_live_logits_of_that_view_rounded_to_float16(model, task, view):
    rows = np.array([0, 1256, 500, 500])
    images = task.train.inputs[0][rows]
    data = TrainingData(task.train, augmentation=ROLLED, seed=0)
    live = model.predict(data.view((images,), rows, view))
    stored = model.attachment(SoftLabelFile).read(rows, view)["logits"]
    assert stored.dtype == torch.float32
    # float16's rounding, and float32's in batches of another size
    torch.testing.assert_close(stored[:, 0], live, rtol=LARGEST_ROUNDING, atol=1e-5)


def test_views_differ_and_the_task_without_augmentation_has_one(model, digits_task, tmp_path):
    rows = np.arange(100)
    first, second = (model.attachment(SoftLabelFile).read(rows, view)["logits"] for view in (0, 1))
    assert not torch.equal(first, second)
    assert labeled(teacher(), digits_task, tmp_path).attachment(SoftLabelFile).origin.views == 1
    with pytest.raises(InputError, match="views must be 1 for a task without augmentation, got 3"):
        SoftLabelsStage(views=3).rehearse(teacher(), teacher(), digits_task)


def test_file_by_hand_is_opened(tmp_path):
    assert SoftLabelFile.open(file_of(tmp_path / "a", origin(), tensors())).origin == Origin.model_validate(origin())


@pytest.mark.parametrize("size", [0, 7, 8, 100, -1])
def test_file_that_is_cut_off_is_an_input_error(model, tmp_path, size):
    whole = model.attachment(SoftLabelFile).path.read_bytes()
    (tmp_path / "cut").write_bytes(whole[:size])
    with pytest.raises(InputError, match=r"cut must (be a file of soft labels|have \d+ bytes, got \d+)"):
        SoftLabelFile.open(tmp_path / "cut")


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"PK\x03\x04" + bytes(1000), id="zip"),
        pytest.param(struct.pack("<Q", 2**63) + b"{}", id="huge-header"),
        pytest.param(struct.pack("<Q", 2) + b"{}", id="empty-header"),
        pytest.param(struct.pack("<Q", 4) + b"null", id="null"),
        pytest.param(struct.pack("<Q", 2) + b"[]", id="list"),
        pytest.param(struct.pack("<Q", 100_000) + b"[" * 100_000, id="nested-without-end"),
        pytest.param(struct.pack("<Q", 20) + b'{"__metadata__": 123}', id="metadata-is-a-number"),
        pytest.param(struct.pack("<Q", 30) + b'{"__metadata__":{"origin":{}}}', id="origin-is-no-text"),
        pytest.param(struct.pack("<Q", 6) + b"\xff\xfe\x00{}\x00", id="no-text"),
    ],
)
def test_file_of_another_kind_is_an_input_error(tmp_path, content):
    (tmp_path / "foreign").write_bytes(content)
    with pytest.raises(InputError, match="foreign must be a file of soft labels, but"):
        SoftLabelFile.open(tmp_path / "foreign")


def test_weights_and_missing_files_and_directories_are_no_soft_labels(tmp_path):
    teacher().save(tmp_path)
    for name in ("model.safetensors", "nothing", "."):
        with pytest.raises(InputError, match="must be a file of soft labels, but"):
            SoftLabelFile.open(tmp_path / name)


@pytest.mark.parametrize(
    ("made_from", "parts"),
    [
        pytest.param(origin(views=-2, samples=-3), tensors((-2, -3, 1, 5)), id="negative"),
        pytest.param(origin(samples=0), tensors((2, 0, 1, 5), end=0), id="zero"),
        pytest.param(origin(samples=4), tensors(), id="more-samples"),
        pytest.param(origin(answer=[2**32, 2**32]), tensors(), id="size-beyond-64-bits"),
        pytest.param(origin(views=2**62, samples=2**62), tensors((2**62, 2**62, 1, 5)), id="beyond-any-disk"),
        pytest.param(origin(), tensors((3, 2, 1, 5)), id="transposed"),
        pytest.param(origin(), tensors(kind="BF16"), id="other-type"),
        pytest.param(origin(), {}, id="no-tensor"),
        pytest.param(origin(), {**tensors(), **{"more": tensors()["logits"]}}, id="additional-tensor"),
        pytest.param(origin(top_k=2), tensors(), id="top-k"),
        pytest.param(origin(answer=[1.5]), tensors(), id="fraction"),
        pytest.param(origin(owner="me"), tensors(), id="unknown-key"),
        pytest.param([], tensors(), id="list"),
    ],
)
def test_origin_that_does_not_fit_the_file_is_an_input_error(tmp_path, made_from, parts):
    path = file_of(tmp_path / "hostile", made_from, parts)
    with pytest.raises(InputError, match="hostile must"):
        SoftLabelFile.open(path)


@pytest.mark.parametrize("size", [59, 61, 10_000])
def test_file_of_another_length_than_its_origin_says_is_an_input_error(tmp_path, size):
    with pytest.raises(InputError, match=r"hostile must have \d+ bytes, got \d+"):
        SoftLabelFile.open(file_of(tmp_path / "hostile", origin(), tensors(), size))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="/proc/self/statm is Linux's")
def test_reading_rows_does_not_load_the_file(tmp_path):
    gigabytes = 2 * 10**9
    shape = (1, 10**6, 1, 1000)
    path = file_of(tmp_path / "large", origin(views=1, samples=10**6, answer=[1000]), tensors(shape, end=gigabytes), 0)
    os.truncate(path, path.stat().st_size + gigabytes)  # a hole, which takes no room on the disk

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    labels, before = SoftLabelFile.open(path), resident()
    rows = np.arange(0, 10**6, 10**4)
    assert labels.read(rows, 0)["logits"].shape == (100, 1, 1000)
    assert resident() - before < 100e6  # 2 GB would be in memory otherwise


def one_weight_changed(model: TorchModel) -> TorchModel:
    other = teacher().module
    with torch.no_grad():
        other.fc2.weight[3, 5] += 1e-3
    return model.with_module(other)


def one_pixel_changed(task: Task) -> Task:
    images = task.train.inputs[0].clone()
    images[1000, 0, 4, 4] += 1e-3
    return replace(task, train=Samples((images,), task.train.targets))


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        pytest.param({}, None, id="equal"),
        pytest.param({"model": one_weight_changed}, "teacher", id="teacher"),
        pytest.param({"task": one_pixel_changed}, "data", id="data"),
        pytest.param({"task": lambda task: replace(task, unlabeled=task.validation)}, "data, samples", id="unlabeled"),
        pytest.param({"task": lambda task: replace(task, augmentation=MIRRORED)}, "transform", id="transform"),
        pytest.param({"task": lambda task: replace(task, augmentation=None)}, "transform", id="no-transform"),
        pytest.param({"seed": 1}, "transform, seed", id="seed"),
    ],
)
def test_use_with_another_teacher_or_data_is_refused_before_training_and_says_what_differs(
    model, task, tmp_path, change, differs
):
    other = change.get("model", lambda same: same)(model)
    seen = change.get("task", lambda same: same)(task)
    asked = origin_of(other, seen, seed=change.get("seed", 0), views=2, top_k=None)
    if differs is None:
        model.attachment(SoftLabelFile).check(asked)
        return
    with pytest.raises(InputError, match=rf"differs in {differs}; make it again"):
        model.attachment(SoftLabelFile).check(asked)
    learned = other.with_attachment(model.attachment(SoftLabelFile))
    at_seed = replace(context(learned, tmp_path), seed=change.get("seed", 0))
    with pytest.raises(InputError, match=rf"differs in {differs}; make it again"):
        learn(learned, seen, at_seed, Losses(kd={}))


def learn(model: TorchModel, task: Task, now: StageContext, losses: Losses) -> nn.Module:
    settings = DistillationSettings(losses=losses, epochs=1, batch_size=512)
    student = Student.of(teacher(model.factory.factory.partition(":")[2]))
    return distil(student, model, task, settings, now)


def test_arguments_of_the_factory_are_part_of_the_teacher_and_paths_are_not(tmp_path):
    arguments = [{"slope": 0.1}, {"slope": 0.2}, {"slope": 0.1, "data_dir": str(tmp_path)}]
    built = [
        TorchModel(teacher().module, Reference(factory="networks:PlainNetwork", **changes)) for changes in arguments
    ]
    assert built[0].digest != built[1].digest
    assert built[0].digest == built[2].digest


def test_other_weights_leave_the_soft_labels_behind(model):
    assert model.attachment(SoftLabelFile) is not None
    assert model.with_module(model.module).attachment(SoftLabelFile) is None


def test_saved_model_keeps_its_soft_labels(model, tmp_path):
    model.save(tmp_path)
    loaded = TorchModel.load(tmp_path)
    assert loaded.attachment(SoftLabelFile).path == tmp_path / FILE_NAME
    assert loaded.attachment(SoftLabelFile).origin == model.attachment(SoftLabelFile).origin
    assert loaded.attachment(SoftLabelFile).path.read_bytes() == model.attachment(SoftLabelFile).path.read_bytes()
    assert loaded.digest == model.digest
    (tmp_path / "without").mkdir()
    replace(loaded, attachments=()).save(tmp_path / "without")
    assert TorchModel.load(tmp_path / "without").attachment(SoftLabelFile) is None


@pytest.fixture(scope="module")
def many(digits_task, tmp_path_factory) -> TorchModel:
    """A teacher of 5,000 classes with soft labels."""
    return labeled(teacher("ManyClassesNetwork"), digits_task, tmp_path_factory.mktemp("many"))


def test_of_very_many_classes_the_most_likely_and_the_rest_together_are_stored(many, digits_task):
    with safe_open(many.attachment(SoftLabelFile).path, framework="np") as found:
        shapes = {name: found.get_slice(name).get_shape() for name in found.keys()}  # noqa: SIM118  # no mapping
    samples = len(digits_task.train)
    assert shapes == {
        "log_probabilities": [1, samples, 1, 64],
        "classes": [1, samples, 1, 64],
        "tail": [1, samples, 1],
    }


def test_loss_from_stored_top_classes_is_the_divergence_of_those_classes_and_the_rest(many, digits_task):
    rows = np.arange(100, 140)
    images = digits_task.train.inputs[0][rows]
    batch = TrainingBatch((images,), digits_task.train.targets[rows], None, rows, np.zeros(len(rows), int))
    (answer,) = StoredTeacher(many.attachment(SoftLabelFile))(batch).responses
    student_logits = torch.randn(40, 5000, generator=torch.Generator().manual_seed(1))
    p = F.softmax(many.predict((images,)).double(), dim=1)
    q = F.softmax(student_logits.double(), dim=1)
    top = p.argsort(dim=1, descending=True)[:, :64]
    p, q = (torch.cat([x.gather(1, top), 1 - x.gather(1, top).sum(1, keepdim=True)], dim=1) for x in (p, q))
    expected = (p * (p.log() - q.log())).sum(dim=1)
    assert expected.min() > 1
    # a log-probability in [-16, 0] is rounded by at most 2^-8, which changes p by that share and log p by that much
    torch.testing.assert_close(tail_bucket_loss(student_logits, answer).double(), expected, rtol=2**-8, atol=2**-8)


@pytest.mark.parametrize(
    ("settings", "stored"),
    [
        ({"kd": {"temperature": 1.0}, "hard": {}}, True),
        ({"kd": {}}, False),
        ({"kd": {"temperature": 1.0, "standardize": True}}, False),
        ({"reverse_kl": {"temperature": 1.0}}, False),
        ({"kd": {"temperature": 1.0}, "dkd": {}}, False),
    ],
)
def test_top_classes_teach_where_they_are_exact_and_else_the_teacher_runs(
    many, digits_task, tmp_path, settings, stored
):
    lines: list[str] = []
    now = replace(context(many, tmp_path), log=lines.append)
    learn(many, digits_task, now, Losses.model_validate(settings))
    assert ("read from soft labels" in lines[0]) is stored
    assert ("the teacher runs live" in lines[0]) is not stored
