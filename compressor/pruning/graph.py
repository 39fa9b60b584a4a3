"""Groups of coupled channels in convolutional and fully connected networks, from Torch-Pruning's dependency graph."""

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import nn

from compressor.errors import StageError
from compressor.pruning.groups import Group, Member, Size, check_equal, run, silenced, without
from compressor.task import Inputs

if TYPE_CHECKING:
    import torch_pruning as tp

_Conv: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
_Transposed: TypeAlias = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
_BatchNorm: TypeAlias = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
_InstanceNorm: TypeAlias = nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d


@dataclass(frozen=True)
class _Cut:
    """What a layer loses with a channel on one of its sides."""

    tensors: Mapping[str, int]
    """Dimension by name of the tensor."""
    sizes: Sequence[tuple[str, int | None]]
    """Attributes that count the channels, and the position in one that is a tuple."""
    reads: bool = False
    exact: bool = True
    blocks: int = 1
    """The layer treats its channels in so many blocks of equal size."""


def channel_groups(module: nn.Module, example_inputs: Inputs, *, protect: Sequence[str] = ()) -> tuple[Group, ...]:
    """Every group of channels that can leave `module`; those that make the output, or a layer of `protect`, cannot.

    The graph is Torch-Pruning's (DepGraph, Fang et al. 2023, arXiv 2301.12900), followed from every layer. Each group
    is proven: without every other unit the module must run, keep the shape of its outputs, and answer as if nothing
    read those units. `protect` holds paths of layers.

    Raises StageError if a layer takes no part in the forward pass or the graph does not tell how its channels are used.
    """
    module = module.eval()
    graph = _graph(module, example_inputs)
    paths = {layer: path for path, layer in module.named_modules(remove_duplicate=False)}
    shape = run(module, example_inputs).shape
    groups: dict[str, Group] = {}
    faults = {}
    for coupled in graph.get_all_groups():
        root = paths[coupled[0].dep.target.module]
        try:
            group = _group(graph, coupled, root, paths)
            makers = {member.path for member in group.members if not member.reads}
            if makers & set(protect) or group.units == 1:
                continue
            if _is_proven(module, group, example_inputs, shape):
                # the first layer is the one a reader looks for; two groups may share layers behind a concatenation
                first = next(path for path in paths.values() if path in makers and path not in groups)
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
    """Whether the group may be cut; False if it makes the output. Raises StageError if it makes something unknown."""
    plan = {group.path: tuple(range(0, group.units - group.units % 2, 2))}
    smaller = without(module, [group], plan)
    if run(smaller, example_inputs).shape != shape:
        return False
    if group.exact:
        check_equal(smaller, silenced(module, [group], plan), example_inputs)
    return True


def _graph(module: nn.Module, example_inputs: Inputs) -> "tp.DependencyGraph":
    # Its import takes a second, which a run that finds its pruned models in the store can spare.
    import torch_pruning as tp  # noqa: PLC0415

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Torch-Pruning warns where it guesses how a parameter is to be cut
        try:
            graph = tp.DependencyGraph().build_dependency(module, example_inputs)
        except (UserWarning, TypeError, RuntimeError, ValueError, LookupError, AttributeError, AssertionError) as error:
            msg = f"the structure of {type(module).__name__} must be known to be pruned, but: {error}"
            raise StageError(msg) from error
    unseen = [
        path
        for path, layer in module.named_modules()
        if isinstance(layer, _Conv | nn.Linear) and layer not in graph.module2node
    ]
    if unseen:
        msg = f"every layer must take part in the forward pass to be pruned, but {', '.join(unseen)} did not"
        raise StageError(msg)
    return graph


