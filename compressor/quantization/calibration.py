"""The ranges of a graph's activations, found by showing it samples."""

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from compressor.errors import InputError
from compressor.quantization.codes import Range
from compressor.quantization.float_graph import BATCH_NORM, parameter
from compressor.quantization.int8_plan import CLIPS, Int8Plan
from compressor.quantization.ranges import Histogram, RangeMethod, find_range, histogram
from compressor.task import Split, evenly_spaced, gather

_BATCH_SIZE = 64

LEAST_SAMPLES = 8
"""From fewer no range can be told: a layer may have given nothing yet on them."""
FEW_SAMPLES = 64
"""Fewer samples than this may miss much of what an activation can be."""


def calibration_samples(split: Split, count: int) -> list[int]:
    """Indices of `count` samples to calibrate on, or of all if there are fewer, spread over the calibration split.

    Raises InputError if that are fewer than `LEAST_SAMPLES`.
    """
    samples = evenly_spaced(split, count)
    if len(samples) < LEAST_SAMPLES:
        msg = f"the calibration split must have at least {LEAST_SAMPLES} samples, got {len(samples)}"
        raise InputError(msg)
    return samples


def calibrate(
    graph: GraphModule, plan: Int8Plan, split: Split, samples: Sequence[int], method: RangeMethod
) -> dict[str, Range]:
    """Return the range of each tensor that has one of its own in `plan`, by name, in one pass over the samples.

    `samples` are indices into `split`, which is used as it is, without augmentation; their order changes nothing.
    Memory grows with neither their number nor the batches'. Raises InputError naming the first weight that
    becomes int8, or layer with a range, whose numbers are not finite.
    """
    planned = {name for unit in plan.units if unit.weight for name in (unit.weight.node, unit.weight.bias)}
    for node in graph.graph.nodes:
        if node.name in planned:  # other tensors may hold infinity, as masks of attention do
            _check_finite(parameter(graph, node), node)
    seen: dict[str, Histogram] = {}
    for batch in observe(graph, plan.tensors_with_range, split, samples):
        for name, values in batch.items():
            batch_histogram = histogram(values)
            seen[name] = seen[name] + batch_histogram if name in seen else batch_histogram
    return {name: find_range(total, method) for name, total in seen.items()}


def observe(
    graph: GraphModule, names: Collection[str], split: Split, samples: Sequence[int]
) -> Iterator[Mapping[str, Tensor]]:
    """Yield what the nodes called `names` give, by name, for a batch of samples at a time.

    Raises InputError naming the first of them whose numbers are not finite.
    """
    nodes = {node.name: node for node in graph.graph.nodes}
    for start in range(0, len(samples), _BATCH_SIZE):
        interpreter = _Keeper(graph, garbage_collect_values=True)
        interpreter.kept = dict.fromkeys(names, torch.empty(0))
        with torch.no_grad():
            interpreter.run(*gather(split, samples[start : start + _BATCH_SIZE]).inputs)
        for name, values in interpreter.kept.items():
            _check_finite(values, nodes[name])
        yield interpreter.kept


class _Keeper(Interpreter):
    """Runs a graph and keeps what the nodes in `kept` give."""

    kept: dict[str, Tensor]

    def run_node(self, n: Node) -> object:
        """Run one node."""
        value: object = super().run_node(n)
        if n.name in self.kept and isinstance(value, Tensor):
            self.kept[n.name] = value.detach()  # a parameter may be quantized as an activation is
        return value


def _check_finite(values: Tensor, node: Node) -> None:
    if values.is_floating_point() and not values.isfinite().all():
        msg = f"calibration must give finite numbers, got NaN or infinity in {_place(node)}"
        raise InputError(msg)


def _place(node: Node) -> str:
    """Name the layer that gives a tensor, the parameter that it is, or the model's input."""
    if node.op == "placeholder":
        return f"the input {node.name!r}"
    if node.op == "get_attr":
        return f"the parameter {node.target!r}"
    source = node.args[0] if node.target in {*CLIPS, BATCH_NORM} else None
    if isinstance(source, Node) and source.op == "call_function":
        return _place(source)
    return f"the outputs of {node.meta['layer']!r}"
