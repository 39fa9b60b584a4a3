"""Torch-Pruning's graph of a module, or of the parts of it that it can follow, with stand-ins for what it cannot."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from compressor.models.layers import is_within
from compressor.models.outputs import FORWARD_ERRORS
from compressor.task import Inputs

if TYPE_CHECKING:
    import torch_pruning as tp

_OPAQUE = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
"""Layers whose inside Torch-Pruning fails in, or takes for operations on channels one by one."""
_CONVOLUTION_OR_LINEAR = (nn.modules.conv._ConvNd, nn.Linear)
TRACING_ERRORS = (UserWarning, *FORWARD_ERRORS)
"""What Torch-Pruning fails with where it cannot follow."""


class StandIn(nn.Module):
    """Takes the place of an output of a layer whose inside is not followed; it gives what it gets."""

    def __init__(self, path: str, layer: nn.Module, output: int, reason: str) -> None:
        super().__init__()
        self.path, self.output, self.reason = path, output, reason
        self.stands_for = (layer,)  # in a tuple: not a layer below this one
        self.in_channels: int | None = None
        self.out_channels: int | None = None

    @property
    def is_recurrent(self) -> bool:
        """Whether the layer is one of torch's that runs over all steps by itself."""
        return isinstance(self.stands_for[0], nn.RNNBase)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x`."""
        return x


@dataclass(frozen=True)
class Trace:
    """The graph of a module or a part of it."""

    graph: "tp.DependencyGraph"
    path: str
    """Of the part; empty for the whole."""
    paths: Mapping[nn.Module, str]
    """Of the layers and stand-ins, in the whole module."""

    def name_of(self, parameter: nn.Parameter) -> tuple[str, str]:
        """Path and name in the whole module of a parameter that lies outside of layers."""
        local = self.graph._param_to_name[parameter].removeprefix("part.")
        path, _, name = f"{self.path}.{local}".lstrip(".").rpartition(".")
        return path, name


@dataclass(frozen=True)
class Traced:
    """What could be followed, and what could not."""

    traces: Sequence[Trace]
    unfollowed: Mapping[str, str]
    """Innermost modules that the graph fails in, and how."""


def trace(module: nn.Module, example_inputs: Inputs) -> Traced:
    """Follow the channels of `module`, which is changed: give a copy in evaluation mode that nothing else uses.

    The graph is Torch-Pruning's (DepGraph, Fang et al. 2023, arXiv 2301.12900). Where it fails, the parts of the module
    are followed alone. The innermost that it fails in then have a stand-in, which ends what comes to it, in the graph
    of what is around them.
    """
    for parameter in module.parameters():
        # without gradient a layer would be left out of the graph
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    with torch.enable_grad():
        return _follow(module, "", _record_calls(module, example_inputs), _opaque_layers(module))


_Call: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]
_Opaque: TypeAlias = Mapping[nn.Module, tuple[str, str]]
"""Path and reason by layer."""


def _opaque_layers(module: nn.Module) -> _Opaque:
    reason = "torch runs it as one operation"
    return {layer: (path, reason) for path, layer in module.named_modules() if isinstance(layer, _OPAQUE)}


def _record_calls(module: nn.Module, example_inputs: Inputs) -> Mapping[str, _Call]:
    """What each submodule with layers gets at its first run, by path; its tensors are copies."""
    calls: dict[str, _Call] = {}

    def keep(path: str, _layer: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        calls.setdefault(path, _copy_tensors((arguments, keywords)))

    with ExitStack() as hooks, torch.no_grad():
        for path, part in module.named_modules():
            if sum(isinstance(layer, _CONVOLUTION_OR_LINEAR) for layer in part.modules()) > 1:
                hooks.enter_context(part.register_forward_pre_hook(partial(keep, path), with_kwargs=True))
        module(*example_inputs)
    return calls | {"": (tuple(example_inputs), {})}


def _copy_tensors(call: _Call) -> _Call:
    copied: _Call = tree_map(lambda part: part.detach().clone() if isinstance(part, Tensor) else part, call)
    return copied


def _follow(module: nn.Module, path: str, calls: Mapping[str, _Call], opaque: _Opaque) -> Traced:
    try:
        return Traced([_build(module, path, calls[path], opaque)], {})
    except TRACING_ERRORS as error:
        reason = explain(error)
    inner = [_follow(module, child, calls, opaque) for child in _parts(module, path, calls)]
    traces = [one for part in inner for one in part.traces]
    unfollowed = {where: why for part in inner for where, why in part.unfollowed.items()}
    if unfollowed:
        known = {module.get_submodule(where): (where, why) for where, why in unfollowed.items()}
        try:
            around = _build(module, path, calls[path], {**opaque, **known})
        except TRACING_ERRORS as error:
            reason = explain(error)
        else:
            return Traced([around, *(one for one in traces if is_within(one.path, unfollowed))], unfollowed)
    return Traced(traces, {path: reason})


def _parts(module: nn.Module, path: str, calls: Mapping[str, _Call]) -> Iterator[str]:
    """The outermost modules below `path` that were called."""
    for name, _ in module.get_submodule(path).named_children():
        child = f"{path}.{name}".lstrip(".")
        if child in calls:
            yield child
        else:
            yield from _parts(module, child, calls)


def explain(error: Exception) -> str:
    """Why a module is not followed, from what tracing it raised."""
    return f"its operations cannot be followed ({type(error).__name__}: {str(error).partition(chr(10))[0]})"


class _Part(nn.Module):
    """A module beside the stand-ins in it, so that Torch-Pruning sees both."""

    def __init__(self, part: nn.Module, stand_ins: Sequence[StandIn]) -> None:
        super().__init__()
        self.part, self.stand_ins = part, nn.ModuleList(stand_ins)


class _StandInPruner:
    """What Torch-Pruning asks of a layer that it does not know; it never prunes."""

    def prune_out_channels(self, layer: nn.Module, _idxs: Sequence[int]) -> nn.Module:
        return layer

    def prune_in_channels(self, layer: nn.Module, _idxs: Sequence[int]) -> nn.Module:
        return layer

    def get_out_channels(self, layer: StandIn) -> int | None:
        return layer.out_channels

    def get_in_channels(self, layer: StandIn) -> int | None:
        return layer.in_channels


def _build(module: nn.Module, path: str, call: _Call, opaque: _Opaque) -> Trace:
    """Torch-Pruning's graph of the module at `path`. Raises what that fails with."""
    # Its import takes a second, which a run that finds its pruned models in the store can spare.
    import torch_pruning as tp  # noqa: PLC0415

    part = module.get_submodule(path)
    hidden = {layer: opaque[layer] for layer in part.modules() if layer in opaque and layer is not part}
    stand_ins = {
        layer: [StandIn(where, layer, k, why) for k in range(3 if isinstance(layer, nn.RNNBase) else 1)]
        for layer, (where, why) in hidden.items()
    }
    every = [one for some in stand_ins.values() for one in some]
    with ExitStack() as stack:
        for layer, some in stand_ins.items():
            stack.enter_context(layer.register_forward_hook(partial(_relink, some), with_kwargs=True))
        stack.enter_context(warnings.catch_warnings())
        # it warns of what it then guesses
        warnings.filterwarnings("error", module="torch_pruning")
        graph = tp.DependencyGraph().build_dependency(
            _Part(part, every),
            _copy_tensors(call),
            forward_fn=lambda whole, inputs: whole.part(*inputs[0], **inputs[1]),
            output_transform=lambda outputs: [
                one for one in tree_leaves(outputs) if isinstance(one, Tensor) and one.grad_fn is not None
            ],
            customized_pruners={StandIn: _StandInPruner()},
            ignored_layers=[below for layer in hidden for below in layer.modules()],
            # not verbose: it would warn of parameters outside layers, whose use it guesses and the proof shows
            verbose=False,
        )
    paths = {layer: where for where, layer in module.named_modules(remove_duplicate=False)}
    return Trace(graph, path, {**paths, **{one: one.path for one in every}})


class _Relink(torch.autograd.Function):
    """Gives its first input; depends on all of them."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *_sources: Tensor) -> Tensor:  # noqa: ARG004  # torch gives it
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError


_link: Callable[..., Tensor] = _Relink.apply


def _relink(stand_ins: Sequence[StandIn], layer: nn.Module, arguments: Any, keywords: Any, outputs: Any) -> Any:
    """Outputs of `layer` that depend on its inputs in one step, each through the stand-in for it."""
    given = [one for one in tree_leaves((arguments, keywords)) if isinstance(one, Tensor) and one.is_floating_point()]
    sources = [one for one in given if one.requires_grad]
    anchor = torch.zeros((), requires_grad=True)
    leaves, structure = tree_flatten(outputs)
    relinked: list[Any] = []
    position = 0
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            stand_in = stand_ins[min(position, len(stand_ins) - 1)]
            position += 1
            stand_in.in_channels = layer.input_size if isinstance(layer, nn.RNNBase) else _channels(given[:1])
            stand_in.out_channels = _channels([leaf])
            relinked.append(stand_in(_link(leaf.detach(), anchor, *sources)))
        else:
            relinked.append(leaf)
    return tree_unflatten(relinked, structure)


def _channels(tensors: Sequence[Tensor]) -> int | None:
    shape = tensors[0].shape if tensors else ()
    return (shape[1] if len(shape) > 3 else shape[-1]) if shape else None
