"""Groups of coupled channels in convolutional and fully connected networks, from Torch-Pruning's dependency graph."""

import copy
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import nn

from compressor.errors import StageError
from compressor.models.outputs import FORWARD_ERRORS
from compressor.pruning.groups import Group, Member, Size, check_cut, check_unshared, run, without
from compressor.task import Inputs

if TYPE_CHECKING:
    import torch_pruning as tp

_Conv: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
_Transposed: TypeAlias = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
_BatchNorm: TypeAlias = nn.modules.batchnorm._BatchNorm
_InstanceNorm: TypeAlias = nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d
_OfAttention = nn.modules.linear.NonDynamicallyQuantizableLinear
"""The output layer of `nn.MultiheadAttention`, which uses its weight without running it."""


@dataclass(frozen=True)
class _Cut:
    """What a layer loses with a channel on one of its sides."""

    tensors: Mapping[str, int]
    """Dimension by name of the tensor."""
    sizes: Sequence[tuple[str, int | None]]
    """Attributes that count the channels, and the position in one that is a tuple."""
    reads: bool = False
    averages: bool = False
    """It averages over channels."""
    blocks: int = 1
    """The layer treats its channels in so many blocks of equal size."""


def channel_groups(module: nn.Module, example_inputs: Inputs, *, protect: Sequence[str] = ()) -> tuple[Group, ...]:
    """Every group of channels that can leave `module`; those that make the output, or a layer of `protect`, cannot.

    The graph is Torch-Pruning's (DepGraph, Fang et al. 2023, arXiv 2301.12900), followed from every layer. Each group
    is proven: without every other unit the module must run, keep the shape of its outputs, and answer as if nothing
    read those units. `protect` holds paths of layers.

    Raises StageError if a layer takes no part in the forward pass or the graph does not tell how its channels are used.
    """
    module = copy.deepcopy(module).eval()
    graph = _graph(module, example_inputs)
    paths = {layer: path for path, layer in module.named_modules(remove_duplicate=False)}
    shape = run(module, example_inputs).shape
    groups: dict[str, Group] = {}
    faults = {}
    for coupled in _find_coupled(graph):
        root = paths[coupled[0].dep.target.module]
        makers = _makers(graph, coupled, paths)
        if makers & set(protect):
            continue
        try:
            for group in _groups(graph, coupled, root, paths):
                check_unshared(module, [group])
                if group.units > 1 and _is_proven(module, group, example_inputs, shape):
                    # the first layer is the one a reader looks for; two groups may share layers behind a concatenation
                    own = makers & {member.path for member in group.members}
                    first = next((path for path in paths.values() if path in own and path not in groups), None)
                    if first is None:
                        msg = f"{root} makes channels for several uses"
                        raise StageError(msg)
                    groups[first] = replace(group, path=first)
        except StageError as error:
            faults[root] = str(error)
    if faults:
        listed = "; ".join(f"{path}: {fault}" for path, fault in faults.items())
        msg = (
            f"the channels of every layer must be known to be pruned, but: {listed}. To leave these layers whole, set "
        )
        raise StageError(msg + f"protect: [{', '.join(faults)}]")
    return tuple(groups[path] for path in paths.values() if path in groups)


def _is_proven(module: nn.Module, group: Group, example_inputs: Inputs, shape: Sequence[int]) -> bool:
    """Whether the group may be cut: not if it makes the output. Raises StageError if its use cannot be followed."""
    removal = {group.path: tuple(range(0, group.units - group.units % 2, 2))}
    smaller = without(module, [group], removal)
    if run(smaller, example_inputs).shape != shape:
        return False
    check_cut(module, [group], removal, example_inputs)
    return True


def _graph(module: nn.Module, example_inputs: Inputs) -> "tp.DependencyGraph":
    # Its import takes a second, which a run that finds its pruned models in the store can spare.
    import torch_pruning as tp  # noqa: PLC0415

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            # not verbose: it would warn of parameters outside layers, whose use it guesses and the proof shows
            graph = tp.DependencyGraph().build_dependency(module, example_inputs, verbose=False)
        except (UserWarning, *FORWARD_ERRORS) as error:
            msg = f"the structure of {type(module).__name__} must be known to be pruned, but: {error}"
            raise StageError(msg) from error
    unseen = [
        path
        for path, layer in module.named_modules()
        if isinstance(layer, _Conv | nn.Linear)
        and layer not in graph.module2node
        and not isinstance(layer, _OfAttention)
    ]
    if unseen:
        msg = f"every layer must take part in the forward pass to be pruned, but {', '.join(unseen)} did not"
        raise StageError(msg + "; take it out of the module, or let the outputs depend on it in evaluation mode too")
    return graph


