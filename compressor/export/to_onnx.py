"""Any module as a checked, stripped ONNX file that gives the same outputs under ONNX Runtime."""

import contextlib
import io
import json
import logging
import operator
import re
import traceback
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from onnx import ModelProto
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.fx import GraphModule, Node

from compressor.errors import StageError
from compressor.export.graph_program import is_traced, program_of
from compressor.export.open_axes import check_open_axes
from compressor.export.operator_table import share_operator_table
from compressor.export.operators import translations
from compressor.export.parity import FLOAT_TOLERANCE, check_parity
from compressor.models.artifact import OnnxModel
from compressor.onnx_files.qdq import simplify_qdq
from compressor.onnx_files.writing import INLINE_BYTES, compact, with_metadata, write
from compressor.task import Inputs, Task

OPSET = 20

_NOISY_LOGGERS = (
    "torch.fx.experimental.symbolic_shapes",
    "torch.onnx._internal.exporter._registration",
    "torch.utils._pytree",
)

_aten = torch.ops.aten
_AVERAGE_POOLS = {1: _aten.avg_pool1d.default, 2: _aten.avg_pool2d.default}


def to_onnx(
    module: nn.Module,
    task: Task,
    path: Path,
    *,
    metadata: Mapping[str, str] | None = None,
    inline_bytes: int = INLINE_BYTES,
) -> OnnxModel:
    """Write `module`, in evaluation mode, as ONNX that gives the same outputs; equal modules give equal bytes.

    The input is called `input` (several: as in `forward`), the output `output`; the axes in `task.dynamic_axes` stay
    open. `metadata` joins `task_metadata` in the file. With more than `inline_bytes` of tensors, these go to a file
    beside `path`. Raises StageError if torch cannot trace or translate the module, or if ONNX Runtime's outputs differ
    from PyTorch's, on the validation split or with an open axis at another size.
    """
    model = to_unchecked_onnx(module, task, path, metadata=metadata, inline_bytes=inline_bytes)

    def outputs(inputs: Inputs) -> Tensor:
        with torch.no_grad():
            result: Tensor = module(*inputs)
        return result

    check_parity(model, outputs, task.validation, tolerance=FLOAT_TOLERANCE)
    check_open_axes(model, outputs, task, tolerance=FLOAT_TOLERANCE)
    return model


def to_unchecked_onnx(
    module: nn.Module,
    task: Task,
    path: Path,
    *,
    metadata: Mapping[str, str] | None = None,
    inline_bytes: int = INLINE_BYTES,
) -> OnnxModel:
    """Write `module` as `to_onnx` does, for a caller that compares outputs by a rule of its own.

    A module may give several tensors, of which the first is called `output`. Raises StageError if torch cannot trace or
    translate it.
    """
    graph = compact(simplify_qdq(translate(capture(module, task), task)))
    write(with_metadata(graph, {**task_metadata(task), **(metadata or {})}), path, inline_bytes=inline_bytes)
    return OnnxModel(path)


def task_metadata(task: Task) -> dict[str, str]:
    """Labels and preprocessing of a task as JSON, by name; what the task does not say is left out."""
    said = {"labels": list(task.labels), "preprocessing": dict(task.preprocessing)}
    return {key: json.dumps(value, sort_keys=True, ensure_ascii=False) for key, value in said.items() if value}


def capture(module: nn.Module, task: Task) -> ExportedProgram:
    """Trace `module` with the axes in `task.dynamic_axes` open, its global pools in a form that has an int8 kernel.

    Raises StageError if torch cannot trace it.
    """
    if is_traced(module, task.example_inputs, _dynamic_axes(task)):
        program = program_of(cast("GraphModule", module), task.example_inputs)
    else:
        program = _trace(module, task)
    _spell_out_global_pools(program.graph_module)
    _unify_bounds(program.graph_module)
    _check_indices(program.graph_module)
    return program


