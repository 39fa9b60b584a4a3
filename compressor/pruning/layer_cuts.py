"""What a layer loses with a channel that it reads or makes: tensors by dimension, and the sizes that count them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from torch import nn

from compressor.errors import StageError
from compressor.pruning.groups import Member, Size
from compressor.pruning.tracing import StandIn

_Conv: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
_Transposed: TypeAlias = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
_BatchNorm: TypeAlias = nn.modules.batchnorm._BatchNorm
_InstanceNorm: TypeAlias = nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d


@dataclass(frozen=True)
class Cut:
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


@dataclass(frozen=True)
class Use:
    """What a layer, or a parameter outside of layers, does with the channels of a group."""

    path: str
    cut: Cut
    channels: int | None
    """How many it has on this side; None if it treats all alike."""
    entries: Mapping[int, Sequence[int]]
    """Its own channels by those of the group."""
    makes: bool = False
    """Whether the channels are those that it gives, which others may be added to."""


def cut_of(layer: nn.Module, path: str, *, reads: bool) -> Cut:
    """What `layer` loses with a channel that it reads or makes. Raises StageError for a layer of an unknown kind."""
    for kind, cut in _CUTS:
        if isinstance(layer, kind):
            whole = cut(layer, reads)
            holder = layer.stands_for[0] if isinstance(layer, StandIn) else layer
            present = {name: dim for name, dim in whole.tensors.items() if getattr(holder, name, None) is not None}
            return replace(whole, tensors=present)
    msg = f"how {path} ({type(layer).__name__}) loses channels is not known"
    raise StageError(msg)


def recurrent_cuts(layer: nn.RNNBase, path: str) -> tuple[tuple[Member, ...], tuple[Size, ...]]:
    """What a recurrent layer itself loses with a hidden unit.

    Rows in all gates, layers and directions, and the columns that read them at the next step or in the next layer.
    """
    units, members = layer.hidden_size, []
    for name, tensor in layer.named_parameters(recurse=False):
        rows = tuple(tuple(range(unit, tensor.shape[0], units)) for unit in range(units))
        members.append(Member(path, name, 0, rows))
        # a layer above the first reads the units of each direction
        if name.startswith("weight_hh") or (name.startswith("weight_ih") and not name.startswith("weight_ih_l0")):
            columns = tuple(tuple(range(unit, tensor.shape[1], units)) for unit in range(units))
            members.append(Member(path, name, 1, columns, reads=True))
    return tuple(members), (Size(path, "hidden_size", 1),)


def _stand_in(layer: StandIn, reads: bool) -> Cut:
    if not (reads and layer.is_recurrent):
        msg = f"{layer.path} ({type(layer.stands_for[0]).__name__}) is not followed: {layer.reason}"
        raise StageError(msg)
    names = [name for name, _ in layer.stands_for[0].named_parameters() if name.startswith("weight_ih_l0")]
    return Cut(dict.fromkeys(names, 1), [("input_size", None)], reads=True)


def _conv(layer: Any, reads: bool) -> Cut:
    transposed = isinstance(layer, _Transposed)
    if layer.groups > 1 and layer.groups == layer.in_channels == layer.out_channels:
        return Cut({"weight": 0, "bias": 0}, [("in_channels", None), ("out_channels", None), ("groups", None)])
    if layer.groups > 1 and transposed:
        msg = "a transposed convolution with groups must have one per channel to be cut"
        raise StageError(msg)
    if reads:
        return Cut({"weight": 0 if transposed else 1}, [("in_channels", None)], reads=True, blocks=layer.groups)
    return Cut({"weight": 1 if transposed else 0, "bias": 0}, [("out_channels", None)], blocks=layer.groups)


def _linear(_layer: Any, reads: bool) -> Cut:
    if reads:
        return Cut({"weight": 1}, [("in_features", None)], reads=True)
    return Cut({"weight": 0, "bias": 0}, [("out_features", None)])


_SCALES = {name: 0 for name in ("weight", "bias", "running_mean", "running_var")}


def _norm(_layer: Any, _reads: bool) -> Cut:
    return Cut(_SCALES, [("num_features", None)])


def _group_norm(layer: Any, _reads: bool) -> Cut:
    if layer.num_groups == layer.num_channels:
        return Cut(_SCALES, [("num_channels", None), ("num_groups", None)])
    return Cut(_SCALES, [("num_channels", None)], averages=True, blocks=layer.num_groups)


def _layer_norm(layer: Any, _reads: bool) -> Cut:
    last = len(layer.normalized_shape) - 1
    return Cut({"weight": last, "bias": last}, [("normalized_shape", last)], averages=True)


def _embedding(_layer: Any, _reads: bool) -> Cut:
    return Cut({"weight": 1}, [("embedding_dim", None)])


def _prelu(layer: Any, _reads: bool) -> Cut:
    return Cut({"weight": 0}, [("num_parameters", None)]) if layer.num_parameters > 1 else Cut({}, ())


_CUTS: Sequence[tuple[Any, Callable[[Any, bool], Cut]]] = (
    (_Conv, _conv),
    (nn.Linear, _linear),
    (StandIn, _stand_in),
    (_BatchNorm | _InstanceNorm, _norm),
    (nn.GroupNorm, _group_norm),
    (nn.LayerNorm, _layer_norm),
    (nn.Embedding, _embedding),
    (nn.PReLU, _prelu),
)
