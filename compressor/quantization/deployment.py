"""Whether an int8 file does under ONNX Runtime what its graph does in PyTorch, and what each is worth."""

import math
import operator
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from compressor.errors import StageError
from compressor.export.operators import QUANTIZE
from compressor.export.parity import FLOAT_TOLERANCE
from compressor.export.to_onnx import to_unchecked_onnx
from compressor.models.artifact import OnnxModel
from compressor.models.output_kind import outputs_of
from compressor.onnx_files.runtime import open_session
from compressor.quantization.codes import CODES
from compressor.quantization.float_graph import arguments, copy_graph
from compressor.quantization.int8_model import Int8Model, predict, ratio_db
from compressor.records.int8 import Deployment
from compressor.task import EVALUATION_BATCH, Inputs, Task, gather

LEAST_AGREEMENT = 0.995
"""Share of the samples for which PyTorch and ONNX Runtime must name the same class."""
_FEW_SAMPLES = 64
_ROUNDINGS = 2.0
"""How many times `rounding_difference` outputs may differ: ONNX Runtime made 0.4 to 0.9 of it in ResNets of 8 to 80
layers, with ReLU, Hardswish and SiLU."""
_ROUNDING = 2.0**-22
"""By what share of its largest value a sum may be off: twice float32's epsilon."""


def deploy(
    model: Int8Model, reference: Callable[[Inputs], Tensor], task: Task, path: Path, rows: Sequence[int]
) -> tuple[OnnxModel, Deployment]:
    """Write an int8 model to `path` and compare it with PyTorch on the samples `rows` of the validation split.

    Outputs may differ by one quantum. In a deep model, single codes that fell on the edge between two grow into more:
    then they may differ by what PyTorch differs from itself where its sums are rounded otherwise. Raises StageError
    naming the layer that departs if they differ by more, or name other classes for more than 0.5 % of the samples, or
    if the model cannot be exported.
    """
    deployed = to_unchecked_onnx(model.int8_graph, task, path)
    inputs = gather(task.validation, rows[:_FEW_SAMPLES]).inputs
    tolerance = output_quantum(model.int8_graph, inputs)
    deployment = compare(reference, model.int8_graph, deployed, task, rows, tolerance=tolerance)
    if _agrees(deployment):
        return deployed, deployment
    rounding = rounding_difference(model.int8_graph, inputs)
    wider = max(tolerance, _ROUNDINGS * rounding)
    deployment = compare(reference, model.int8_graph, deployed, task, rows, tolerance=wider)
    if _agrees(deployment):
        return deployed, deployment.model_copy(update={"rounding_difference": rounding})
    others = deployment.departures
    classes = "" if others is None else f" and name another class for {others:.2%} of them"
    msg = (
        f"outputs of the int8 model under ONNX Runtime must be those in PyTorch within {deployment.tolerance:.3g} "
        f"(RMS), one quantum or twice what sums in another order make, and name the same class for "
        f"{LEAST_AGREEMENT:.1%} of the samples, but on {deployment.samples} validation samples they differ by "
        f"{deployment.difference:.3g}{classes}; {_departure(model, deployment.tolerance, task, rows)}; look in forward "
        "for randomness, and give the target that this CPU is"
    )
    raise StageError(msg)


def _agrees(deployment: Deployment) -> bool:
    return deployment.difference <= deployment.tolerance and 1 - (deployment.departures or 0.0) >= LEAST_AGREEMENT