def _trace(module: nn.Module, task: Task) -> ExportedProgram:
    open_axes = ShapesCollection()  # type: ignore[no-untyped-call]  # torch has not annotated it
    for tensor, axes in zip(task.example_inputs, _dynamic_axes(task), strict=True):
        open_axes[tensor] = dict.fromkeys(axes, Dim.DYNAMIC)
    shapes = open_axes.dynamic_shapes(module, task.example_inputs)  # type: ignore[no-untyped-call]
    try:
        with quiet_torch(), contextlib.redirect_stderr(io.StringIO()):  # torch prints the graph it could not finish
            return torch.export.export(module, task.example_inputs, dynamic_shapes=shapes)
    except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError) as error:
        found = f"{_source_line(error)}: {_fixed_axis(error, task) or _first_line(error)}"
        msg = f"torch.export must be able to trace forward, but {found}; {_advice(error)}"
        raise StageError(msg) from error


def _dynamic_axes(task: Task) -> tuple[Mapping[int, str], ...]:
    return task.dynamic_axes or ({0: "batch"},) * len(task.example_inputs)


def _spell_out_global_pools(module: GraphModule) -> None:
    """Write pools over the whole image as average pools of its size, in place; as means where that size is not known.

    ONNX Runtime has an int8 average pool, but no int8 mean. And torch translates `adaptive_avg_pool2d(x, 1)` into a
    mean and a dozen operators that compute indices.
    """
    for node in module.graph.nodes:
        if not _is_global_pool(node):
            continue
        source: Any = node.args[0]
        image = source.meta["val"]
        size = list(image.shape[2:])
        if not all(isinstance(length, int) for length in size):
            axes, keepdim = list(range(2, image.ndim)), node.meta["val"].ndim == image.ndim
            node.target, node.args = _aten.mean.dim, (source, axes, keepdim)
        elif node.meta["val"].ndim == image.ndim:
            node.target, node.args = _AVERAGE_POOLS[len(size)], (source, size)
        else:
            with module.graph.inserting_before(node):
                pool = module.graph.call_function(_AVERAGE_POOLS[len(size)], (source, size))
            pool.meta = {**node.meta, "val": _AVERAGE_POOLS[len(size)](image, size)}
            node.target, node.args = _aten.flatten.using_ints, (pool, 1)
    module.recompile()


def _unify_bounds(module: GraphModule) -> None:
    """Write the bounds of a clamp as numbers of one type, in place: torch translates no int beside a float."""
    for node in module.graph.nodes:
        if node.target not in {_aten.clamp.default, _aten.clamp_.default}:
            continue
        bounds = [*node.args[1:], *(node.kwargs[name] for name in ("min", "max") if name in node.kwargs)]
        if {type(bound) for bound in bounds} >= {int, float}:
            args: tuple[Any, ...] = tuple(float(one) if isinstance(one, int) else one for one in node.args)
            node.args = args
            node.kwargs = {key: float(one) if isinstance(one, int) else one for key, one in node.kwargs.items()}
    module.recompile()


def _check_indices(module: GraphModule) -> None:
    """Raise StageError if something reads where an adaptive pool found its largest values."""
    pools = {
        _aten.adaptive_max_pool1d.default,
        _aten.adaptive_max_pool2d.default,
        _aten.adaptive_max_pool3d.default,
    }
    for node in module.graph.nodes:
        if node.target is operator.getitem and node.args[1] == 1 and node.args[0].target in pools and node.users:
            msg = (
                "forward must have a form in ONNX, which has no indices (return_indices) of "
                f"{node.args[0].target._opname}; find them with other operators"
            )
            raise StageError(msg)


def _is_global_pool(node: Node) -> bool:
    """Whether `node` averages (N, C, L) or (N, C, H, W) over all but the first two axes."""
    if node.target not in {_aten.adaptive_avg_pool1d.default, _aten.adaptive_avg_pool2d.default, _aten.mean.dim}:
        return False
    source, sizes_or_axes, *_ = cast("tuple[Any, ...]", node.args)
    rank = source.meta["val"].ndim
    if node.target is not _aten.mean.dim:
        return set(sizes_or_axes) == {1} and rank == len(sizes_or_axes) + 2
    return rank in {3, 4} and not node.kwargs and {axis % rank for axis in sizes_or_axes or ()} == set(range(2, rank))


