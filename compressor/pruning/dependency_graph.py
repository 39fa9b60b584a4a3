"""Groups of coupled channels in convolutional, recurrent and fully connected networks, from their traces."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import nn

from compressor.errors import StageError
from compressor.models.layers import is_within
from compressor.pruning.groups import Group, Member, Size, check_cut, check_free, run, runs_in_training, without
from compressor.pruning.kept import Kept
from compressor.pruning.layer_cuts import Cut, Use, cut_of, recurrent_cuts
from compressor.pruning.tracing import TRACING_ERRORS, StandIn, Trace, Traced, explain, trace
from compressor.system.copying import copy_module
from compressor.task import Inputs
from compressor.text.figures import count

if TYPE_CHECKING:
    import torch_pruning as tp

_Maker: TypeAlias = nn.modules.conv._ConvNd | nn.Linear


@dataclass(frozen=True)
class Channels:
    """What can leave a module, and which layers cannot lose channels."""

    groups: tuple[Group, ...]
    kept: Kept


def channel_groups(module: nn.Module, example_inputs: Inputs, *, protect: Sequence[str] = ()) -> Channels:
    """Every group of channels that can leave `module`; those that make the output, or a layer of `protect`, cannot.

    Each group is proven: without every other unit the module must run, keep the shape of its outputs, and answer as if
    nothing read those units. One that cannot be followed or proven is kept, under the path of its first layer.
    `protect` holds paths of layers.
    """
    module = copy_module(module).eval()
    traced = trace(copy_module(module), example_inputs)
    idle = _list_idle(module, traced)
    shape, trains = run(module, example_inputs).shape, bool(idle) and runs_in_training(module, example_inputs)
    order = [path for path, _ in module.named_modules(remove_duplicate=False)]
    kept = dict(traced.unfollowed)
    groups: dict[str, Group] = {}
    for candidate in (candidate for one in traced.traces for candidate in _candidates(one)):
        if candidate.makers & set(protect):
            continue
        try:
            for group in candidate.translate():
                check_free(module, group)
                if group.units > 1 and _is_proven(module, group, example_inputs, shape=shape, trains=trains):
                    # the first layer is the one a reader looks for; two groups may share layers behind a concatenation
                    own = candidate.makers & {member.path for member in group.members}
                    first = next((path for path in order if path in own and path not in groups), None)
                    if first is None:
                        msg = "it makes channels for several uses"
                        raise StageError(msg)
                    groups[first] = replace(group, path=first)
        except StageError as error:
            others = len(candidate.makers - {candidate.root})
            kept[candidate.root] = f"{error}" + (f" (with {count(others, 'layer')} coupled to it)" if others else "")
    kept |= dict.fromkeys(idle, "it takes no part in the forward pass in evaluation mode")
    left = {path: reason for path, reason in kept.items() if not is_within(path, protect)}
    return Channels(tuple(groups[path] for path in dict.fromkeys(order) if path in groups), left)


def _is_proven(module: nn.Module, group: Group, example_inputs: Inputs, *, shape: torch.Size, trains: bool) -> bool:
    """Whether the group may be cut: not if it makes the output. Raises StageError if its use cannot be followed."""
    removal = {group.path: tuple(range(0, group.units - group.units % 2, 2))}
    smaller = without(module, [group], removal)
    if run(smaller, example_inputs).shape != shape:
        return False
    check_cut(module, [group], removal, example_inputs)
    if trains and not runs_in_training(smaller, example_inputs):
        msg = "layers that run in training alone use its channels"
        raise StageError(msg)
    return True


def _list_idle(module: nn.Module, traced: Traced) -> list[str]:
    """Convolutions and linear layers that are in no trace, nor within what has a stand-in."""
    followed = {path for one in traced.traces for layer, path in one.paths.items() if layer in one.graph.module2node}
    hidden = {layer.path for one in traced.traces for layer in one.paths if isinstance(layer, StandIn)}
    return [
        path
        for path, layer in module.named_modules()
        if isinstance(layer, _Maker) and path not in followed and not is_within(path, [*hidden, *traced.unfollowed])
    ]


@dataclass(frozen=True)
class _Candidate:
    """All channels of a layer with all that is coupled to them."""

    root: str
    makers: frozenset[str]
    """Layers that have these channels in what they give."""
    translate: Callable[[], Sequence[Group]]
    """Raises StageError if the graph does not tell how the channels are used."""


def _candidates(trace: Trace) -> Iterator[_Candidate]:
    """Of every layer, until all have been seen.

    A layer with one channel is left out, as it cannot lose that. Torch-Pruning would also count as seen what this
    channel is multiplied with.
    """
    seen: set[nn.Module] = set()
    for layer in trace.graph.module2node:
        if isinstance(layer, _Maker) and layer not in seen and trace.graph.get_out_channels(layer) > 1:
            root = trace.paths[layer]
            try:
                coupled = _coupled(trace.graph, layer)
            except TRACING_ERRORS as error:
                yield _Candidate(root, frozenset([root]), partial(_fail, explain(error)))
                continue
            makers = [
                item.dep.target.module for item in coupled if trace.graph.is_out_channel_pruning_fn(item.dep.handler)
            ]
            seen |= set(makers)
            opaque = [item.dep.target.module for item in coupled if isinstance(item.dep.target.module, StandIn)]
            paths = {trace.paths[maker] for maker in makers if maker in trace.paths}
            paths |= {one.path for one in opaque if not one.is_recurrent}
            yield _Candidate(root, frozenset(paths), partial(_translate, trace, coupled, root))
    recurrent: dict[str, list[StandIn]] = defaultdict(list)
    for layer in trace.graph.module2node:
        if isinstance(layer, StandIn) and layer.is_recurrent:
            recurrent[layer.path].append(layer)
    for path, outputs in recurrent.items():
        yield _Candidate(path, frozenset([path]), partial(_translate_recurrent, trace, outputs, path))


def _coupled(graph: "tp.DependencyGraph", layer: nn.Module) -> "tp.Group":
    pruner = graph.get_pruner_of_module(layer)
    return graph.get_pruning_group(layer, pruner.prune_out_channels, list(range(pruner.get_out_channels(layer))))


def _fail(reason: str) -> Sequence[Group]:
    raise StageError(reason)


def _translate(trace: Trace, coupled: "tp.Group", root: str) -> Sequence[Group]:
    """Groups of all channels of the layer at `root`: several if a concatenation joins them."""
    channels = len(coupled[0].idxs)
    uses = _distinct([use for item in coupled for use in _uses(trace, item, reads=item is not coupled[0])])
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


def _translate_recurrent(trace: Trace, outputs: Sequence[StandIn], root: str) -> Sequence[Group]:
    """The group of the hidden units of a recurrent layer, each with its part in all layers and directions."""
    layer = outputs[0].stands_for[0]
    assert isinstance(layer, nn.RNNBase)
    if layer.proj_size:
        msg = "a recurrent layer with proj_size is not followed"
        raise StageError(msg)
    units, uses = layer.hidden_size, []
    for output in outputs:
        try:
            coupled = _coupled(trace.graph, output)
        except TRACING_ERRORS as error:
            raise StageError(explain(error)) from error
        found = _distinct([use for item in list(coupled)[1:] for use in _uses(trace, item, reads=True)])
        for use in found:
            _check_follows(use, root, output.out_channels or 0)
            if use.makes or use.cut.blocks > 1:
                msg = f"its outputs are added to those of {use.path}"
                raise StageError(msg)
            uses.append(replace(use, entries={unit: _of_unit(use, unit, units) for unit in range(units)}))
    group = _group(root, uses, [(unit,) for unit in range(units)], units)
    members, sizes = recurrent_cuts(layer, root)
    return [replace(group, members=(*members, *group.members), sizes=(*sizes, *group.sizes))]


def _of_unit(use: Use, unit: int, units: int) -> Sequence[int]:
    """Entries of a use that come from `unit`: one channel from each direction."""
    return [entry for channel, entries in use.entries.items() if channel % units == unit for entry in entries]


def _uses(trace: Trace, item: "tp.GroupItem", *, reads: bool) -> Sequence[Use]:
    """The use of an item of Torch-Pruning's group; none for an operation without tensors."""
    entries: dict[int, list[int]] = defaultdict(list)
    for channel, entry in zip(item.root_idxs, item.idxs, strict=True):
        entries[channel].append(entry)
    layer = item.dep.target.module
    if isinstance(layer, nn.Parameter):
        path, name = trace.name_of(layer)
        # a scale for each channel has one axis; in any other tensor it is not known which axis the channels are
        return [Use(path, Cut({name: item.dep.target.pruning_dim}, ()), layer.numel(), dict(entries))]
    if layer not in trace.paths:
        return []
    path = trace.paths[layer]
    cut = cut_of(layer, path, reads=reads and not trace.graph.is_out_channel_pruning_fn(item.dep.handler))
    holder = layer.stands_for[0] if isinstance(layer, StandIn) else layer
    counted = [(getattr(holder, name), position) for name, position in cut.sizes]
    sizes = [size if position is None else size[position] for size, position in counted]
    makes = not cut.reads and isinstance(layer, _Maker) and getattr(layer, "groups", 1) == 1
    return [Use(path, cut, sizes[0] if sizes else None, dict(entries), makes)]


def _distinct(uses: Sequence[Use]) -> list[Use]:
    """Leave out a use that is there already: a recurrent layer reads once, and has several outputs."""
    return [use for position, use in enumerate(uses) if use not in uses[:position]]


def _check_follows(use: Use, root: str, channels: int) -> None:
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


def _group(root: str, uses: Sequence[Use], units: Sequence[tuple[int, ...]], channels: int) -> Group:
    """Group `units`, each some channels of the layer at `root` of which every use has equally many."""
    members, sizes = [], []
    for use in uses:
        index = [tuple(entry for channel in unit for entry in use.entries.get(channel, ())) for unit in units]
        if len({len(entries) for entries in index}) > 1:
            msg = f"{use.path} uses more channels of one unit than of another"
            raise StageError(msg)
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


def _positions(index: Sequence[tuple[int, ...]], cut: Cut, name: str, channels: int) -> tuple[tuple[int, ...], ...]:
    """Entries of a tensor by unit: a convolution with several blocks has only the inputs of one block in its weight."""
    if not (cut.reads and cut.blocks > 1 and name == "weight"):
        return tuple(index)
    width = channels // cut.blocks
    return tuple(tuple(sorted({entry % width for entry in entries})) for entries in index)