def compare(
    reference: Callable[[Inputs], Tensor],
    int8_graph: GraphModule,
    deployed: OnnxModel,
    task: Task,
    rows: Sequence[int],
    *,
    tolerance: float,
) -> Deployment:
    """Run the three on the same samples, in batches of one, two and more.

    Kernels add integers exactly and round each activation once. They differ from PyTorch only where its sums fall on
    the edge between two codes: there a tensor moves by one code. This grows on its way to the output, but mostly stays
    below one `output_quantum` in the mean (0.3 for ResNet-20). A wrong operator or scale, or an overflow, makes many
    quanta. Where two logits are nearer to each other than `tolerance`, either class is right: naming the other one is
    no departure. Raises StageError if outputs or the metric are not finite.
    """
    metric = task.metrics[0]
    sums: list[Tensor] = []
    powers = torch.zeros(3, dtype=torch.float64)
    elements = classified = same = apart = 0
    some = gather(task.validation, rows[:_FEW_SAMPLES])
    kind = replace(outputs_of(task, predict(int8_graph, some.inputs), some.targets), are_probabilities=False)
    for indices in _batches(rows):
        batch = gather(task.validation, indices)
        outputs = (reference(batch.inputs), predict(int8_graph, batch.inputs), deployed.predict(batch.inputs))
        _check_finite(outputs, indices)
        wanted, ours, theirs = (tensor.double() for tensor in outputs)
        tolerance = max(tolerance, FLOAT_TOLERANCE * _root_mean_square(ours))
        sums.append(torch.stack([metric.statistics(tensor, batch.targets) for tensor in outputs]))
        powers += torch.stack([part.square().sum() for part in (wanted, theirs - wanted, theirs - ours)])
        elements += ours.numel()
        if kind.kind != "values":
            our_logits, their_logits = kind.as_logits(ours), kind.as_logits(theirs)
            chosen = their_logits.argmax(dim=1, keepdim=True)
            gap = our_logits.amax(dim=1, keepdim=True) - our_logits.gather(1, chosen)
            classified += gap.numel()
            same += int((our_logits.argmax(dim=1, keepdim=True) == chosen).sum())
            apart += int((gap > 2 * tolerance).sum())  # either of the two logits may be off
    signal, noise, squares = powers.tolist()
    values = [metric.value(total) for total in torch.stack(sums).sum(dim=0)]
    if not all(map(math.isfinite, values)):
        shown = ", ".join(f"{value:g}" for value in values)
        msg = f"{metric.name!r} must be finite on {len(rows)} validation samples, got {shown}; look at their targets"
        raise StageError(msg)
    return Deployment(
        samples=len(rows),
        metric=metric.info,
        float_value=values[0],
        simulated_value=values[1],
        deployed_value=values[2],
        sqnr_db=ratio_db(signal, noise),
        difference=math.sqrt(squares / elements),
        tolerance=tolerance,
        agreement=same / classified if classified else None,
        departures=apart / classified if classified else None,
    )


def _check_finite(outputs: Sequence[Tensor], rows: Sequence[int]) -> None:
    for name, tensor in zip(("float", "int8", "exported int8"), outputs, strict=True):
        if not tensor.isfinite().all():
            msg = (
                f"outputs of the {name} model must be finite numbers, tensor NaN or infinity on validation samples "
                f"{rows[0]} to {rows[-1]}; look at them and at the weights"
            )
            raise StageError(msg)


def output_quantum(graph: GraphModule, inputs: Inputs) -> float:
    """How far the outputs of an int8 graph move, root mean square, when its last uint8 tensors move by one code.

    Each code goes up or down at random, with an explicit seed. For uint8 outputs the result is their scale. For float
    outputs it is what one quantum of the tensors before them is worth. It is 0 without a uint8 tensor.
    """
    shaken = _Shaken(graph)
    shaken.last = _last_quantizers(graph)
    with torch.no_grad(), torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        moved: Tensor = shaken.run(*inputs)
        torch.manual_seed(0)  # what a forward draws at random is not a quantum, and must not make it larger
        return _root_mean_square(moved.double() - predict(graph, inputs).double())


def rounding_difference(graph: GraphModule, inputs: Inputs) -> float:
    """How far the outputs of an int8 graph move, root mean square, when every tensor before a Q is off by a rounding.

    As where sums are added in another order: the few codes on the edge between two become the other one.
    """
    with torch.no_grad(), torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        moved: Tensor = _Rounded(graph).run(*inputs)
        torch.manual_seed(0)
        return _root_mean_square(moved.double() - predict(graph, inputs).double())


