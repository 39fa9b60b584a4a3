"""From a float module to an int8 graph: samples show the range of each activation. Importing it imports torchao."""

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e import MinMaxObserver
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from compressor.errors import InputError
from compressor.export import capture, quiet_torch
from compressor.stages.quantization.quantizer import OnnxRuntimeQuantizer
from compressor.task import Split, Task, gather

_BATCH_SIZE = 64


def quantize(
    module: nn.Module,
    task: Task,
    quantizer: OnnxRuntimeQuantizer,
    *,
    samples: Sequence[int],
    log: Callable[[str], None],
) -> GraphModule:
    """Return a graph that computes in PyTorch what its int8 kernels will; `module` is not changed.

    `samples` are indices into `task.calibration`, which is used as it is, without augmentation. `log` is told what
    stays in float. Raises InputError naming the first layer whose outputs are not finite, StageError if no layer can
    be int8.
    """
    graph = capture(module, task).module()
    with quiet_torch():
        prepared: GraphModule = prepare_pt2e(graph, quantizer)
    floats = _weighted_float_operators(prepared)
    if floats:
        log("stays in float: " + ", ".join(f"{count} {operator}" for operator, count in floats.items()))
    _observe(prepared, task.calibration, samples)
    _narrow_by_a_hair(prepared)
    with quiet_torch():
        quantized: GraphModule = convert_pt2e(prepared)
    return quantized


def _observe(prepared: GraphModule, split: Split, samples: Sequence[int]) -> None:
    """Show the samples to the observers in `prepared`, in place."""
    with torch.no_grad():
        for start in range(0, len(samples), _BATCH_SIZE):
            batch = gather(split, samples[start : start + _BATCH_SIZE])
            prepared(*batch.inputs)
    for node in prepared.graph.nodes:
        observer = prepared.get_submodule(node.target) if node.op == "call_module" else None
        bounds = [getattr(observer, name).flatten() for name in ("min_val", "max_val") if hasattr(observer, name)]
        if bounds and not torch.cat(bounds).isfinite().all():
            msg = f"calibration must give finite numbers, got NaN or infinity in {_place(node.args[0])}"
            raise InputError(msg)


def _narrow_by_a_hair(prepared: GraphModule) -> None:
    """Let the ends of every range fall on the first and last code, in place, whatever way divisions are rounded.

    Otherwise -1 / (2 / 255) may round to a code that is not the first, and a clip to (-1, 1) has to stay in float.
    """
    for observer in prepared.modules():
        if isinstance(observer, MinMaxObserver):
            observer.min_val.mul_(1 - 1e-6)
            observer.max_val.mul_(1 - 1e-6)


def _weighted_float_operators(prepared: GraphModule) -> Counter[str]:
    """Count the operators that multiply or look up a weight which no observer watches."""
    return Counter(
        node.target.__name__.partition(".")[0]
        for node in prepared.graph.nodes
        if node.op == "call_function"
        and any(source.op == "get_attr" and source.meta["val"].ndim > 1 for source in node.all_input_nodes)
    )


def _place(node: Node) -> str:
    """Name the layer that wrote a tensor, the parameter that it is, or the model's input."""
    if node.op == "placeholder":
        return f"the input {node.name!r}"
    if node.op == "get_attr":
        return f"the parameter {node.target!r}"
    modules = [path for path, _ in node.meta.get("nn_module_stack", {}).values() if path]
    if modules or not node.all_input_nodes:
        return f"the outputs of {(modules or [node.name])[-1]!r}"
    return _place(node.all_input_nodes[0])  # a function called in forward: the layer before it
