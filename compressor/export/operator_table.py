"""torch's tables of operators, made once: by itself torch makes one for each export, and another 54 times in each."""

import contextlib
import copy
import functools
from collections.abc import Iterator
from typing import Any

_LOOK_UP = "_materialize_cpp_cia_ops"
"""What gives each composite operator of the dispatcher a Python object, if it has none."""


@contextlib.contextmanager
def share_operator_table() -> Iterator[None]:
    """While the block is open, give each export a copy of one table instead of a table of its own.

    To make it, torch 2.13 reads the source of 500 functions: two thirds of the time of a small export, as
    findings/torch_rereads_its_onnx_table.sh counts. It has no public way to hand a table over. And look up the
    composite operators once: torch does it again for each namespace of operators, an eighth of what is left.
    A torch that keeps its tables elsewhere exports as it does by itself.
    """
    with contextlib.ExitStack() as replaced:
        registry, utils = _find_registry(), _find_export_utils()
        if registry is not None:
            shared = staticmethod(functools.partial(_copy_table, vars(registry)["from_torchlib"]))
            replaced.enter_context(_replace(registry, "from_torchlib", shared))
        if utils is not None:
            replaced.enter_context(_replace(utils, _LOOK_UP, functools.cache(getattr(utils, _LOOK_UP))))
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
    return utils if _LOOK_UP in vars(utils) else None
