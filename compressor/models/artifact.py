"""The models that stages pass on: a PyTorch module that can be rebuilt, or an ONNX file."""

import copy
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TypeAlias, TypeVar

import onnxruntime
import torch
from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError
from safetensors.torch import save_model
from torch import Tensor, nn

from compressor.errors import InputError, StageError
from compressor.models.attachment import Attachment
from compressor.models.edits import Edit, apply_edit_in_place, apply_edits
from compressor.models.module_factory import build_module
from compressor.models.trusted import Trusted, attachment_name
from compressor.models.weights import check_finite, explain_difference, load_weights
from compressor.onnx_files.reading import external_files, load_graph
from compressor.onnx_files.runtime import ERRORS, open_session
from compressor.references.reference import Reference, is_path, load
from compressor.task import Inputs

A = TypeVar("A", bound=Attachment)


class _Recipe(BaseModel):
    """How to rebuild a saved `TorchModel`, weights aside."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    factory: Reference
    edits: tuple[Edit, ...]
    attachments: tuple[str, ...] = ()
    """Classes as `module:Class`."""


@dataclass(frozen=True)
class TorchModel:
    """A PyTorch module in evaluation mode, the factory that first built it, and the structural edits made since.

    The module is never changed: who wants to train or cut it works on a copy. It is saved as factory + edits +
    safetensors, never as a pickle, because after channel pruning `factory()` alone has other shapes.
    """

    module: nn.Module
    factory: Reference
    edits: tuple[Edit, ...] = ()
    attachments: tuple[Attachment, ...] = ()
    """What stages have added to this very module, at most one of each class."""

    @classmethod
    def build(cls, reference: Reference, *, seed: int) -> "TorchModel":
        """Call the factory with torch's generator seeded, then load `weights_file` if the reference names one.

        Raises InputError if the factory gives no `nn.Module` or the weights do not fit it.
        """
        module = build_module(reference.without("weights_file"), seed=seed)
        weights_file = reference.arguments.get("weights_file")
        if weights_file is not None:
            load_weights(module, weights_file)
        check_finite(module, reference.factory if weights_file is None else str(weights_file))
        return cls(module, _without_weights(reference))

    def with_module(self, module: nn.Module, *edits: Edit) -> "TorchModel":
        """Return this model with other weights and, after further `edits`, another structure.

        Attachments go on if they hold for the new module. Raises StageError if the tensors of `module` are not those
        that the edits leave, or an attachment's promise is broken.
        """
        expected = apply_edits(self.module, edits) if edits else self.module
        if difference := explain_difference(expected, module.state_dict()):
            msg = (
                f"a changed module must have the tensors that the edits given leave, but it has {difference}; name "
                "changed sizes by structural_edits, and replace submodules by TorchModel.with_submodule"
            )
            raise StageError(msg)
        return self._change(module, edits)

    def with_submodule(
        self,
        path: str,
        factory: Callable[..., nn.Module],
        arguments: Mapping[str, JsonValue],
        weights: Mapping[str, Tensor],
    ) -> "TorchModel":
        """Return this model with another submodule at `path`: what `factory(**arguments)` gives, holding `weights`.

        `factory` is a function at the top of the stage's own module. It is called again whenever the model is loaded,
        so `arguments` are JSON values. `weights` is a state dict for the submodule. The other tensors are shared with
        this model.

        Raises StageError if the weights do not fit, or the factory cannot be named; InputError if `path` is not there,
        or the call fails.
        """
        edit = Edit(path=path, replacement=_name_call(factory, arguments))
        tensors = (*self.module.parameters(), *self.module.buffers())
        module = copy.deepcopy(self.module, {id(tensor): tensor for tensor in tensors})
        apply_edit_in_place(module, edit)
        submodule = module.get_submodule(path)
        if difference := explain_difference(submodule, weights):
            msg = f"weights for {path!r} must be those of what {factory.__name__} gives, but they have {difference}"
            raise StageError(msg)
        submodule.load_state_dict(dict(weights))
        return self._change(module, (edit,))

    def _change(self, module: nn.Module, edits: tuple[Edit, ...]) -> "TorchModel":
        carried = (attachment.carry_over(self.module, module, edits) for attachment in self.attachments)
        kept = tuple(attachment for attachment in carried if attachment is not None)
        return TorchModel(module.eval(), self.factory, self.edits + edits, kept)

    def attachment(self, kind: type[A]) -> A | None:
        """Return what is attached of this class, or None."""
        return next((one for one in self.attachments if isinstance(one, kind)), None)

    def with_attachment(self, attachment: Attachment) -> "TorchModel":
        """Return this model with `attachment`, in the place of another one of its class."""
        others = tuple(one for one in self.attachments if type(one) is not type(attachment))
        return replace(self, attachments=(*others, attachment))

    @property
    def digest(self) -> str:
        """SHA-256 of what decides the outputs: factory with its arguments, paths aside, edits and every tensor."""
        recipe = _Recipe(factory=self.factory.strip(is_path), edits=self.edits)
        digest = hashlib.sha256(recipe.model_dump_json(exclude={"attachments"}).encode())
        for name, tensor in self.module.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data if tensor.numel() else b"")
        return digest.hexdigest()

    def check(self, trusted: Trusted, where: str) -> None:
        """Raise InputError if loading this model, once saved, would call something that `trusted` does not have."""
        trusted.check_edits(self.edits, where)
        for attachment in self.attachments:
            trusted.attachment(attachment_name(type(attachment)), where)

    def predict(self, inputs: Inputs) -> Tensor:
        """Outputs without gradient."""
        with torch.no_grad():
            outputs: Tensor = self.module(*inputs)
        return outputs

    def save(self, directory: Path) -> None:
        """Write `model.json`, `model.safetensors` and the attachments into an existing `directory`."""
        names = tuple(attachment_name(type(attachment)) for attachment in self.attachments)
        recipe = _Recipe(factory=self.factory, edits=self.edits, attachments=names)
        (directory / "model.json").write_text(recipe.model_dump_json(indent=1))
        save_model(self.module, str(directory / "model.safetensors"))
        for attachment in self.attachments:
            attachment.save(directory)

    @classmethod
    def load(cls, directory: Path, *, trusted: Trusted | None = None) -> "TorchModel":
        """Rebuild the module from a directory written by `save`, with equal weights.

        A directory that is not trusted could name any callable. With `trusted` nothing else is called than what it
        has; without, whatever the directory names. Raises InputError if it names more, or is damaged.
        """
        try:
            recipe = _Recipe.model_validate_json((directory / "model.json").read_bytes())
        except (OSError, ValidationError) as error:
            msg = f"{directory / 'model.json'} must describe a saved model, but: {error}"
            raise InputError(msg) from error
        factory = recipe.factory
        if trusted is not None:
            factory = _without_weights(trusted.factory(recipe.factory, directory))
            trusted.check_edits(recipe.edits, str(directory))
        kinds = [
            _import_attachment(name) if trusted is None else trusted.attachment(name, str(directory))
            for name in recipe.attachments
        ]
        module = apply_edits(build_module(factory, seed=0), recipe.edits)
        load_weights(module, directory / "model.safetensors")
        return cls(module, factory, recipe.edits, tuple(kind.load(directory, module) for kind in kinds))


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
        """Name the one `.onnx` file of a directory written by `save`. Raises InputError if there is not one."""
        paths = sorted(directory.glob("*.onnx"))
        if len(paths) != 1:
            msg = f"{directory} must hold one .onnx file, got {len(paths)}"
            raise InputError(msg)
        return cls(paths[0])


Artifact: TypeAlias = TorchModel | OnnxModel


def _without_weights(reference: Reference) -> Reference:
    """Leave out the weights files, also of references among the arguments: a saved model has weights of its own."""
    return reference.strip(lambda name: name == "weights_file")


def _name_call(factory: Callable[..., nn.Module], arguments: Mapping[str, JsonValue]) -> Reference:
    """Name a call, so that it can be made again. Raises StageError for a factory without a name, or other arguments."""
    name = getattr(factory, "__qualname__", repr(factory))
    if not name.isidentifier() or factory.__module__ == "__main__":
        msg = f"a submodule must be built by a function at the top of a module that can be imported, got {name}"
        raise StageError(msg)
    if reserved := [argument for argument in arguments if argument == "factory" or is_path(argument)]:
        msg = (
            f"the arguments of {name} must be neither files nor called 'factory', got {reserved}; what a file "
            "holds can be a weight"
        )
        raise StageError(msg)
    try:
        plain = json.loads(json.dumps(dict(arguments), allow_nan=False))
    except (TypeError, ValueError) as error:
        msg = f"the arguments of {name} must be JSON values, got {dict(arguments)!r}: {error}"
        raise StageError(msg) from error
    # as the next load will give them: a tuple is a list, and a number that is a key is text
    return Reference(factory=f"{factory.__module__}:{name}", **plain)


def _import_attachment(name: str) -> type[Attachment]:
    kind = load(name)
    if not (isinstance(kind, type) and issubclass(kind, Attachment)):
        msg = f"{name} must be a subclass of compressor.Attachment, got {type(kind).__name__}"
        raise InputError(msg)
    return kind
