"""Weights of a module in which single numbers may become zero; refused where that would have no effect or not last."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compressor.errors import StageError
from compressor.models.layers import is_within, layer_paths, paths_matching, shared_parameters
from compressor.pruning.kept import Kept, list_reasons
from compressor.system.copying import copy_module
from compressor.task import Inputs
from compressor.text.figures import list_names

_CONVOLUTIONS = nn.modules.conv._ConvNd
_TRANSPOSED = nn.modules.conv._ConvTransposeNd


@dataclass(frozen=True)
class PrunableWeights:
    """Which weights of a module can become zero, and which stay dense."""

    dimensions: Mapping[str, int]
    """Dimension of the input channels by name of the weight."""
    dense: Kept
    """Why, by path of the layer."""


def prunable_weights(module: nn.Module, example_inputs: Inputs, *, protect: tuple[str, ...] = ()) -> PrunableWeights:
    """Find the weights of convolutions, linear layers and attention that are not protected.

    Those that are frozen, computed from others, shared between modules or without effect on the outputs stay dense.
    Raises InputError if a path of `protect` matches no layer; StageError if a weight is not finite, or none is left.
    """
    protected = {path for pattern in protect for path in paths_matching(module, pattern)}
    layers = {path: layer for path, layer in module.named_modules() if not is_within(path, protected)}
    dimensions = {
        f"{path}.{name}".lstrip("."): dimension
        for path, layer in layers.items()
        for name, dimension in _matrices(layer).items()
    }
    parameters = dict(module.named_parameters(remove_duplicate=False))
    shared = shared_parameters(module)
    dense = {name: "computed from other parameters" for name in dimensions if name not in parameters}
    dense |= {name: "frozen" for name in dimensions.keys() - dense if not parameters[name].requires_grad}
    dense |= {name: f"shared: {' = '.join(shared[name])}" for name in dimensions.keys() - dense if name in shared}
    left = [name for name in dimensions if name not in dense]
    dense |= dict.fromkeys(_list_idle(module, left, example_inputs), "without effect on the outputs")
    why = {name.rpartition(".")[0]: dense[name] for name in dimensions if name in dense}
    free = {name: dimension for name, dimension in dimensions.items() if name not in dense}
    if not free:
        msg = f"{type(module).__name__} must have a convolution or linear layer that can lose weights, got none"
        left_out = [f"protect leaves out {', '.join(protect)}"] if protect else []
        raise StageError("; ".join([msg, *left_out, *list_reasons(why, layer_paths(module))]))
    infinite = [name for name in free if not parameters[name].isfinite().all()]
    if infinite:
        msg = f"weights must be finite to be pruned, but these are not: {list_names(infinite, most=5)}"
        raise StageError(msg + "; look at the weights file, or name their layers in protect")
    return PrunableWeights(free, why)


def _matrices(layer: nn.Module) -> dict[str, int]:
    """Names of the weights of one layer, each with its dimension of input channels."""
    if isinstance(layer, _CONVOLUTIONS):
        return {"weight": 0 if isinstance(layer, _TRANSPOSED) else 1}
    if isinstance(layer, nn.Linear):
        return {"weight": 1}
    if isinstance(layer, nn.MultiheadAttention):
        names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        return {name: 1 for name in names if getattr(layer, name) is not None}
    return {}


def _list_idle(module: nn.Module, names: Sequence[str], example_inputs: Inputs) -> list[str]:
    """Names of the weights that the outputs do not depend on."""
    # gradients, not hooks: attention reads the weight of its output layer without calling it
    trial = copy_module(module).eval()
    outputs: Tensor = trial(*example_inputs)
    if not names or not outputs.requires_grad:
        return list(names)
    gradients = torch.autograd.grad(outputs.sum(), list(map(trial.get_parameter, names)), allow_unused=True)
    return [name for name, gradient in zip(names, gradients, strict=True) if gradient is None]
