"""A copy of a module, also of one that holds a tensor which a forward with gradient has left behind."""

import copy
from typing import Any, TypeVar

from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def copy_module(module: M) -> M:
    """Return a deep copy of `module`.

    Tensors that were computed with gradient and kept as plain attributes, such as the weight that
    `torch.nn.utils.weight_norm` sets, or a cache, are copied without their history, which `copy.deepcopy` refuses.
    """
    memo: dict[int, Any] = {}
    for layer in module.modules():
        for tensor in _tensors(list(vars(layer).values())):
            if not tensor.is_leaf:
                memo[id(tensor)] = tensor.detach().clone()
    return copy.deepcopy(module, memo)


def _tensors(value: object) -> list[Tensor]:
    """Tensors in an attribute, however deep in lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [tensor for part in value for tensor in _tensors(part)]
    return []
