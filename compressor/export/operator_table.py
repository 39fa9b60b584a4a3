"""What each export in torch does again or in vain, done once or not at all: its tables, and its second trace."""

import contextlib
import copy
import functools
import operator
from collections.abc import Collection, Iterator
from typing import Any

from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.fx import Node

_DECOMPOSE = "decompose_with_registry"
"""What traces a program again, so that operators without a form in ONNX become others."""
_LOOK_UP = "_materialize_cpp_cia_ops"
"""What gives each composite operator of the dispatcher a Python object, if it has none."""


@contextlib.contextmanager
def share_operator_table() -> Iterator[None]:
    """While the block is open, give each export a copy of one table, and trace again only what torch decomposes.

    To make it, torch 2.13 reads the source of 500 functions: two thirds of the time of a small export, as
    findings/torch_rereads_its_onnx_table.sh counts. It has no public way to hand a table over. And look up the
    composite operators once: torch does it again for each namespace of operators, an eighth of what is left.
    A program in which each operator has a form in ONNX is left as it is: torch would trace it again to write the same
    operators. A torch that keeps its tables elsewhere exports as it does by itself.
    """
    with contextlib.ExitStack() as replaced:
        registry, utils, passes = _find_registry(), _find_export_utils(), _find_passes()
        if registry is not None:
            shared = staticmethod(functools.partial(_copy_table, vars(registry)["from_torchlib"]))
            replaced.enter_context(_replace(registry, "from_torchlib", shared))
        if utils is not None:
            replaced.enter_context(_replace(utils, _LOOK_UP, functools.cache(getattr(utils, _LOOK_UP))))
        if passes is not None and utils is not None:
            decompose = functools.partial(_decompose, vars(passes)[_DECOMPOSE], utils)
            replaced.enter_context(_replace(passes, _DECOMPOSE, decompose))
        yield


@contextlib.contextmanager
def _replace(owner: Any, name: str, value: object) -> Iterator[None]:
    original = vars(owner)[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _copy_table(make: Any, opset_version: int) -> Any:
    """Copy the table, as an export adds operators of its own."""
    table = copy.copy(_make_table(make, opset_version))
    table.functions = {target: list(functions) for target, functions in table.functions.items()}
    return table


@functools.cache
def _make_table(make: Any, opset_version: int) -> Any:
    """`make` is the class method as it stands in its class."""
    return make.__get__(None, _find_registry())(opset_version)


def _decompose(decompose: Any, utils: Any, program: ExportedProgram, registry: Any) -> Any:
    """Call `decompose` unless it can change nothing."""
    translated = {functions[0].fx_target for functions in registry.functions.values() if functions}
    composite = set(utils._collect_all_valid_cia_ops())
    stays = all(_stays(node, translated, composite, utils) for node in program.graph.nodes)
    return program if stays else decompose(program, registry)


def _stays(node: Node, translated: Collection[Any], composite: Collection[Any], utils: Any) -> bool:
    """Whether torch leaves `node` as it is: functional, with a form in ONNX, and not made of others."""
    if node.op != "call_function":
        return node.op in {"placeholder", "output"}
    if node.target is operator.getitem:
        return True
    if not isinstance(node.target, OpOverload) or node.target._schema.is_mutable:
        return False
    return node.target in translated and (node.target in composite or not utils._is_cia_op(node.target))


def _find_registry() -> Any | None:
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry  # noqa: PLC0415  # it may not be there
    except ImportError:
        return None
    known = {"from_torchlib", "register_op"} <= vars(ONNXRegistry).keys() and "functions" in vars(ONNXRegistry())
    return ONNXRegistry if known else None


def _find_export_utils() -> Any | None:
    try:
        from torch._export import utils  # noqa: PLC0415  # it may not be there
    except ImportError:
        return None
    return utils if {_LOOK_UP, "_collect_all_valid_cia_ops", "_is_cia_op"} <= vars(utils).keys() else None


def _find_passes() -> Any | None:
    try:
        from torch.onnx._internal.exporter import _fx_passes  # noqa: PLC0415  # it may not be there
    except ImportError:
        return None
    return _fx_passes if _DECOMPOSE in vars(_fx_passes) else None