def _find_coupled(graph: "tp.DependencyGraph") -> Iterator["tp.Group"]:
    """All channels of a layer with all that is coupled to them, until every layer has been seen.

    A layer with one channel is left out, as it cannot lose that. Torch-Pruning would also count as seen what this
    channel is multiplied with.
    """
    seen: set[nn.Module] = set()
    for layer in graph.module2node:
        if isinstance(layer, _Conv | nn.Linear) and layer not in seen:
            pruner = graph.get_pruner_of_module(layer)
            channels = pruner.get_out_channels(layer)
            if channels > 1:
                coupled = graph.get_pruning_group(layer, pruner.prune_out_channels, list(range(channels)))
                seen |= {
                    item.dep.target.module for item in coupled if graph.is_out_channel_pruning_fn(item.dep.handler)
                }
                yield coupled


def _makers(graph: "tp.DependencyGraph", coupled: "tp.Group", paths: Mapping[nn.Module, str]) -> set[str]:
    """Paths of the layers that have these channels in what they give."""
    layers = [item.dep.target.module for item in coupled if graph.is_out_channel_pruning_fn(item.dep.handler)]
    return {paths[layer] for layer in layers if layer in paths}


@dataclass(frozen=True)
class _Use:
    """What a layer, or a parameter outside of layers, does with the channels of a group."""

    path: str
    cut: _Cut
    channels: int | None
    """How many it has on this side; None if it treats all alike."""
    entries: Mapping[int, Sequence[int]]
    """Its own channels by those of the group."""


