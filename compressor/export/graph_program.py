"""A rewritten graph as a program that torch can translate, without a second trace of it."""

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental import _config
from torch.utils import _pytree as pytree

from compressor.task import Inputs


def is_traced(module: nn.Module, inputs: Inputs, open_axes: Sequence[Mapping[int, object]]) -> bool:
    """Whether `module` is a graph of functional operators, traced with exactly these axes open.

    Then a second trace would only write the same operators again.
    """
    if not isinstance(module, GraphModule):
        return False
    fed = [node for node in module.graph.nodes if node.op == "placeholder"]
    return (
        all(map(_is_plain, module.graph.nodes))
        and len(fed) == len(inputs)
        and all(
            isinstance(node.meta.get("val"), FakeTensor)
            and node.meta["val"].dtype == tensor.dtype
            and [None if axis in axes else size for axis, size in enumerate(tensor.shape)]
            == [size if isinstance(size, int) else None for size in node.meta["val"].shape]
            for node, tensor, axes in zip(fed, inputs, open_axes, strict=True)
        )
    )


def _is_plain(node: Node) -> bool:
    if node.op != "call_function":
        return node.op in {"placeholder", "get_attr", "output"}
    if isinstance(node.target, torch._ops.OpOverload):
        return not node.target._schema.is_mutable
    return getattr(node.target, "__module__", "") in {operator.__name__, "_operator"}


def program_of(graph: GraphModule, inputs: Inputs) -> ExportedProgram:
    """Return the program of a graph for which `is_traced` holds: its tensors are inputs, the rest is as it was.

    A call that was written after the trace, such as one to QUANTIZE, gets its shape and type from what it reads.
    """
    fed = [node for node in graph.graph.nodes if node.op == "placeholder"]
    fake_mode = fed[0].meta["val"].fake_mode
    parameters = dict(graph.named_parameters(remove_duplicate=False))
    tensors: dict[str, Tensor] = {**parameters, **dict(graph.named_buffers(remove_duplicate=False))}
    nodes, specs = Graph(), []
    lifted: dict[str, Node] = {}
    for name, tensor in tensors.items():
        is_parameter = name in parameters
        lifted[name] = nodes.placeholder(f"{'p' if is_parameter else 'b'}_{name.replace('.', '_')}")
        lifted[name].meta["val"] = fake_mode.from_tensor(tensor, static_shapes=True)
        kind = InputKind.PARAMETER if is_parameter else InputKind.BUFFER
        specs.append(
            InputSpec(kind, TensorArgument(lifted[name].name), name, persistent=None if is_parameter else True)
        )
    copies: dict[Node, Node] = {}
    for node in sorted(graph.graph.nodes, key=_rank):
        if node.op == "get_attr":
            copies[node] = lifted[str(node.target)]
        elif node.op == "output":
            outputs = pytree.tree_leaves(node.args[0])
            nodes.output(tuple(copies[output] for output in outputs))
        else:
            copies[node] = nodes.node_copy(node, copies.__getitem__)
            if node.op == "placeholder":
                specs.append(InputSpec(InputKind.USER_INPUT, TensorArgument(copies[node].name), None))
                continue
            copies[node].meta.setdefault("nn_module_stack", {})  # torch warns of each call without one
            if "val" not in node.meta:
                copies[node].meta["val"] = _value(copies[node], fake_mode)
    results = [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(copies[output].name), None) for output in outputs]
    called = pytree.tree_structure((tuple(inputs), {}))
    returned = pytree.tree_structure(tuple(outputs)) if len(outputs) > 1 else pytree.tree_structure(0)
    signature = ModuleCallSignature([], [], called, returned, [node.name for node in fed])
    return ExportedProgram(
        root=nn.Module(),
        graph=nodes,
        graph_signature=ExportGraphSignature(specs, results),
        state_dict=tensors,
        range_constraints={},
        module_call_graph=[ModuleCallEntry("", signature)],
        example_inputs=(tuple(inputs), {}),
    )


def _rank(node: Node) -> int:
    """Where a trace writes a node: the inputs come first, then their sizes."""
    if node.op in {"placeholder", "get_attr"}:
        return 0
    is_size = node.target is torch.ops.aten.sym_size.int and node.all_input_nodes[0].op == "placeholder"
    return 1 if is_size else 2


def _value(node: Node, fake_mode: Any) -> Any:
    """What a call gives, as a tensor without numbers."""
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda source: source.meta["val"])
    with fake_mode, torch.no_grad(), _config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        return node.target(*args, **kwargs)  # type: ignore[operator]  # only calls are asked
