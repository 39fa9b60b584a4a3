"""Export to ONNX."""

import hashlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from compressor import Augmentation, OnnxModel, Samples, Task
from compressor.errors import InputError, StageError
from compressor.export.to_onnx import to_onnx
from compressor.run.preflight import check_task
from tests.example_models import (
    AttentionOfRankThree,
    BranchingNetwork,
    FixedBatchNetwork,
    RandomNetwork,
    SingularNetwork,
    TextNetwork,
)
from tests.networks import PlainNetwork


def seeded(network: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return network().eval()


@pytest.fixture(scope="module")
def plain(digits_task: Task, tmp_path_factory: pytest.TempPathFactory) -> OnnxModel:
    return to_onnx(seeded(PlainNetwork), digits_task, tmp_path_factory.mktemp("plain") / "model.onnx")


def test_exported_model_gives_pytorch_outputs_for_batches_of_any_size(digits_task: Task, plain: OnnxModel) -> None:
    module = seeded(PlainNetwork)
    for size in (1, 3, 100):
        images = torch.stack([digits_task.test[index][0][0] for index in range(size)])
        # ten layers of float32 in another order of summation; logits are of the order of 0.1
        torch.testing.assert_close(plain.predict((images,)), module(images).detach(), rtol=1e-4, atol=1e-6)


def test_file_holds_no_path_and_no_trace_of_the_source(plain: OnnxModel) -> None:
    content = plain.path.read_bytes()
    for trace in (str(Path.cwd()), str(Path(torch.__file__).parent), str(Path(__file__)), str(Path.home()), ".py"):
        assert trace.encode() not in content
    model = onnx.load(plain.path)
    assert not any(node.name or node.doc_string or node.metadata_props for node in model.graph.node)
    assert not model.graph.value_info


def test_file_has_opset_20_and_stable_names(plain: OnnxModel) -> None:
    model = onnx.load(plain.path)
    assert [(imported.domain, imported.version) for imported in model.opset_import] == [("", 20)]
    assert [(value.name, shape(value)) for value in (*model.graph.input, *model.graph.output)] == [
        ("input", ["batch", 1, 8, 8]),
        ("output", ["batch", 10]),
    ]


def test_several_inputs_keep_the_names_of_forward_and_open_axes_their_own(tmp_path: Path) -> None:
    tokens = torch.randint(50, (40, 7), generator=torch.Generator().manual_seed(0))
    split = Samples((tokens, torch.ones(40, 7)), torch.zeros(40, dtype=torch.long))
    axes = ({0: "batch", 1: "length"}, {0: "batch", 1: "length"})
    task = Task(split, split, split, split, (tokens[:2], torch.ones(2, 7)), dynamic_axes=axes)
    module = seeded(TextNetwork)

    exported = to_onnx(module, task, tmp_path / "model.onnx")

    inputs = onnx.load(exported.path).graph.input
    assert [value.name for value in inputs] == ["input_ids", "attention_mask"]
    assert [shape(value) for value in inputs] == [["batch", "length"]] * 2
    longer = (torch.arange(22).reshape(2, 11), torch.ones(2, 11))
    torch.testing.assert_close(exported.predict(longer), module(*longer).detach(), rtol=1e-4, atol=1e-6)


def test_export_is_byte_identical_again_and_silent_and_equal_in_another_process(
    digits_task: Task, plain: OnnxModel, tmp_path: Path
) -> None:
    again = to_onnx(seeded(PlainNetwork), digits_task, tmp_path / "model.onnx")
    assert again.path.read_bytes() == plain.path.read_bytes()

    torch.save({"inputs": digits_task.validation.inputs[0]}, tmp_path / "inputs.pt")
    script = tmp_path / "another.py"
    script.write_text(
        "import hashlib, torch\nfrom pathlib import Path\nfrom compressor import Samples, Task\n"
        "from compressor.export.to_onnx import to_onnx\nfrom tests.networks import PlainNetwork\n"
        "images = torch.load('inputs.pt')['inputs']\n"
        "split = Samples((images,), torch.zeros(len(images)))\n"
        "task = Task(split, split, split, split, (images[:2],), labels=tuple('0123456789'))\n"
        "torch.manual_seed(0)\n"
        "model = to_onnx(PlainNetwork().eval(), task, Path('other.onnx'))\n"
        "print(hashlib.sha256(model.path.read_bytes()).hexdigest())\n"
    )
    root = str(Path(__file__).parents[2])
    another = subprocess.run(
        [sys.executable, script],
        cwd=tmp_path,
        env={"PYTHONPATH": root, "PYTHONHASHSEED": "1", "HOME": "/nonexistent"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert another.stderr == ""
    assert another.stdout.split() == [hashlib.sha256(plain.path.read_bytes()).hexdigest()]


def test_labels_and_preprocessing_travel_as_json(digits_task: Task, tmp_path: Path) -> None:
    task = replace(digits_task, labels=("naïve", "b"), preprocessing={"mean": [0.5], "layout": "NCHW"})
    exported = to_onnx(nn.Flatten(), task, tmp_path / "model.onnx", metadata={"version": "7"})
    session = onnxruntime.InferenceSession(exported.path)
    assert session.get_modelmeta().custom_metadata_map == {
        "labels": '["naïve", "b"]',
        "preprocessing": '{"layout": "NCHW", "mean": [0.5]}',
        "version": "7",
    }


def test_large_tensors_go_to_a_file_beside_that_is_counted_and_moved(
    digits_task: Task, plain: OnnxModel, tmp_path: Path
) -> None:
    exported = to_onnx(seeded(PlainNetwork), digits_task, tmp_path / "model.onnx", inline_bytes=10_000)
    assert [file.name for file in exported.files] == ["model.onnx", "model.onnx.data"]
    # onnx aligns tensors in the second file
    assert 0.9 < sum(file.stat().st_size for file in exported.files) / plain.path.stat().st_size < 1.1

    moved = tmp_path / "moved"
    moved.mkdir()
    exported.save(moved)
    for file in exported.files:
        file.unlink()
    inputs = digits_task.example_inputs
    torch.testing.assert_close(OnnxModel.load(moved).predict(inputs), plain.predict(inputs), rtol=0, atol=0)


@pytest.mark.parametrize(
    "pool",
    [
        nn.AdaptiveAvgPool2d(1),
        lambda x: x.mean((-1, -2)),
        lambda x: x.mean([2, 3], keepdim=True),
        lambda x: nn.functional.adaptive_avg_pool1d(x.flatten(2), 1),
    ],
    ids=["adaptive", "mean", "mean_keepdim", "adaptive_1d"],
)
def test_global_pools_become_one_average_pool(pool: nn.Module, digits_task: Task, tmp_path: Path) -> None:
    class Pooled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return pool(x) * 2

    exported = to_onnx(Pooled(), digits_task, tmp_path / "model.onnx")
    operators = [node.op_type for node in onnx.load(exported.path).graph.node]
    assert [name for name in operators if name != "Reshape"] == ["AveragePool", "Mul"]
    (images,) = digits_task.example_inputs
    torch.testing.assert_close(exported.predict((images,)), pool(images) * 2)


def test_global_pool_over_an_image_of_open_size_runs_at_another_size(digits_task: Task, tmp_path: Path) -> None:
    task = replace(digits_task, dynamic_axes=({0: "batch", 2: "height", 3: "width"},))
    exported = to_onnx(nn.AdaptiveAvgPool2d(1), task, tmp_path / "model.onnx")
    images = torch.rand(3, 1, 12, 9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(exported.predict((images,)), images.mean((2, 3), keepdim=True))


def test_branch_on_values_is_refused_with_its_line(digits_task: Task, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"models\.py:\d+ `return logits \* 2 if .*torch\.where"):
        to_onnx(seeded(BranchingNetwork), digits_task, tmp_path / "model.onnx")


def test_fixed_batch_is_refused(digits_task: Task, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"forward must not fix a size"):
        to_onnx(seeded(FixedBatchNetwork), digits_task, tmp_path / "model.onnx")


def test_operator_without_onnx_form_is_refused_by_name(digits_task: Task, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"opset 20, but torch says: No ONNX function found for .*aten\._linalg_svd"):
        to_onnx(SingularNetwork(), digits_task, tmp_path / "model.onnx")


def test_operator_that_cannot_be_translated_is_refused_with_its_line(digits_task: Task, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"models\.py:\d+ `return F\.scaled_dot_product.*gives: only 4D query"):
        to_onnx(AttentionOfRankThree(), digits_task, tmp_path / "model.onnx")


def test_random_outputs_are_refused_with_their_distance(digits_task: Task, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"relative error of at most 0\.0001 .*got \d"):
        to_onnx(seeded(RandomNetwork), digits_task, tmp_path / "model.onnx")


def test_failed_export_prints_nothing(digits_task: Task, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(StageError):
        to_onnx(seeded(BranchingNetwork), digits_task, tmp_path / "model.onnx")
    assert capfd.readouterr() == ("", "")


def shape(value: onnx.ValueInfoProto) -> list[str | int]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def test_label_that_utf_8_cannot_hold_is_refused_before_any_work(digits_task: Task) -> None:
    with pytest.raises(InputError, match="labels must be text that UTF-8 can hold"):
        check_task(replace(digits_task, labels=("cat", "\ud800")))


def test_augmentation_that_gives_no_inputs_is_refused_before_any_work(digits_task: Task) -> None:
    for wrong in (lambda inputs, _: inputs[0], lambda inputs, _: (inputs[0][:1],), lambda inputs, _: inputs * 2):
        with pytest.raises(InputError, match="augmentation must return a tuple of inputs like those it was given"):
            check_task(replace(digits_task, augmentation=Augmentation(1, wrong)))


def test_unlabeled_samples_without_a_target_are_refused_with_advice(digits_task: Task) -> None:
    images = torch.utils.data.TensorDataset(digits_task.train.inputs[0])
    with pytest.raises(InputError, match="-100 will do as the target of an unlabeled one"):
        check_task(replace(digits_task, unlabeled=images))
