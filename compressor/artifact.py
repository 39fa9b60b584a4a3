"""The models that stages pass on: a PyTorch module that can be rebuilt, or an ONNX file."""

import copy
import hashlib
import pickle
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import onnxruntime
import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_model
from torch import Tensor, nn

from compressor import soft_labels
from compressor.errors import InputError, StageError
from compressor.onnx_reading import external_files, load_graph
from compressor.plugins import Reference, is_path
from compressor.report import sensitivity as sensitivity_file
from compressor.report.records import Sensitivity
from compressor.report.sensitivity import read_sensitivity
from compressor.runtime import ERRORS, open_session
from compressor.soft_labels import SoftLabels
from compressor.task import Inputs


class Edit(BaseModel):
    """What a structural change made of one submodule: its class, the children that a stack kept, then sizes by name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    linear: bool = False
    """Whether a Hugging Face `Conv1D` became an `nn.Linear` with the same weights."""
    children: tuple[str, ...] | None = None
    """Names, before the edit, of the children that an `nn.Sequential` or `nn.ModuleList` keeps; then they count from 0.

    Later edits name submodules as this one leaves them.
    """
    attributes: Mapping[str, int | tuple[int, ...]] = {}
    shapes: Mapping[str, tuple[NonNegativeInt, ...]] = {}


def structural_edits(before: nn.Module, after: nn.Module) -> tuple[Edit, ...]:
    """List the sizes by which `after` differs from `before`, a module with the same submodules.

    Linear layers may stand in place of Hugging Face's `Conv1D`.

    Raises StageError if a submodule was added, removed or replaced by another class, or if a buffer that is not saved
    was resized.
    """
    old, new = dict(before.named_modules()), dict(after.named_modules())
    linears = tuple(
        Edit(path=path, linear=True)
        for path, module in new.items()
        if isinstance(module, nn.Linear) and path in old and is_conv1d(old[path])
    )
    if linears:
        old = dict(apply_edits(before, linears).named_modules())
    if {path: type(module) for path, module in old.items()} != {path: type(module) for path, module in new.items()}:
        msg = "sizes can be compared only of modules with the same submodules"
        raise StageError(msg)
    edits = list(linears)
    for path, module in new.items():
        attributes = {name: size for name, size in _sizes(module).items() if _sizes(old[path]).get(name) != size}
        shapes = {name: shape for name, shape in _shapes(module).items() if _shapes(old[path]).get(name) != shape}
        unsaved = shapes.keys() & module._non_persistent_buffers_set
        if unsaved:
            msg = f"a buffer that changes its size must be saved, but {path}.{min(unsaved)} has persistent=False"
            raise StageError(msg)
        if attributes or shapes:
            edits.append(Edit(path=path, attributes=attributes, shapes=shapes))
    return tuple(edits)


def apply_edits(module: nn.Module, edits: tuple[Edit, ...]) -> nn.Module:
    """Return a copy of `module` changed by `edits`, in order; resized tensors hold zeros until weights are loaded.

    Raises InputError if an edit does not fit the module.
    """
    edited = copy.deepcopy(module)
    for edit in edits:
        apply_edit_in_place(edited, edit)
    return edited


def apply_edit_in_place(module: nn.Module, edit: Edit) -> None:
    """Change `module` by `edit`; resized tensors hold zeros. Raises InputError if the edit does not fit."""
    try:
        submodule = module.get_submodule(edit.path)
    except AttributeError as error:
        msg = f"an edit must name a submodule of {type(module).__name__}, got {edit.path!r}: {error}"
        raise InputError(msg) from error
    if edit.linear:
        submodule = _become_linear_in_place(module, edit.path)
    if edit.children is not None:
        _keep_children_in_place(submodule, edit.path, edit.children)
    for name, size in edit.attributes.items():
        setattr(submodule, name, size)
    known = _shapes(submodule)
    for name, shape in edit.shapes.items():
        if name not in known:
            msg = f"an edit of {edit.path} must resize tensors that it has ({', '.join(known) or 'none'}), got {name!r}"
            raise InputError(msg)
        tensor = getattr(submodule, name)
        resized = tensor.detach().new_zeros(shape)
        is_parameter = isinstance(tensor, nn.Parameter)
        setattr(submodule, name, nn.Parameter(resized, tensor.requires_grad) if is_parameter else resized)


def is_conv1d(layer: nn.Module) -> bool:
    """Whether `layer` is Hugging Face's `Conv1D`, told by its name and shapes: weight (in, out), bias (out,)."""
    shapes = _shapes(layer)
    weight = shapes.get("weight", ())
    return type(layer).__name__ == "Conv1D" and len(weight) == 2 and shapes == {"weight": weight, "bias": weight[1:]}


