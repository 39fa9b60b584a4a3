"""Which layers of an int8 model compute in float, because that is faster on this machine."""

import math
import operator
import tempfile
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from torch import Tensor
from torch.fx import GraphModule, Node

from compressor.measure.latency import time_models
from compressor.onnx_files.inputs import Array
from compressor.quantization.assignment import Handover, Times, find_cheapest, total_time
from compressor.quantization.calibration import calibrate
from compressor.quantization.conversion import affine_of, convert, round_weights
from compressor.quantization.float_graph import arguments, is_parameter, shape
from compressor.quantization.int8_plan import CLIPS, Int8Plan, plan_int8
from compressor.quantization.kernels import Kernel, profile_kernels, traceable
from compressor.records.measurements import Latency
from compressor.task import Task, evenly_spaced
from compressor.text.figures import list_names

_SAMPLES = 8
"""Of the calibration split; times do not depend on ranges, but which clips vanish does."""
TIMING_SECONDS = 4.0
"""Most seconds that each model is timed."""
_PRECISION = 0.01
_MIXTURES = 2
"""How many models in which some layers are int8 and others float are tried at most."""
_WORTH_TRYING = 0.02
"""Share of the time that a mixture must promise to save."""


@dataclass(frozen=True)
class Choice:
    """The layers that compute in float, and how fast that is: time of the float model / time of this one."""

    floats: tuple[str, ...]
    """In the order of the graph; their weights are stored as int8 all the same."""
    layers: int
    """How many could be int8."""
    speed: Latency
    int8_speed: Latency
    """Of the model with all of them in int8."""

    def __str__(self) -> str:
        if not self.floats:
            return f"int8 is {_interval(self.speed)} times as fast as float here; no layer needs to compute in float"
        reason = f"all in int8 would be {_interval(self.int8_speed)} times as fast as float here"
        if len(self.floats) == self.layers:
            return f"all layers compute in float, with weights stored as int8: {reason}"
        return f"{list_names(self.floats)} compute in float: {reason}, this is {_interval(self.speed)}"


def choose_fastest(graph: GraphModule, task: Task, *, weight_limit: int, keep_float: Collection[str] = ()) -> Choice:
    """Choose the layers of a folded float graph that should be in `compute_float` of `plan_int8`.

    The model is profiled with all layers in int8 and with all in float. Layers are then divided so that the sum of
    their times and of the conversions between them is least. As a profile is only a guess, the whole models are timed
    in turns, for a batch of one on one thread: a profile lengthens small kernels, and it does not know which kernels
    ONNX Runtime cannot fuse in a mixture. If a mixture takes longer than guessed, conversions are taken to be longer,
    and another mixture is tried. What is chosen is faster than float, or is float. Raises StageError if torch cannot
    trace or translate the graph.
    """
    inputs = tuple(tensor[:1].numpy() for tensor in task.example_inputs)
    spelled, whole = plan_int8(graph, keep_float=keep_float)
    layers = tuple(dict.fromkeys(unit.layer for unit in whole.units if unit.inputs))
    with tempfile.TemporaryDirectory() as directory:

        def write(floats: Collection[str]) -> Path:
            path = Path(directory) / f"{len(paths)}.onnx"
            onnx.save(_model(graph, task, weight_limit, keep_float, floats), path)
            return path

        paths: dict[frozenset[str], Path] = {}
        for floats in (frozenset(layers), frozenset[str]()):
            paths[floats] = write(floats)
        timed = _time(paths, inputs)
        float_model, int8_model = (
            _without_overhead(profile_kernels(path, inputs), whole=_seconds(timed, floats))
            for floats, path in paths.items()
        )
        owners = _owners(spelled, whole)
        owners |= {node.name: node.meta["layer"] for node in graph.graph.nodes if node.meta.get("layer") in layers}
        times = _times(layers, owners, float_model, int8_model)
        handovers = _handovers(spelled, whole, owners, _Conversion.from_profile((*float_model, *int8_model)))
        ties = _ties(handovers, set(_by_layer(float_model, owners)), owners, whole)
        for _ in range(_MIXTURES):
            mixed = find_cheapest(times, [*handovers, *ties])
            least = min(_seconds(timed, floats) for floats in timed)
            if mixed in paths or total_time(times, handovers, mixed) > least * (1 - _WORTH_TRYING):
                break
            paths[mixed] = write(mixed)
            timed = _time(paths, inputs)
            handovers = _stretch(times, handovers, mixed, _seconds(timed, mixed))
    candidates = sorted(timed, key=len, reverse=True)
    latencies = [timed[floats] for floats in candidates]
    best = index_of_fastest(latencies)
    floats = candidates[best]
    return Choice(tuple(layer for layer in layers if layer in floats), len(layers), latencies[best], latencies[-1])