def _group(graph: "tp.DependencyGraph", coupled: "tp.Group", root: str, paths: Mapping[nn.Module, str]) -> Group:
    """Translate a group of all channels of the layer at `root`."""
    channels = len(coupled[0].idxs)
    found: list[tuple[str, _Cut, Mapping[int, Sequence[int]]]] = []
    for item in coupled:
        layer = item.dep.target.module
        if isinstance(layer, nn.Parameter):
            owner, _, name = graph._param_to_name[layer].rpartition(".")
            cut = _Cut({name: item.dep.target.pruning_dim}, ())
            path = owner
        elif layer in paths:
            path = paths[layer]
            out = graph.is_out_channel_pruning_fn(item.dep.handler)
            cut = _cut(layer, path, reads=not out and item is not coupled[0])
        else:
            continue  # an operation without tensors
        entries: dict[int, list[int]] = defaultdict(list)
        for channel, entry in zip(item.root_idxs, item.idxs, strict=True):
            entries[channel].append(entry)
        found.append((path, cut, entries))
    blocks = math.lcm(*(cut.blocks for _, cut, _ in found))
    units = [
        tuple(block * (channels // blocks) + unit for block in range(blocks)) for unit in range(channels // blocks)
    ]
    members, sizes = [], []
    for path, cut, entries_of in found:
        index = [tuple(entry for channel in unit for entry in entries_of[channel]) for unit in units]
        counts = {len(entry) for entry in index}
        if len(counts) > 1 or (cut.blocks > 1 and any(list(entries_of[c]) != [c] for c in range(channels))):
            msg = f"{path} uses unequal numbers of its inputs for the channels of {root}"
            raise StageError(msg)
        for name, dim in cut.tensors.items():
            members.append(Member(path, name, dim, _positions(index, cut, name, channels), reads=cut.reads))
        sizes += [Size(path, name, counts.copy().pop(), position) for name, position in cut.sizes]
    return Group(
        path=root,
        units=len(units),
        members=tuple(members),
        sizes=tuple(sizes),
        channels_per_unit=blocks,
        exact=all(cut.exact for _, cut, _ in found),
    )


def _positions(index: Sequence[tuple[int, ...]], cut: _Cut, name: str, channels: int) -> tuple[tuple[int, ...], ...]:
    """Entries of a tensor by unit: a convolution with several blocks has only the inputs of one block in its weight."""
    if not (cut.reads and cut.blocks > 1 and name == "weight"):
        return tuple(index)
    width = channels // cut.blocks
    return tuple(tuple(sorted({entry % width for entry in entries})) for entries in index)


def _cut(layer: nn.Module, path: str, *, reads: bool) -> _Cut:
    """What `layer` loses with a channel that it reads or makes. Raises StageError for a layer without a known way."""
    for kind, cut in _CUTS:
        if isinstance(layer, kind):
            found = cut(layer, reads)
            present = {name: dim for name, dim in found.tensors.items() if getattr(layer, name, None) is not None}
            return _Cut(present, found.sizes, found.reads, found.exact, found.blocks)
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


def _norm(*sizes: str, exact: bool = True) -> Callable[[Any, bool], _Cut]:
    def cut(layer: Any, _reads: bool) -> _Cut:
        tensors = {name: 0 for name in ("weight", "bias", "running_mean", "running_var")}
        return _Cut(tensors, [(name, None) for name in sizes], exact=exact, blocks=getattr(layer, "num_groups", 1))

    return cut


def _layer_norm(layer: Any, _reads: bool) -> _Cut:
    last = len(layer.normalized_shape) - 1
    return _Cut({"weight": last, "bias": last}, [("normalized_shape", last)], exact=False)


def _embedding(_layer: Any, _reads: bool) -> _Cut:
    return _Cut({"weight": 1}, [("embedding_dim", None)])


def _prelu(layer: Any, _reads: bool) -> _Cut:
    return _Cut({"weight": 0}, [("num_parameters", None)]) if layer.num_parameters > 1 else _Cut({}, ())


_CUTS: Sequence[tuple[Any, Callable[[Any, bool], _Cut]]] = (
    (_Conv, _conv),
    (nn.Linear, _linear),
    (_BatchNorm | _InstanceNorm, _norm("num_features")),
    (nn.GroupNorm, _norm("num_channels", exact=False)),
    (nn.LayerNorm, _layer_norm),
    (nn.Embedding, _embedding),
    (nn.PReLU, _prelu),
)
