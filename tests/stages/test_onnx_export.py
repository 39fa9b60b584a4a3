"""The stage that writes the file to deliver."""

from dataclasses import replace
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from pydantic import ValidationError

from compressor import OnnxModel, StageContext, Task, TorchModel
from compressor.errors import InputError
from compressor.export.to_onnx import to_onnx
from compressor.references.reference import Reference
from compressor.stages.onnx_export import OnnxExport
from tests.networks import PlainNetwork


@pytest.fixture(scope="module")
def torch_model() -> TorchModel:
    return TorchModel.build(Reference(factory="tests.networks:PlainNetwork"), seed=0)


@pytest.fixture(scope="module")
def onnx_model(torch_model: TorchModel, digits_task: Task, tmp_path_factory: pytest.TempPathFactory) -> OnnxModel:
    path = tmp_path_factory.mktemp("before") / "model.onnx"
    return to_onnx(torch_model.module, replace(digits_task, labels=()), path)


def apply(stage: OnnxExport, model: TorchModel | OnnxModel, task: Task, work_dir: Path) -> OnnxModel:
    torch_model = TorchModel(PlainNetwork(), Reference(factory="tests.networks:PlainNetwork"))
    return stage.apply(model, task, StageContext(torch_model, torch.device("cpu"), 0, work_dir, print))


def metadata(model: OnnxModel) -> dict[str, str]:
    return onnxruntime.InferenceSession(model.path).get_modelmeta().custom_metadata_map


@pytest.mark.parametrize("kind", ["torch_model", "onnx_model"])
def test_file_says_name_version_labels_and_preprocessing(
    kind: str, request: pytest.FixtureRequest, digits_task: Task, tmp_path: Path
) -> None:
    task = replace(digits_task, labels=("zero", "one"), preprocessing={"scale": 0.0625})
    stage = OnnxExport(model_name="digits", model_version="2.1")
    exported = apply(stage, request.getfixturevalue(kind), task, tmp_path)
    assert metadata(exported) == {
        "name": "digits",
        "version": "2.1",
        "labels": '["zero", "one"]',
        "preprocessing": '{"scale": 0.0625}',
    }
    assert exported.path == tmp_path / "model.onnx"


def test_finished_onnx_model_keeps_its_graph_and_outputs(
    onnx_model: OnnxModel, digits_task: Task, tmp_path: Path
) -> None:
    before = onnx_model.path.read_bytes()
    exported = apply(OnnxExport(), onnx_model, digits_task, tmp_path)
    assert onnx.load(exported.path).graph == onnx.load(onnx_model.path).graph
    assert onnx_model.path.read_bytes() == before
    for size in (1, 5):
        inputs = (digits_task.example_inputs[0][:1].expand(size, -1, -1, -1),)
        torch.testing.assert_close(exported.predict(inputs), onnx_model.predict(inputs), rtol=0, atol=0)


def test_both_ways_lead_to_the_same_bytes(
    torch_model: TorchModel, onnx_model: OnnxModel, digits_task: Task, tmp_path: Path
) -> None:
    for directory in ("direct", "finished"):
        (tmp_path / directory).mkdir()
    direct = apply(OnnxExport(), torch_model, digits_task, tmp_path / "direct")
    finished = apply(OnnxExport(), onnx_model, digits_task, tmp_path / "finished")
    assert direct.path.read_bytes() == finished.path.read_bytes()


def test_external_data_moves_with_the_file(torch_model: TorchModel, digits_task: Task, tmp_path: Path) -> None:
    for directory in ("before", "after"):
        (tmp_path / directory).mkdir()
    large = to_onnx(torch_model.module, digits_task, tmp_path / "before" / "model.onnx", inline_bytes=1000)
    assert len(large.files) == 2
    exported = apply(OnnxExport(), large, digits_task, tmp_path / "after")
    for file in large.files:
        file.unlink()
    inputs = digits_task.example_inputs
    torch.testing.assert_close(exported.predict(inputs), torch_model.predict(inputs), rtol=1e-4, atol=1e-6)


def test_model_with_a_fixed_batch_is_refused(onnx_model: OnnxModel, digits_task: Task, tmp_path: Path) -> None:
    fixed = onnx.load(onnx_model.path)
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    onnx.save(fixed, tmp_path / "fixed.onnx")
    with pytest.raises(InputError, match=r"must run on inputs of shape \[\(1, 1, 8, 8\)\]"):
        apply(OnnxExport(), OnnxModel(tmp_path / "fixed.onnx"), digits_task, tmp_path)


@pytest.mark.parametrize("settings", [{"model_name": ""}, {"model_version": 2}, {"labels": []}])
def test_settings_are_strict(settings: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        OnnxExport(**settings)
