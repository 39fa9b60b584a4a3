"""The cheapest division of layers between int8 and float, given what each and every change between them costs."""

import math
from collections import defaultdict, deque
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple, TypeAlias


class Times(NamedTuple):
    """What a layer costs in either form; any unit, but one for all."""

    int8: float
    float32: float


class Handover(NamedTuple):
    """A tensor between layers, converted once if layers in int8 and layers in float need it."""

    producer: str | None
    """The layer that gives it; None if it is float whatever is chosen."""
    readers: frozenset[str]
    read_as_float: bool
    """Whether something reads it as float whatever is chosen."""
    time: float
    """Of a conversion; infinite for layers that must have one form."""


def total_time(layers: Mapping[str, Times], handovers: Sequence[Handover], floats: Collection[str]) -> float:
    """Time of all layers and conversions if the layers `floats` compute in float and the others in int8."""
    time = sum(times.float32 if name in floats else times.int8 for name, times in layers.items())
    for handover in handovers:
        gives_float = handover.producer is None or handover.producer in floats
        if gives_float:
            converts = any(reader not in floats for reader in handover.readers)
        else:
            converts = handover.read_as_float or any(reader in floats for reader in handover.readers)
        time += handover.time if converts else 0.0
    return time


def find_cheapest(layers: Mapping[str, Times], handovers: Sequence[Handover]) -> frozenset[str]:
    """The layers that compute in float where `total_time` is least, the most of them if several choices cost the same.

    The result is exact: the least total is a minimum cut between int8 and float (Picard and Ratliff 1975). A layer is a
    node with an edge to either side; that of the other side is cut, at the cost of the layer's time. A tensor is two
    nodes, of which an edge is cut if it is converted.
    """
    edges: dict[_Node, dict[_Node, float]] = defaultdict(lambda: defaultdict(float))
    for name, times in layers.items():
        edges[_INT8][name] += times.float32
        edges[name][_FLOAT] += times.int8
    for index, (producer, readers, read_as_float, time) in enumerate(handovers):
        source = _FLOAT if producer is None else producer
        dequantized, quantized = (index, "dequantized"), (index, "quantized")
        edges[quantized][source] += time
        if producer is not None:
            edges[source][dequantized] += time
        if read_as_float:
            edges[dequantized][_FLOAT] = math.inf
        for reader in readers:
            edges[dequantized][reader] = math.inf
            edges[reader][quantized] = math.inf
    int8 = _side_of_source(edges, _INT8, _FLOAT)
    return frozenset(layers.keys() - int8)


_Node: TypeAlias = str | tuple[int, str]
_INT8: _Node = (-1, "int8")
_FLOAT: _Node = (-1, "float")


def _side_of_source(edges: Mapping[_Node, Mapping[_Node, float]], source: _Node, sink: _Node) -> set[_Node]:
    """Nodes on the source's side of the smallest minimum cut, by the flow of Edmonds and Karp (1972)."""
    left: dict[_Node, dict[_Node, float]] = defaultdict(lambda: defaultdict(float))
    for tail, heads in edges.items():
        for head, capacity in heads.items():
            left[tail][head] += capacity
    nothing = 1e-12 * sum(edges[source].values())  # what rounding leaves of a full edge
    while True:
        before: dict[_Node, _Node] = {source: source}
        queue = deque([source])
        while queue and sink not in before:
            tail = queue.popleft()
            for head, capacity in left[tail].items():
                if capacity > nothing and head not in before:
                    before[head] = tail
                    queue.append(head)
        if sink not in before:
            return set(before)
        path = [sink]
        while path[-1] != source:
            path.append(before[path[-1]])
        flow = min(left[tail][head] for head, tail in pairwise(path))
        for head, tail in pairwise(path):
            left[tail][head] -= flow
            left[head][tail] += flow