def index_of_fastest(latencies: Sequence[Latency]) -> int:
    """Index of the model to take. The first is wholly float; the others have ever more layers in int8.

    If none is surely faster than the first, it is the first. Else it is the last of those that are surely faster and
    cannot be told from the fastest.
    """
    faster = [latency for latency in latencies[1:] if latency.ratio_low > 1]
    if not faster:
        return 0
    best = max(faster, key=lambda latency: latency.ratio)
    return max(index for index, found in enumerate(latencies) if found in faster and found.ratio_high >= best.ratio_low)


def islands(graph: GraphModule, plan: Int8Plan) -> tuple[str, ...]:
    """Layers that compute in float between int8 layers: they read what one gives, and give what another reads.

    They have no int8 kernel, as LayerNorm and GELU, and each costs conversions around it. A clip that is read as uint8
    is none of them: its bounds are where the codes end. In the order of the graph.
    """
    computing = [unit for unit in plan.units if unit.inputs]
    inside = _owners(graph, plan)
    read = {name for unit in computing for name in unit.inputs}
    after: set[Node] = set()
    for node in graph.graph.nodes:
        reads = any(source.name in inside or source in after for source in node.all_input_nodes)
        if reads and node.op == "call_function" and node.name not in inside:
            after.add(node)
    before: set[Node] = set()
    for node in reversed(graph.graph.nodes):
        if node in after and (node.name in read or any(user in before for user in node.users)):
            before.add(node)
    return tuple(
        dict.fromkeys(
            str(node.meta["layer"])
            for node in graph.graph.nodes
            if node in before and isinstance(node.meta["val"], Tensor) and node.target is not operator.getitem
            if node.target not in CLIPS or node.name not in read
        )
    )


def _model(
    graph: GraphModule, task: Task, weight_limit: int, keep_float: Collection[str], floats: Collection[str]
) -> onnx.ModelProto:
    planned, plan = plan_int8(graph, keep_float=keep_float, compute_float=floats)
    samples = evenly_spaced(task.calibration, _SAMPLES)
    affines = affine_of(plan, calibrate(planned, plan, task.calibration, samples, "minmax"))
    return traceable(convert(planned, plan, affines, round_weights(planned, plan, affines, weight_limit)), task)


def _time(paths: Mapping[frozenset[str], Path], inputs: Sequence[Array]) -> dict[frozenset[str], Latency]:
    """Time the models side by side; ratios are to the first."""
    latencies, _ = time_models(tuple(paths.values()), inputs=inputs, precision=_PRECISION, max_seconds=TIMING_SECONDS)
    return dict(zip(paths, latencies, strict=True))


def _seconds(timed: Mapping[frozenset[str], Latency], floats: frozenset[str]) -> float:
    """Time of one model by its ratio, which is surer than a median of its own."""
    return next(iter(timed.values())).p50_ms / 1e3 / timed[floats].ratio


def _without_overhead(profile: Sequence[Kernel], *, whole: float) -> list[Kernel]:
    """Take the profile's overhead, its time beyond that of the `whole` model in seconds, off all kernels alike."""
    overhead = max(0.0, sum(kernel.seconds for kernel in profile) - whole) / len(profile)
    return [kernel._replace(seconds=max(kernel.seconds - overhead, kernel.seconds / 10)) for kernel in profile]


def _times(
    layers: Collection[str], owners: Mapping[str, str], float_model: Sequence[Kernel], int8_model: Sequence[Kernel]
) -> dict[str, Times]:
    """Seconds of each layer in either form; what the float model reorders is shared out among its layers."""
    in_float, in_int8 = _by_layer(float_model, owners), _by_layer(int8_model, owners)
    own = sum(kernel.seconds for kernel in float_model if kernel.node is not None)
    whole = sum(kernel.seconds for kernel in float_model)
    return {layer: Times(in_int8.get(layer, 0.0), in_float.get(layer, 0.0) * whole / own) for layer in layers}


