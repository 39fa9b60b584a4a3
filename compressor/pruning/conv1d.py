"""Hugging Face's `Conv1D`, a linear layer with its weight transposed, as the `nn.Linear` that it is."""

import torch

from compressor.errors import StageError
from compressor.models.artifact import TorchModel
from compressor.models.edits import Edit, apply_edits, is_conv1d
from compressor.models.layers import shared_parameters


def with_linears(model: TorchModel) -> TorchModel:
    """Return `model` with `nn.Linear` in place of every Hugging Face `Conv1D`; `model` itself if it has none.

    Tied weights stay tied. Raises StageError if a layer shares its weight with another, or if its linear layer gives
    other outputs: a class of this name with a forward of its own.
    """
    edits = tuple(Edit(path=path, linear=True) for path, layer in model.module.named_modules() if is_conv1d(layer))
    if not edits:
        return model
    _check_not_shared(model, [edit.path for edit in edits])
    module = apply_edits(model.module, edits)
    generator = torch.Generator().manual_seed(0)
    for edit in edits:
        before, after = model.module.get_submodule(edit.path), module.get_submodule(edit.path)
        weight = after.get_parameter("weight")
        inputs = torch.randn(2, 3, weight.shape[1], generator=generator).to(weight)
        with torch.no_grad():
            wanted, outputs = before(inputs), after(inputs)
        if not torch.allclose(outputs, wanted, rtol=1e-4, atol=1e-5):
            msg = (
                f"Conv1D at {edit.path!r} must compute inputs @ weight + bias, as Hugging Face's does, but the linear "
                f"layer with its weight differs by {(outputs - wanted).abs().max():.2g}; give the class another name"
            )
            raise StageError(msg)
    return model.with_module(module, *edits)


def _check_not_shared(model: TorchModel, paths: list[str]) -> None:
    shared = shared_parameters(model.module)
    for path in paths:
        if names := shared.get(f"{path}.weight"):
            msg = f"a Conv1D must have a weight of its own to become nn.Linear, but {' and '.join(names)} share one"
            raise StageError(msg)
