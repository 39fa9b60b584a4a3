"""What must hold of the model that a stage gives before it is stored: its type, its outputs, that it can be loaded."""

from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn

from compressor.errors import InputError, StageError
from compressor.export.parity import FLOAT_TOLERANCE
from compressor.models.artifact import Artifact, OnnxModel, TorchModel
from compressor.models.outputs import relative_error, run_on_examples
from compressor.models.trusted import Trusted
from compressor.stage import Stage
from compressor.task import Task


def check_type(given: object, stage: Stage[Any, Any], name: str) -> None:
    """Raise StageError unless `given` is what the annotations of `apply` say, an ONNX model as the path of a file."""
    promised = get_type_hints(type(stage).apply)["return"]
    if not isinstance(given, promised):
        msg = f"{name} must give {getattr(promised, '__name__', promised)}, as it says, got {type(given).__name__}"
        raise StageError(msg)
    if isinstance(given, TorchModel) and not isinstance(given.module, nn.Module):
        msg = f"{name} must give a TorchModel of a torch.nn.Module, got {type(given.module).__name__}"
        raise StageError(msg)
    if isinstance(given, OnnxModel) and not (isinstance(given.path, Path) and given.path.suffix == ".onnx"):
        msg = f"{name} must give an OnnxModel with the Path of an .onnx file, got {given.path!r}"
        raise StageError(msg)
    if isinstance(given, OnnxModel) and not given.path.is_file():
        msg = f"{name} must give an OnnxModel of a file that is there, but {given.path} is not"
        raise StageError(msg)


def check_kept(entered: Artifact, given: Artifact, stage: Stage[Any, Any], task: Task, name: str) -> None:
    """Raise StageError if a stage that says it keeps the model gives other outputs on the example inputs."""
    if not stage.keeps_model:
        return
    error = relative_error(given.predict(task.example_inputs), entered.predict(task.example_inputs))
    if not error <= FLOAT_TOLERANCE:
        msg = (
            f"{name} says keeps_model, so its outputs must be those of the model that entered, but they differ by "
            f"{error:.2g} (relative RMS); leave keeps_model out"
        )
        raise StageError(msg)


def check_reload(given: Artifact, directory: Path, task: Task, trusted: Trusted, name: str) -> None:
    """Raise StageError unless the model saved in `directory` comes back with equal outputs on the example inputs.

    The next stage starts from what was saved, and what is not saved would be lost without a word.
    """
    if not isinstance(given, TorchModel):
        return
    outputs = run_on_examples(given.module, task.example_inputs, f"the model that {name} gives")
    try:
        loaded = TorchModel.load(directory, trusted=trusted).predict(task.example_inputs)
    except InputError as error:
        msg = f"{name} must give a model that can be loaded again, but: {error}"
        raise StageError(msg) from error
    if not (isinstance(outputs, Tensor) and torch.equal(outputs.nan_to_num(), loaded.nan_to_num())):
        msg = (
            f"{name} must give a model that is the same after it was saved and loaded, but its outputs differ; what is "
            "no tensor and no size, such as an activation or a stride, is changed by TorchModel.with_submodule"
        )
        raise StageError(msg)