def _by_layer(profile: Iterable[Kernel], owners: Mapping[str, str]) -> dict[str, float]:
    seconds: dict[str, float] = defaultdict(float)
    for kernel in profile:
        if kernel.node is not None and kernel.node in owners:
            seconds[owners[kernel.node]] += kernel.seconds
    return dict(seconds)


def _ties(
    handovers: Sequence[Handover], with_kernels: Collection[str], owners: Mapping[str, str], plan: Int8Plan
) -> list[Handover]:
    """Pairs of layers that must have the same form, int8 or float, because ONNX Runtime fuses them in float.

    The profile has one time for both, so nothing is known of either alone. Of a fused pair only one layer has a kernel
    of its name. A layer with a weight and without such a kernel is tied to the layers that read it. One without a
    weight is tied to the last layer that it reads.
    """
    weighted = {unit.layer for unit in plan.units if unit.weight is not None}
    fused = set(owners.values()).difference(with_kernels)
    last = {reader: one.producer for one in handovers for reader in one.readers if one.producer is not None}
    pairs = [(layer, reader) for layer, reader in _pairs(handovers) if layer in fused & weighted]
    pairs += [(last[layer], layer) for layer in sorted(fused - weighted) if layer in last]
    return [Handover(layer, frozenset({reader}), False, math.inf) for layer, reader in pairs]


def _pairs(handovers: Iterable[Handover]) -> list[tuple[str, str]]:
    return [(one.producer, reader) for one in handovers if one.producer for reader in sorted(one.readers)]


def _stretch(
    times: Mapping[str, Times], handovers: Sequence[Handover], floats: Collection[str], seconds: float
) -> list[Handover]:
    """Lengthen conversions until the model in which `floats` compute in float takes `seconds`; never shorten them."""
    without = total_time(times, (), floats)
    factor = max(1.0, (seconds - without) / (total_time(times, handovers, floats) - without))
    return [handover._replace(time=handover.time * factor) for handover in handovers]


@dataclass(frozen=True)
class _Conversion:
    """Time of a change between int8 and float: one kernel for the numbers and one for their layout, each as a Q."""

    seconds: float
    seconds_per_element: float

    @classmethod
    def from_profile(cls, profile: Sequence[Kernel]) -> "_Conversion":
        """From the fastest kernel and the largest Q of a profile."""
        least = min(kernel.seconds for kernel in profile)
        largest = max((k for k in profile if k.operator == "QuantizeLinear"), key=lambda k: k.elements)
        return cls(least, max(0.0, largest.seconds - least) / largest.elements)

    def of(self, elements: int) -> float:
        return 2 * (self.seconds + self.seconds_per_element * elements)


def _handovers(
    graph: GraphModule, plan: Int8Plan, owners: Mapping[str, str], conversion: _Conversion
) -> list[Handover]:
    """The tensors between layers, in the order of the graph."""
    handovers = []
    for node in graph.graph.nodes:
        if is_parameter(node) or not isinstance(node.meta.get("val"), Tensor):
            continue
        owner = owners.get(node.name)
        gives_int8 = node.name in plan.activations and plan.activations[node.name].everywhere and owner is not None
        readers = frozenset(owners[user.name] for user in node.users if user.name in owners) - {owner}
        read_as_float = any(user.name not in owners for user in node.users)
        if readers or (gives_int8 and read_as_float):
            time = conversion.of(_elements(node))
            handovers.append(Handover(owner if gives_int8 else None, readers, read_as_float, time))
    return handovers


def _elements(node: Node) -> int:
    """Numbers that a node gives for one sample; an open size counts as 1."""
    return math.prod(size if isinstance(size, int) else 1 for size in shape(node)[1:])


def _owners(graph: GraphModule, plan: Int8Plan) -> dict[str, str]:
    """The layer of each node that is part of an int8 kernel, by name."""
    nodes = {node.name: node for node in graph.graph.nodes}
    owners: dict[str, str] = {}
    for unit in plan.units:
        if unit.inputs:
            node = nodes[unit.output or unit.node]
            while node.name != unit.node:
                owners[node.name] = unit.layer
                node = arguments(node)[0]
            owners[unit.node] = unit.layer
    return owners


def _interval(latency: Latency) -> str:
    return f"{latency.ratio:.2f} [{latency.ratio_low:.2f}, {latency.ratio_high:.2f}]"
