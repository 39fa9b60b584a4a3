"""What a run asks of the model that a stage gives, before anything is stored."""

import copy
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from compressor.config.pipeline_file import load
from compressor.errors import ConfigError, InputError, StageError
from compressor.references.reference import foreign_errors
from compressor.run.pipeline import prepare
from compressor.run.store import Store

CODE = """
import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from compressor import Document, Finding, OnnxModel, Reference, Samples, Stage, StageContext, Task, TorchModel
from torch import nn


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def other():
    return network()


def task():
    inputs = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    def split(start):
        return Samples((inputs[start:start + 15],), torch.arange(15) % 3)
    parts = dict(train=split(0), validation=split(15), test=split(30), calibration=split(45))
    return Task(example_inputs=(inputs[:2],), **parts)


def sized(sizes):
    assert isinstance(sizes, list), sizes
    return nn.Linear(*sizes)


class Unknown(Finding):
    rank: int


class Probe(Stage[TorchModel, TorchModel]):
    what: str

    def apply(self, model: TorchModel, task: Task, context: StageContext) -> TorchModel:
        changed = copy.deepcopy(model.module)
        match self.what:
            case "nothing":
                return None
            case "onnx":
                return OnnxModel(Path("model.onnx"))
            case "no module":
                return TorchModel(None, model.factory)
            case "activation":
                changed[1] = nn.Tanh()
                return model.with_module(changed)
            case "other factory":
                return TorchModel.build(Reference(factory="probes:other"), seed=0)
            case "input":
                model.module[0] = nn.Linear(8, 8, bias=False)
                return model
            case "tuple":
                layer = model.module[0]
                return model.with_submodule("0", sized, {"sizes": (8, 8)}, layer.state_dict())
            case "finding":
                context.report(Unknown(rank=1))
                raise AssertionError("the stage goes on")


class Keeps(Probe):
    keeps_model = True

    def apply(self, model: TorchModel, task: Task, context: StageContext) -> TorchModel:
        changed = copy.deepcopy(model.module)
        nn.init.zeros_(changed[2].weight)
        return model.with_module(changed)


class Nothing(Probe):
    def apply(self, model: TorchModel, task: Task, context: StageContext) -> None:
        return None


class Perhaps(Probe):
    def apply(self, model: TorchModel, task: Task, context: StageContext) -> TorchModel | None:
        return None


class Anything(Probe):
    def apply(self, model: Any, task: Task, context: StageContext) -> Any:
        return None


class ReadsAFile(Probe):
    table_file: str


class Inherits(Probe):
    pass
"""
HEAD = "name: probe\nmodel: {factory: probes:network}\ntask: {factory: probes:task}\nstages:\n"
CPU = torch.device("cpu")


def prepare_with(directory: Path, stage: str) -> Path:
    (directory / "probes.py").write_text(CODE)
    (directory / "probe.yaml").write_text(f"{HEAD}  - {{stage: 'probes:{stage}\n")
    return prepare(load(directory / "probe.yaml"), directory / "runs/probe", device=CPU)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("nothing", "probes:Probe must give TorchModel, as it says, got NoneType"),
        ("onnx", "probes:Probe must give TorchModel, as it says, got OnnxModel"),
        ("no module", "probes:Probe must give a TorchModel of a torch.nn.Module, got NoneType"),
        ("activation", r"the same after it was saved and loaded, but its outputs differ; .*with_submodule"),
        ("other factory", r"can be loaded again, but: the factory of .* must be one that the pipeline names"),
        ("input", "can be loaded again, but: .*model.safetensors must hold exactly the tensors"),
        ("finding", r"must be given EpochLosses, Reached, Quantization or Document, got Unknown"),
    ],
)
def test_model_that_would_be_lost_or_changed_in_the_store_is_not_stored(what, message, tmp_path):
    with pytest.raises(StageError, match=message):
        prepare_with(tmp_path, f"Probe', what: {what}}}")
    assert len(list((tmp_path / "runs/probe/stages").iterdir())) == 1, "the baseline alone"


@pytest.mark.parametrize("stage", ["Nothing", "Perhaps", "Anything"])
def test_stage_that_says_to_give_something_else_than_a_model_is_refused(stage, tmp_path):
    with pytest.raises(ConfigError, match=rf"{stage}.apply must be annotated like .* with TorchModel or OnnxModel"):
        prepare_with(tmp_path, f"{stage}', what: ''}}")


def test_what_an_installed_plug_in_raises_is_told_with_its_line(tmp_path):
    file = tmp_path / "installed/elsewhere.py"
    file.parent.mkdir()
    file.write_text("def fail():\n    return {}['key']\n")
    sys.path.insert(0, str(file.parent))
    try:
        elsewhere = importlib.import_module("elsewhere")
        told = r"stage raised KeyError: 'key' \(.*elsewhere.py:2\)"
        with pytest.raises(InputError, match=told), foreign_errors("stage", "elsewhere"):
            elsewhere.fail()
    finally:
        sys.path.remove(str(file.parent))
        del sys.modules["elsewhere"]


def test_stage_that_keeps_the_model_must_keep_its_outputs(tmp_path):
    with pytest.raises(StageError, match=r"says keeps_model, so its outputs must be those .* leave keeps_model out"):
        prepare_with(tmp_path, "Keeps', what: ''}")


@pytest.mark.parametrize("stage", ["Probe", "Inherits"])
def test_arguments_of_a_replacement_are_at_once_what_the_store_gives_back(stage, tmp_path):
    assert (prepare_with(tmp_path, f"{stage}', what: tuple}}") / "model.json").exists()


def test_stage_whose_setting_is_a_file_is_refused_with_what_to_take(tmp_path):
    with pytest.raises(ConfigError, match=r"through a setting of type Reference.* but it has table_file"):
        prepare_with(tmp_path, "ReadsAFile', what: '', table_file: a}")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("model.json", None),
        (
            "model.json",
            {"factory": {"factory": "probes:network"}, "edits": [{"path": "0", "attributes": {"forward": 5}}]},
        ),
    ],
)
def test_entry_that_is_consistent_but_damaged_is_an_error_of_the_input(file, content, tmp_path):
    stored = prepare_with(tmp_path, "Probe', what: tuple}").parent
    store = Store(tmp_path / "runs/probe")
    baseline = next(entry for entry in stored.parent.iterdir() if entry != stored)
    facts = store.peek(baseline.name).facts
    with store.lock(), store.draft() as draft:
        for path in [path for path in baseline.rglob("*") if path.is_file() and path.name != "manifest.json"]:
            copied = draft / path.relative_to(baseline)
            copied.parent.mkdir(exist_ok=True)
            copied.write_bytes(path.read_bytes())
        (draft / "artifact" / file).unlink()
        if content is not None:
            (draft / "artifact" / file).write_text(json.dumps(content))
        for path in sorted(baseline.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        baseline.rmdir()
        store.commit(draft, baseline.name, copy.deepcopy(dict(facts)))
    with pytest.raises(InputError):
        prepare_with(tmp_path, "Probe', what: activation}")