def _become_linear_in_place(module: nn.Module, path: str) -> nn.Linear:
    conv1d = module.get_submodule(path)
    if not is_conv1d(conv1d) or not path:
        msg = f"only a Conv1D below the model can become nn.Linear, got {type(conv1d).__name__} at {path!r}"
        raise InputError(msg)
    weight, bias = conv1d.get_parameter("weight"), conv1d.get_parameter("bias")
    linear = nn.Linear(weight.shape[0], weight.shape[1], device="meta").train(conv1d.training)
    linear.weight = nn.Parameter(weight.detach().T.contiguous(), weight.requires_grad)
    linear.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
    module.set_submodule(path, linear)
    return linear


def _keep_children_in_place(stack: nn.Module, path: str, names: tuple[str, ...]) -> None:
    if not isinstance(stack, nn.Sequential | nn.ModuleList):
        msg = f"only nn.Sequential and nn.ModuleList can lose children, got {type(stack).__name__} at {path!r}"
        raise InputError(msg)
    # named_children would leave out a child that stands in the stack twice
    children = dict(stack._modules)
    if not names or [name for name in children if name in names] != list(names):
        msg = f"the children kept of {path!r} must be some of {', '.join(children)}, in this order, got {list(names)}"
        raise InputError(msg)
    stack._modules.clear()
    for position, name in enumerate(names):
        stack.add_module(str(position), children[name])


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return {name: tuple(tensor.shape) for name, tensor in tensors}


def _zeros(tensor: Tensor) -> int:
    return tensor.numel() - int(tensor.count_nonzero())


def _name_after(name: str, edits: tuple[Edit, ...]) -> str | None:
    """Name of a parameter after stacks lost children, which are counted anew; None if it went with them."""
    for edit in edits:
        prefix = f"{edit.path}." if edit.path else ""
        if edit.children is not None and name.startswith(prefix):
            child, _, rest = name.removeprefix(prefix).partition(".")
            if child not in edit.children:
                return None
            name = f"{prefix}{edit.children.index(child)}.{rest}"
    return name


def _sizes(module: nn.Module) -> dict[str, int | tuple[int, ...]]:
    def is_size(value: object) -> bool:
        if isinstance(value, tuple):
            return all(isinstance(part, int) for part in value)
        return isinstance(value, int) and not isinstance(value, bool)

    return {name: value for name, value in vars(module).items() if is_size(value)}


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
    soft_labels: SoftLabels | None = None
    """What this very module answered to the training samples; other weights leave it behind."""
    zeros: Mapping[str, int] = field(default_factory=dict)
    """By name of a parameter, at least how many of its values are zero: a promise that later stages keep.

    Raises StageError, whenever a model is made, if it is broken.
    """
    sensitivity: Sensitivity | None = None
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
            if (now := _name_after(name, edits)) is not None:
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
            (directory / sensitivity_file.FILE_NAME).write_text(self.sensitivity.model_dump_json(indent=1))

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
        curves = directory / sensitivity_file.FILE_NAME
        return cls(
            module,
            factory,
            recipe.edits,
            soft_labels=SoftLabels.open(labels) if labels.exists() else None,
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


def load_weights(module: nn.Module, file: Path) -> None:
    """Load a state dict into `module`, in place, from `.safetensors`, or from `.pt`/`.pth` with `weights_only=True`.

    Raises InputError if the file cannot be read safely or its names and shapes are not exactly the module's.
    """
    try:
        if file.suffix == ".safetensors":
            state = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        msg = f"{file} must hold tensors only, but it holds other Python objects; save its state_dict as .safetensors"
        raise InputError(msg) from error
    except (SafetensorError, OSError, EOFError, RuntimeError) as error:
        msg = f"{file} must be a readable weights file (.safetensors or .pt): {error}"
        raise InputError(msg) from error
    if not isinstance(state, Mapping):
        msg = f"{file} must hold a state dict, a mapping of names to tensors, got {type(state).__name__}"
        raise InputError(msg)
    _check_names_and_shapes(module, state, file)
    module.load_state_dict(state, strict=False)


def _check_names_and_shapes(module: nn.Module, state: Mapping[str, Tensor], file: Path) -> None:
    wanted = module.state_dict()
    # safetensors stores a tensor that two modules share once, under one of its names
    stored = {tensor.data_ptr() for name, tensor in wanted.items() if name in state}
    missing = [name for name, tensor in wanted.items() if name not in state and tensor.data_ptr() not in stored]
    unexpected = [name for name in state if name not in wanted]
    shapes = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in state and state[name].shape != tensor.shape
    ]
    faults = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    listed = [f"{len(names)} {kind}: {', '.join(names[:10])}" for kind, names in faults.items() if names]
    if listed:
        msg = f"{file} must hold exactly the tensors of {type(module).__name__}, but it has " + "; ".join(listed)
        raise InputError(msg)


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