def translate(program: ExportedProgram, task: Task) -> ModelProto:
    """Return the program in ONNX, its open axes named as the task names them.

    Raises StageError if torch cannot translate it.
    """
    from onnx_ir.passes import PassError  # noqa: PLC0415  # torch's exporter runs them

    inputs = program.graph_signature.user_inputs
    try:
        with quiet_torch(), share_operator_table():
            translated = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                input_names=["input"] if len(inputs) == 1 else [str(name) for name in inputs],
                output_names=["output"],
                external_data=False,
                custom_translation_table=dict(translations()),
                verbose=False,
            )
    except (torch.onnx.OnnxExporterError, PassError) as error:
        found = f"{_find_translated_line(error, program)}: {_first_line(_causes(error)[-1])}"
        msg = f"forward must have a form in ONNX opset {OPSET}, but {found}; write it with other operators"
        raise StageError(msg) from error
    assert translated is not None  # None stands for a file written, and none was asked for
    proto: ModelProto = translated.model_proto
    _name_open_axes(proto, task)
    return proto


def _name_open_axes(proto: ModelProto, task: Task) -> None:
    """Replace torch's symbols (`s77`) by the task's names for axes, in place, also where outputs compute with them."""
    symbols = {
        value.type.tensor_type.shape.dim[axis].dim_param: name
        for value, axes in zip(proto.graph.input, _dynamic_axes(task), strict=True)
        for axis, name in axes.items()
    }
    for value in (*proto.graph.input, *proto.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(r"\w+", lambda found: symbols.get(found[0], found[0]), dim.dim_param)


def _source_line(error: BaseException) -> str:
    """Name the innermost line outside torch and this file that `error` came through; torch if there is none."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame.filename)]
    return f"{frames[-1].filename}:{frames[-1].lineno} `{frames[-1].line}` gives" if frames else "torch says"


def _find_translated_line(error: BaseException, program: ExportedProgram) -> str:
    """Name the line that wrote the operator at which a translation ended; torch if it does not say."""
    names = [name for cause in _causes(error) for name in re.findall(r"translating node %(\w+)", str(cause))]
    traces = [node.meta.get("stack_trace", "") for node in program.graph.nodes if node.name in names]
    lines = re.findall(r'File "(.+)", line (\d+), in .+\n\s*(.+)', "\n".join(traces))
    own = [(file, line, code) for file, line, code in lines if _is_users(file)]
    return "{}:{} `{}` gives".format(*own[-1]) if own else "torch says"


def _is_users(filename: str) -> bool:
    return not filename.startswith((str(Path(torch.__file__).parent), __file__, "<"))


def _causes(error: BaseException) -> list[BaseException]:
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    return chain


def _first_line(error: BaseException) -> str:
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _fixed_axis(error: BaseException, task: Task) -> str | None:
    """Say which open axis torch found to be fixed, and at what size, if that is what it raised."""
    found = re.search(r"marked (\S+?)\.size\(\)\[(\d+)\] as dynamic.* to be a constant \((\d+)\)", str(error))
    if found is None:
        return None
    tensor, axis, size = found[1], int(found[2]), found[3]
    names = dict.fromkeys(repr(of_input[axis]) for of_input in _dynamic_axes(task) if axis in of_input)
    return f"axis {axis} of {tensor}, {' or '.join(names)}, is open, but forward runs at {size} alone"


def _advice(error: BaseException) -> str:
    text = str(error)
    if "data-dependent" in text:
        return "forward must not branch on the values of a tensor: use torch.where or a mask"
    if "Constraints violated" in text:
        return "forward must not fix a size that may change, such as the batch: use -1 or x.size(0)"
    return "forward must work on tensors alone: no NumPy and no tensor turned into a Python number"


@contextlib.contextmanager
def quiet_torch() -> Iterator[None]:
    """Keep back what torch logs of no use here: that torchvision is missing, its own deprecations, errors it raises."""
    loggers = [logging.getLogger(name) for name in _NOISY_LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)`", category=FutureWarning)
            warnings.filterwarnings("ignore", message=r"The tensor attributes? .*_flat_weights", category=UserWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
