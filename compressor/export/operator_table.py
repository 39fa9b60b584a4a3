"""torch's table of ONNX operators, made once for a process: by itself torch makes one for each export."""

import contextlib
import copy
import functools
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def share_operator_table() -> Iterator[None]:
    """While the block is open, give each export a copy of one table instead of a table of its own.

    To make it, torch 2.13 reads the source of 500 functions: two thirds of the time of a small export, as
    findings/torch_rereads_its_onnx_table.sh counts. It has no public way to hand a table over. A torch that keeps its
    table elsewhere exports as it does by itself.
    """
    registry = _find_registry()
    if registry is None:
        yield
        return
    original = vars(registry)["from_torchlib"]
    registry.from_torchlib = staticmethod(functools.partial(_copy_table, original))
    try:
        yield
    finally:
        registry.from_torchlib = original


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
