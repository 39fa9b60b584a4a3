"""Remove whole channels, physically, together with everything that depends on them."""

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch_pruning as tp
from torch import nn

from compressor.errors import StageError
from compressor.task import Inputs

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)


@dataclass(frozen=True)
class Pruned:
    """A smaller module, and what became of the channels of each group of coupled layers."""

    module: nn.Module
    channels: dict[str, tuple[int, int]]
    """By the path of the group's first layer: channels kept, channels before."""


def prune_channels(module: nn.Module, example_inputs: Inputs, *, pruning_ratio: float, round_to: int) -> Pruned:
    """Return a copy of `module` without the channels of smallest magnitude in each group of coupled layers.

    The magnitude of a channel is the L2 norm over all kernels, rows and columns that leave with it (DepGraph, Fang et
    al. 2023, arXiv 2301.12900). `pruning_ratio` in (0, 1) is the share of channels that each group loses, as near as a
    multiple of `round_to` channels allows; a group keeps at least `round_to`. Layers that make the output keep all.

    Raises StageError if parameters are frozen, a layer cannot be followed or is grouped, nothing would be removed, or
    the smaller module does not run or gives outputs of another shape.
    """
    _check_prunable(module)
    pruned = copy.deepcopy(module).eval()
    shape = _output_shape(pruned, example_inputs)
    graph = _dependency_graph(pruned, example_inputs)
    magnitude = tp.importance.GroupMagnitudeImportance(p=2)
    plan: list[tuple[nn.Module, list[int]]] = []
    channels = {}
    for group in graph.get_all_groups():
        root = group[0].dep.target
        path = root.name.split(" ")[0]
        scores = magnitude(group)
        kept = channels_kept(len(scores), pruning_ratio=pruning_ratio, round_to=round_to)
        if kept < len(scores) and _makes_output(module, path, len(scores) - kept, example_inputs, shape):
            continue
        channels[path] = (kept, len(scores))
        if kept < len(scores):
            plan.append((root.module, torch.argsort(scores, stable=True)[: len(scores) - kept].tolist()))
    if not plan:
        sizes = sorted({had for _, had in channels.values()})
        msg = (
            f"pruning must remove a channel, but pruning_ratio {pruning_ratio} and round_to {round_to} leave groups of "
            f"{sizes} channels whole; lower round_to or raise pruning_ratio"
        )
        raise StageError(msg)
    for layer, removed in plan:
        _group(graph, layer, removed).prune()
    if _output_shape(pruned, example_inputs) != shape:
        msg = f"outputs must keep the shape {shape}, got {_output_shape(pruned, example_inputs)} after pruning"
        raise StageError(msg)
    return Pruned(pruned, channels)


def channels_kept(channels: int, *, pruning_ratio: float, round_to: int) -> int:
    """Multiple of `round_to` nearest to (1 - `pruning_ratio`) * `channels`, at least one, at most `channels`."""
    multiples = max(1, round(channels * (1 - pruning_ratio) / round_to))
    return min(channels, multiples * round_to)


def _check_prunable(module: nn.Module) -> None:
    # Torch-Pruning leaves layers with frozen parameters out of its graph and says nothing.
    frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
    if frozen:
        names = ", ".join(frozen[:5])
        msg = f"all parameters must have requires_grad to be pruned, but {names} are frozen; unfreeze them"
        raise StageError(msg)
    grouped = [
        path
        for path, layer in module.named_modules()
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        and layer.groups > 1
        and not layer.groups == layer.in_channels == layer.out_channels
    ]
    if grouped:
        names = ", ".join(grouped)
        msg = f"convolutions must have 1 group, or one per channel in and out, to be pruned, but {names} have others"
        raise StageError(msg)


def _dependency_graph(module: nn.Module, example_inputs: Inputs) -> tp.DependencyGraph:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Torch-Pruning warns where it guesses how a parameter is to be cut
        try:
            graph = tp.DependencyGraph().build_dependency(module, example_inputs)
        except UserWarning as warning:
            msg = f"the structure of {type(module).__name__} must be known to be pruned, but: {warning}"
            raise StageError(msg) from warning
    unseen = [p for p, layer in module.named_modules() if isinstance(layer, _LAYERS) and layer not in graph.module2node]
    if unseen:
        msg = f"every layer must take part in the forward pass to be pruned, but {', '.join(unseen)} did not"
        raise StageError(msg)
    return graph


def _group(graph: tp.DependencyGraph, layer: nn.Module, channels: Sequence[int]) -> tp.Group:
    return graph.get_pruning_group(layer, graph.get_pruner_of_module(layer).prune_out_channels, idxs=list(channels))


def _makes_output(module: nn.Module, path: str, count: int, example_inputs: Inputs, shape: torch.Size) -> bool:
    """Whether the output would change its shape with `count` channels of the layer at `path` less: tried on a copy.

    With one channel less, attention that divides its channels among heads would not run.
    """
    trial = copy.deepcopy(module).eval()
    graph = _dependency_graph(trial, example_inputs)
    _group(graph, trial.get_submodule(path), range(count)).prune()
    return _output_shape(trial, example_inputs) != shape


def _output_shape(module: nn.Module, example_inputs: Inputs) -> torch.Size:
    with torch.no_grad():
        try:
            outputs = module(*example_inputs)
        except (RuntimeError, ValueError) as error:
            msg = f"{type(module).__name__} must run after pruning, but: {error}; is a size written in its forward?"
            raise StageError(msg) from error
    shape: torch.Size = outputs.shape
    return shape