def _groups(
    graph: "tp.DependencyGraph", coupled: "tp.Group", root: str, paths: Mapping[nn.Module, str]
) -> Sequence[Group]:
    """Translate all channels of the layer at `root`: several groups if a concatenation joins them."""
    channels = len(coupled[0].idxs)
    uses = [use for item in coupled for use in _uses(graph, item, paths, reads=item is not coupled[0])]
    uses = [use for use in uses if use.cut.reads or use.channels != 1]  # a single channel is multiplied with all others
    for use in uses:
        _check_follows(use, root, channels)
    blocks = math.lcm(*(use.cut.blocks for use in uses))
    alike: dict[tuple[int, ...], list[tuple[int, ...]]] = defaultdict(list)
    for unit in range(channels // blocks):
        together = tuple(block * (channels // blocks) + unit for block in range(blocks))
        counts = tuple(sum(len(use.entries.get(channel, ())) for channel in together) for use in uses)
        alike[counts].append(together)
    return [_group(root, uses, units, channels) for units in alike.values()]


def _uses(
    graph: "tp.DependencyGraph", item: "tp.GroupItem", paths: Mapping[nn.Module, str], *, reads: bool
) -> Sequence[_Use]:
    """The use of an item of Torch-Pruning's group; none for an operation without tensors."""
    entries: dict[int, list[int]] = defaultdict(list)
    for channel, entry in zip(item.root_idxs, item.idxs, strict=True):
        entries[channel].append(entry)
    layer = item.dep.target.module
    if isinstance(layer, nn.Parameter):
        path, _, name = graph._param_to_name[layer].rpartition(".")
        # a scale for each channel has one axis; in any other tensor it is not known which axis the channels are
        return [_Use(path, _Cut({name: item.dep.target.pruning_dim}, ()), layer.numel(), dict(entries))]
    if layer not in paths:
        return []
    cut = _cut(layer, paths[layer], reads=reads and not graph.is_out_channel_pruning_fn(item.dep.handler))
    counted = [(getattr(layer, name), position) for name, position in cut.sizes]
    sizes = [size if position is None else size[position] for size, position in counted]
    return [_Use(paths[layer], cut, sizes[0] if sizes else None, dict(entries))]


def _check_follows(use: _Use, root: str, channels: int) -> None:
    whole = use.channels == channels and all(list(use.entries.get(c, ())) == [c] for c in range(channels))
    last = max((entry for entries in use.entries.values() for entry in entries), default=0)
    is_parameter = not use.cut.sizes and bool(use.cut.tensors)
    if (is_parameter or use.cut.blocks > 1) and not whole:
        name = f"{use.path}.{next(iter(use.cut.tensors))}".lstrip(".") if is_parameter else use.path
        msg = f"which of its channels {name} uses for those of {root} is not known"
        raise StageError(msg)
    if use.channels is not None and last >= use.channels:
        msg = f"{use.path} has fewer channels than come to it from {root}: something in between rearranges them"
        raise StageError(msg)


def _group(root: str, uses: Sequence[_Use], units: Sequence[tuple[int, ...]], channels: int) -> Group:
    """Group `units`, each some channels of the layer at `root` of which every use has equally many."""
    members, sizes = [], []
    for use in uses:
        index = [tuple(entry for channel in unit for entry in use.entries.get(channel, ())) for unit in units]
        if index[0]:
            for name, dim in use.cut.tensors.items():
                members.append(
                    Member(use.path, name, dim, _positions(index, use.cut, name, channels), reads=use.cut.reads)
                )
            sizes += [Size(use.path, name, len(index[0]), position) for name, position in use.cut.sizes]
    return Group(
        path=root,
        units=len(units),
        members=tuple(members),
        sizes=tuple(sizes),
        channels_per_unit=len(units[0]),
        averaging=tuple(use.path for use in uses if use.cut.averages),
    )


def _positions(index: Sequence[tuple[int, ...]], cut: _Cut, name: str, channels: int) -> tuple[tuple[int, ...], ...]:
    """Entries of a tensor by unit: a convolution with several blocks has only the inputs of one block in its weight."""
    if not (cut.reads and cut.blocks > 1 and name == "weight"):
        return tuple(index)
    width = channels // cut.blocks
    return tuple(tuple(sorted({entry % width for entry in entries})) for entries in index)


def _cut(layer: nn.Module, path: str, *, reads: bool) -> _Cut:
    """What `layer` loses with a channel that it reads or makes. Raises StageError for a layer of an unknown kind."""
    for kind, cut in _CUTS:
        if isinstance(layer, kind):
            whole = cut(layer, reads)
            present = {name: dim for name, dim in whole.tensors.items() if getattr(layer, name, None) is not None}
            return replace(whole, tensors=present)
    msg = f"how {path} ({type(layer).__name__}) loses channels is not known"
    raise StageError(msg)


def _conv(layer: Any, reads: bool) -> _Cut:
    transposed = isinstance(layer, _Transposed)
    if layer.groups > 1 and layer.groups == layer.in_channels == layer.out_channels:
        return _Cut({"weight": 0, "bias": 0}, [("in_channels", None), ("out_channels", None), ("groups", None)])
    if layer.groups > 1 and transposed:
        msg = "a transposed convolution with groups must have one per channel to be cut"
        raise StageError(msg)
    if reads:
        return _Cut({"weight": 0 if transposed else 1}, [("in_channels", None)], reads=True, blocks=layer.groups)
    return _Cut({"weight": 1 if transposed else 0, "bias": 0}, [("out_channels", None)], blocks=layer.groups)


def _linear(_layer: Any, reads: bool) -> _Cut:
    if reads:
        return _Cut({"weight": 1}, [("in_features", None)], reads=True)
    return _Cut({"weight": 0, "bias": 0}, [("out_features", None)])


_SCALES = {name: 0 for name in ("weight", "bias", "running_mean", "running_var")}


def _norm(_layer: Any, _reads: bool) -> _Cut:
    return _Cut(_SCALES, [("num_features", None)])


def _group_norm(layer: Any, _reads: bool) -> _Cut:
    if layer.num_groups == layer.num_channels:
        return _Cut(_SCALES, [("num_channels", None), ("num_groups", None)])
    return _Cut(_SCALES, [("num_channels", None)], averages=True, blocks=layer.num_groups)


def _layer_norm(layer: Any, _reads: bool) -> _Cut:
    last = len(layer.normalized_shape) - 1
    return _Cut({"weight": last, "bias": last}, [("normalized_shape", last)], averages=True)


def _embedding(_layer: Any, _reads: bool) -> _Cut:
    return _Cut({"weight": 1}, [("embedding_dim", None)])


def _prelu(layer: Any, _reads: bool) -> _Cut:
    return _Cut({"weight": 0}, [("num_parameters", None)]) if layer.num_parameters > 1 else _Cut({}, ())


_CUTS: Sequence[tuple[Any, Callable[[Any, bool], _Cut]]] = (
    (_Conv, _conv),
    (nn.Linear, _linear),
    (_BatchNorm | _InstanceNorm, _norm),
    (nn.GroupNorm, _group_norm),
    (nn.LayerNorm, _layer_norm),
    (nn.Embedding, _embedding),
    (nn.PReLU, _prelu),
)
