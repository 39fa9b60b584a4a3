"""How long each kernel takes that ONNX Runtime makes of a graph, and which nodes of the graph it stands for."""

import json
import math
import re
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import onnxruntime
import torch
from onnx import ModelProto
from torch.fx import GraphModule, Node

from compressor.errors import StageError
from compressor.export.to_onnx import capture, translate
from compressor.onnx_files.inputs import Array
from compressor.onnx_files.qdq import simplify_qdq
from compressor.onnx_files.runtime import CPU
from compressor.task import Task

_CALLS = 200
_MARK = re.compile(r"\[(\w+)\]")
_EVENT = "_kernel_time"


class Kernel(NamedTuple):
    """One kernel of one session; its time contains the microsecond or two that measuring it takes."""

    node: str | None
    """Name of the node of the torch graph whose result it gives; None for one that converts or reorders."""
    operator: str
    elements: int
    """Numbers that it gives."""
    seconds: float


def traceable(graph: GraphModule, task: Task) -> ModelProto:
    """Return `graph` in ONNX with the names of its nodes in the names of nodes and tensors.

    ONNX Runtime names a kernel after a node or a result of those it fuses. Raises StageError if torch writes other
    calls than the graph has.
    """
    program = capture(graph, task)
    calls, traced = (_calls(nodes) for nodes in (graph.graph.nodes, program.graph.nodes))
    if [node.target for node in calls] != [node.target for node in traced]:
        msg = f"torch must trace the {len(calls)} calls of the graph as they are, got {len(traced)} others"
        raise StageError(msg)
    for call, node in zip(calls, traced, strict=True):
        node.meta["nn_module_stack"] = {call.name: (call.name, "")}  # the exporter writes it beside each ONNX node
    return simplify_qdq(_mark(translate(program, task)))


def profile_kernels(path: Path, inputs: Sequence[Array]) -> tuple[Kernel, ...]:
    """The kernels of a `traceable` file in the order in which they run, on one thread; times are typical ones."""
    with tempfile.TemporaryDirectory() as directory:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(directory) / "profile")
        session = onnxruntime.InferenceSession(str(path), options, **CPU)
        feeds = {node.name: array for node, array in zip(session.get_inputs(), inputs, strict=True)}
        for _ in range(_CALLS):
            session.run(None, feeds)
        events = json.loads(Path(session.end_profiling()).read_text())
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(_EVENT):
            runs[event["args"]["node_index"]].append(event)
    return tuple(map(_kernel, runs.values()))


def _kernel(events: Sequence[dict[str, Any]]) -> Kernel:
    mark = _MARK.search(events[0]["name"])
    operator = events[0]["args"]["op_name"]
    converts = operator in {"QuantizeLinear", "DequantizeLinear"}
    outputs = events[0]["args"]["output_type_shape"]
    elements = sum(math.prod(sizes) for output in outputs for sizes in output.values())
    # whole microseconds: their mean tells more than their median, and other processes only lengthen the slower half
    faster = sorted(event["dur"] for event in events)[: (len(events) + 1) // 2]
    return Kernel(mark[1] if mark and not converts else None, operator, elements, statistics.fmean(faster) * 1e-6)


def _calls(nodes: Any) -> list[Node]:
    """Calls that give tensors; torch asks for sizes where it likes."""
    return [node for node in nodes if node.op == "call_function" and not _is_size(node)]


def _is_size(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.SymInt | int)


def _mark(model: ModelProto) -> ModelProto:
    """Return the graph with names that begin with `[name of the torch node]`, but for its own inputs and outputs."""
    marked = ModelProto()
    marked.CopyFrom(model)
    fixed = {value.name for value in marked.graph.output}
    numbers, names = count(), dict[str, str]()
    for node in marked.graph.node:
        scopes = [entry.value for entry in node.metadata_props if entry.key.endswith("name_scopes")]
        mark = re.search(r"\w+", scopes[0]) if scopes else None
        if mark is not None:
            node.name = f"[{mark[0]}]{next(numbers)}"
            names |= {name: f"[{mark[0]}]{next(numbers)}" for name in node.output if name and name not in fixed}
    for node in marked.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    return marked
