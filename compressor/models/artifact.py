"""The models that stages pass on: a PyTorch module that can be rebuilt, or an ONNX file."""

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import onnxruntime
import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError
from safetensors.torch import save_model
from torch import Tensor, nn

from compressor.errors import InputError, StageError
from compressor.models import soft_label_file as soft_labels
from compressor.models.edits import Edit, apply_edits, name_after
from compressor.models.soft_label_file import SoftLabelFile
from compressor.models.weights import load_weights
from compressor.onnx_files.reading import external_files, load_graph
from compressor.onnx_files.runtime import ERRORS, open_session
from compressor.records.sensitivity_curves import FILE_NAME as SENSITIVITY_FILE
from compressor.records.sensitivity_curves import SensitivityCurves, read_sensitivity
from compressor.references.reference import Reference, is_path
from compressor.task import Inputs


class _Recipe(BaseModel):
    """How to rebuild the module of a saved `TorchModel`, before its weights are loaded."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    factory: Reference
    edits: tuple[Edit, ...]
    zeros: Mapping[str, NonNegativeInt] = {}


@dataclass(frozen=True)
class TorchModel:
    """A PyTorch module in evaluation mode, the factory that first built it, and the structural edits made since.

    The module is never changed: who wants to train or cut it works on a copy. It is saved as factory + edits +
    safetensors, never as a pickle, because after channel pruning `factory()` alone has other shapes.
    """

    module: nn.Module
    factory: Reference
    edits: tuple[Edit, ...] = ()
    soft_labels: SoftLabelFile | None = None
    """What this very module answered to the training samples; other weights leave it behind."""
    zeros: Mapping[str, int] = field(default_factory=dict)
    """By name of a parameter, at least how many of its values are zero: a promise that later stages keep.

    Raises StageError, whenever a model is made, if it is broken.
    """
    sensitivity: SensitivityCurves | None = None
    """How much each group of this very module matters; other weights leave it behind."""

    def __post_init__(self) -> None:
        parameters = dict(self.module.named_parameters()) if self.zeros else {}
        for name, promised in self.zeros.items():
            found = _zeros(parameters[name]) if name in parameters else "no such parameter"
            if not isinstance(found, int) or found < promised:
                msg = (
                    f"{name} must keep its {promised} zeros, got {found}; "
                    "pass the names in TorchModel.zeros to fit or distil"
                )
                raise StageError(msg)

    @classmethod
    def build(cls, reference: Reference, *, seed: int) -> "TorchModel":
        """Call the factory with torch's generator seeded, then load `weights_file` if the reference names one.

        Raises InputError if the factory gives no `nn.Module` or the weights do not fit it.
        """
        module = _call(reference.without("weights_file"), seed=seed)
        weights_file = reference.arguments.get("weights_file")
        if weights_file is not None:
            load_weights(module, weights_file)
        return cls(module, _without_weights(reference))

    def with_module(self, module: nn.Module, *edits: Edit) -> "TorchModel":
        """Return this model with other weights and, after further `edits`, another structure.

        The new weights must keep the promised `zeros`, which are counted anew in tensors of another shape.
        """
        return TorchModel(module.eval(), self.factory, self.edits + edits, zeros=self._zeros_in(module, edits))

    def _zeros_in(self, module: nn.Module, edits: tuple[Edit, ...]) -> dict[str, int]:
        promised = {}
        for name, count in self.zeros.items():
            if (now := name_after(name, edits)) is not None:
                weight = module.get_parameter(now)
                same = weight.shape == self.module.get_parameter(name).shape
                promised[now] = count if same else _zeros(weight)
        return promised

    @property
    def digest(self) -> str:
        """SHA-256 of what decides the outputs: factory with its arguments, paths aside, edits and every tensor."""
        factory = Reference.model_validate(_without_arguments(self.factory.model_dump(), is_path))
        recipe = _Recipe(factory=factory, edits=self.edits)
        digest = hashlib.sha256(recipe.model_dump_json(exclude={"zeros"}).encode())
        for name, tensor in self.module.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data if tensor.numel() else b"")
        return digest.hexdigest()

    def predict(self, inputs: Inputs) -> Tensor:
        """Outputs without gradient."""
        with torch.no_grad():
            outputs: Tensor = self.module(*inputs)
        return outputs

    def save(self, directory: Path) -> None:
        """Write `model.json`, `model.safetensors` and, if there are any, soft labels and sensitivity into `directory`.

        It must exist.
        """
        recipe = _Recipe(factory=self.factory, edits=self.edits, zeros=self.zeros)
        (directory / "model.json").write_text(recipe.model_dump_json(indent=1))
        save_model(self.module, str(directory / "model.safetensors"))
        if self.soft_labels is not None:
            shutil.copyfile(self.soft_labels.path, directory / soft_labels.FILE_NAME)
        if self.sensitivity is not None:
            (directory / SENSITIVITY_FILE).write_text(self.sensitivity.model_dump_json(indent=1))

    @classmethod
    def load(cls, directory: Path, *, among: Sequence[Reference] | None = None) -> "TorchModel":
        """Rebuild the module from a directory written by `save`, with equal weights.

        A directory that is not trusted could name any callable as its factory. With `among`, it must name one of
        these, paths aside, and that one is called. Raises InputError if it does not.
        """
        try:
            recipe = _Recipe.model_validate_json((directory / "model.json").read_bytes())
        except ValidationError as error:
            msg = f"{directory / 'model.json'} must describe a saved model, but: {error}"
            raise InputError(msg) from error
        factory = recipe.factory if among is None else _one_of(among, recipe.factory, directory)
        module = apply_edits(_call(factory, seed=0), recipe.edits)
        load_weights(module, directory / "model.safetensors")
        labels = directory / soft_labels.FILE_NAME
        curves = directory / SENSITIVITY_FILE
        return cls(
            module,
            factory,
            recipe.edits,
            soft_labels=SoftLabelFile.open(labels) if labels.exists() else None,
            zeros=recipe.zeros,
            sensitivity=read_sensitivity(curves) if curves.exists() else None,
        )


@dataclass(frozen=True)
class OnnxModel:
    """An ONNX file that later stages may finish but no longer train; external data lies beside it."""

    path: Path

    @property
    def files(self) -> tuple[Path, ...]:
        """The ONNX file, then the files of its external data. Raises InputError if it is no ONNX file."""
        try:
            return (self.path, *external_files(load_graph(self.path), self.path.parent))
        except ValueError as error:
            msg = f"{self.path} must be an ONNX model that can be read, but {error}"
            raise InputError(msg) from error

    @cached_property
    def _session(self) -> onnxruntime.InferenceSession:
        return open_session(self.path, threads=0)

    def predict(self, inputs: Inputs) -> Tensor:
        """Outputs under ONNX Runtime on the CPU, all cores. Raises InputError if the file or `inputs` cannot be run."""
        names = [node.name for node in self._session.get_inputs()]
        feeds = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        try:
            return torch.from_numpy(self._session.run(None, feeds)[0])
        except ERRORS as error:
            msg = f"{self.path} must run on inputs of shape {[tuple(tensor.shape) for tensor in inputs]}: {error}"
            raise InputError(msg) from error

    def save(self, directory: Path) -> None:
        """Copy the files into an existing directory: a link would make ONNX refuse external data."""
        for file in self.files:
            shutil.copyfile(file, directory / file.name)

    @classmethod
    def load(cls, directory: Path) -> "OnnxModel":
        """Name the one `.onnx` file of a directory written by `save`."""
        (path,) = directory.glob("*.onnx")
        return cls(path)


Artifact: TypeAlias = TorchModel | OnnxModel


def _one_of(references: Sequence[Reference], wanted: Reference, directory: Path) -> Reference:
    identity = _without_arguments(wanted.model_dump(), is_path)
    for reference in references:
        if _without_arguments(reference.model_dump(), is_path) == identity:
            return _without_weights(reference)
    names = ", ".join(sorted({reference.factory for reference in references}))
    msg = f"the factory of {directory} must be one that the pipeline names ({names}), got {wanted.factory!r}"
    raise InputError(msg)


def _without_weights(reference: Reference) -> Reference:
    """Leave out the weights files, also of references among the arguments: a saved model has weights of its own."""
    return Reference.model_validate(_without_arguments(reference.model_dump(), lambda name: name == "weights_file"))


def _without_arguments(value: Any, is_left_out: Callable[[str], bool]) -> Any:
    """Copy the plain form of a reference without some arguments of it and of the references nested in it."""
    if isinstance(value, Mapping):
        return {
            name: _without_arguments(part, is_left_out)
            for name, part in value.items()
            if not ("factory" in value and is_left_out(name))
        }
    if isinstance(value, list | tuple):
        return [_without_arguments(part, is_left_out) for part in value]
    return value


def _call(factory: Reference, *, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = factory.call()
    if not isinstance(module, nn.Module):
        msg = f"{factory.factory} must return a torch.nn.Module, got {type(module).__name__}"
        raise InputError(msg)
    return module.eval()


def _zeros(tensor: Tensor) -> int:
    return tensor.numel() - int(tensor.count_nonzero())