class _Rounded(Interpreter):
    """Runs a graph and moves what each Q reads up or down by a rounding."""

    def run_node(self, n: Node) -> object:
        """Run one node."""
        if n.target is not QUANTIZE:
            return super().run_node(n)
        values, *rest = cast("tuple[Tensor, ...]", self.map_nodes_to_values(n.args, n))
        ups = torch.randint(0, 2, values.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
        return QUANTIZE(values + ups * (_ROUNDING * values.abs().max()), *rest)


class _Shaken(Interpreter):
    """Runs a graph and moves each code of the `last` uint8 tensors by one."""

    last: frozenset[Node]

    def run_node(self, n: Node) -> object:
        """Run one node."""
        value: Any = super().run_node(n)
        if n not in self.last:
            return value
        step = torch.randint(0, 2, value.shape, generator=torch.Generator().manual_seed(0), dtype=torch.int32) * 2 - 1
        moved = value.int() + step
        within = (moved >= 0) & (moved <= CODES)  # at either end there is one way only
        return torch.where(within, moved, value.int() - step).to(value.dtype)


def _last_quantizers(graph: GraphModule) -> frozenset[Node]:
    """Find the nodes that write codes of which no other codes are computed on the way to the output."""
    quantizers: set[Node] = set()
    seen: set[Node] = set()
    waiting = list(graph.graph.output_node().all_input_nodes)
    while waiting:
        node = waiting.pop()
        if node.target is QUANTIZE:
            quantizers.add(node)
        elif node not in seen:
            waiting += node.all_input_nodes
        seen.add(node)
    return frozenset(quantizers)


def _departure(model: Int8Model, tolerance: float, task: Task, rows: Sequence[int]) -> str:
    """Name the first layer that gives other codes under ONNX Runtime than in PyTorch, from the same codes.

    One code (RMS) is no departure, nor is `tolerance` in the outputs. Where there is none, name the layer that comes
    nearest to one.
    """
    units = {unit.output: f"layer {unit.layer!r}" for unit in model.plan.units if unit.output is not None}
    graph = copy_graph(model.int8_graph)
    quantizers = [node for node in graph.graph.nodes if node.target is QUANTIZE]
    places = [units.get(source.name) or _place(source) for source, *_ in map(arguments, quantizers)]
    output = graph.graph.output_node()
    output.args = ((*quantizers, arguments(output)[0]),)
    graph.recompile()
    nearest, most = "none", 0.0
    with tempfile.TemporaryDirectory() as directory:
        session = open_session(to_unchecked_onnx(graph, task, Path(directory) / "model.onnx").path, threads=0)
        for indices in filter(None, (rows[:1], rows[1:_FEW_SAMPLES])):
            inputs = gather(task.validation, indices).inputs
            fed = zip(session.get_inputs(), inputs, strict=True)
            *codes, logits = map(torch.from_numpy, session.run(None, {node.name: x.numpy() for node, x in fed}))
            forced = _Forced(graph)
            forced.codes, forced.differences = dict(zip(quantizers, codes, strict=True)), {}
            with torch.no_grad():
                *_, ours = forced.run(*inputs)
            for place, node in zip(places, quantizers, strict=True):
                if (difference := forced.differences[node]) > 1:
                    return (
                        f"the first to depart on equal inputs is {place}, whose codes differ by {difference:.3g} (RMS)"
                    )
                if difference > most:
                    nearest, most = place, difference
            if (difference := _root_mean_square(ours.double() - logits.double())) > tolerance:
                return (
                    "the first to depart on equal inputs is what computes the outputs in float, which differ by "
                    f"{difference:.3g} (RMS)"
                )
    return f"on equal inputs no layer departs by more than one code (RMS), {nearest} by {most:.3g}, the most of all"


class _Forced(Interpreter):
    """Runs a graph, but goes on from the given `codes`; keeps how far its own codes were from these, by node."""

    codes: Mapping[Node, Tensor]
    differences: dict[Node, float]

    def run_node(self, n: Node) -> object:
        """Run one node."""
        value: Any = super().run_node(n)
        if n not in self.codes:
            return value
        self.differences[n] = _root_mean_square(value.double() - self.codes[n].double())
        return self.codes[n]


def _place(node: Node) -> str:
    """Name what gives a tensor that is float until a layer reads it as uint8."""
    while node.target is operator.getitem:
        node = arguments(node)[0]
    return f"layer {node.meta['layer']!r}" if "layer" in node.meta else f"the input {node.name!r}"


def _batches(rows: Sequence[int]) -> list[Sequence[int]]:
    ends = [0, 1, 3, *range(3 + EVALUATION_BATCH, len(rows) + EVALUATION_BATCH, EVALUATION_BATCH)]
    return [rows[start:end] for start, end in pairwise(ends) if rows[start:end]]


def _root_mean_square(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())
