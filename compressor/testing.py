"""`check_stage`: the contract that every stage, ours or foreign, must keep."""

import copy
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, get_type_hints

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compressor.models.artifact import Artifact, TorchModel
from compressor.models.trusted import Trusted, attachment_name
from compressor.stage import Stage, StageContext, trust
from compressor.task import Task

_RELOAD = """
import json
import sys
from pathlib import Path
from compressor.models.artifact import OnnxModel, TorchModel
from compressor.models.trusted import Trusted
from compressor.references.reference import Reference, load
from safetensors.torch import load_file, save_file
directory = Path(sys.argv[1])
sys.path[:0] = sys.argv[2:]
said = json.loads((directory / "said.json").read_bytes())
trusted = Trusted(
    references=tuple(map(Reference.model_validate, said["references"])),
    modules=frozenset(said["modules"]),
    attachments=tuple(map(load, said["attachments"])),
)
saved = directory / "model"
model = TorchModel.load(saved, trusted=trusted) if said["kind"] == "TorchModel" else OnnxModel.load(saved)
inputs = load_file(directory / "inputs.safetensors")
outputs = model.predict(tuple(inputs[str(i)] for i in range(len(inputs))))
save_file({"outputs": outputs}, directory / "outputs.safetensors")
"""
"""What a fresh process does with a saved artifact: it calls what a pipeline file of this stage names, as a run does."""


def check_stage(stage: Stage[Any, Any], model: TorchModel, task: Task, *, seed: int = 0) -> None:
    """Check that `stage`, applied to `model`, keeps the contract of `Stage`.

    The settings survive JSON; the input model is left as it was; the result is what the annotation of `apply` says,
    gives outputs shaped like the input's, comes out equal a second time, and gives equal outputs after it was saved
    and loaded in a fresh process, which calls no more than a run does. Raises AssertionError naming the promise that is
    broken.
    """
    loaded = type(stage).model_validate_json(stage.model_dump_json())
    _require(loaded == stage, "settings must survive JSON", f"{loaded!r} is not {stage!r}")
    before = copy.deepcopy(model.module.state_dict())
    with tempfile.TemporaryDirectory() as name:
        results = [_apply(stage, model, task, Path(name) / run, seed=seed) for run in ("first", "second")]
        after = model.module.state_dict()
        _require(before.keys() == after.keys(), "the input model must keep its tensors", f"{set(before) ^ set(after)}")
        changed = [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]
        _require(not changed, "the input model must not change", f"{changed} did")
        promised = get_type_hints(type(stage).apply)["return"]
        _require(isinstance(results[0], promised), f"apply must return {promised}", f"got {type(results[0]).__name__}")
        outputs, second = (result.predict(task.example_inputs) for result in results)
        wanted = model.predict(task.example_inputs).shape
        _require(outputs.shape == wanted, f"outputs must have the shape {tuple(wanted)}", f"got {tuple(outputs.shape)}")
        _require(torch.equal(outputs, second), "the same seed must give the same model", _distance(outputs, second))
        reloaded = _reload(results[0], task, _trust_after(model, stage), Path(name))
        _require(torch.equal(outputs, reloaded), "outputs must be equal after reloading", _distance(outputs, reloaded))


def _trust_after(model: TorchModel, stage: Stage[Any, Any]) -> Trusted:
    """What a pipeline file names that has `stage` behind the stages which `model` came from."""
    own = trust([stage], model.factory)
    builders = {edit.replacement.factory.partition(":")[0] for edit in model.edits if edit.replacement is not None}
    kinds = [type(attachment) for attachment in model.attachments]
    return replace(own, modules=own.modules | builders, attachments=(*own.attachments, *kinds))


def _apply(stage: Stage[Any, Any], model: TorchModel, task: Task, work_dir: Path, *, seed: int) -> Artifact:
    work_dir.mkdir()
    result: Artifact = stage.apply(model, task, StageContext(model, torch.device("cpu"), seed, work_dir, print))
    return result


def _reload(artifact: Artifact, task: Task, trusted: Trusted, directory: Path) -> Tensor:
    """Outputs on the example inputs of `artifact`, saved here and loaded by a fresh process."""
    (directory / "model").mkdir()
    artifact.save(directory / "model")
    inputs = {str(position): tensor.contiguous() for position, tensor in enumerate(task.example_inputs)}
    save_file(inputs, directory / "inputs.safetensors")
    said = {
        "kind": type(artifact).__name__,
        "references": [reference.model_dump(mode="json") for reference in trusted.references],
        "modules": sorted(trusted.modules),
        "attachments": [attachment_name(kind) for kind in trusted.attachments],
    }
    (directory / "said.json").write_text(json.dumps(said))
    finished = _run_python("-c", _RELOAD, str(directory), *sys.path)
    _require(finished.returncode == 0, "the result must load in a fresh process", finished.stderr)
    return load_file(directory / "outputs.safetensors")["outputs"]


def _run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)


def _require(holds: bool, rule: str, found: str) -> None:  # the condition reads first, as in assert
    if not holds:
        msg = f"{rule}, but {found}"
        raise AssertionError(msg)


def _distance(one: Tensor, other: Tensor) -> str:
    return f"they differ by up to {(one - other).abs().max().item():.3g}"
