"""How much each unit of a group matters: the smaller the score, the sooner it is removed."""

from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from compressor.errors import StageError
from compressor.pruning.groups import Group, Member
from compressor.system.copying import copy_module
from compressor.task import Task, evenly_spaced, gather

Criterion: TypeAlias = Literal["l2", "l1", "bn_scale", "taylor"]
"""`l2` and `l1`: the norm of all weights that leave with a unit; `bn_scale`: the scale of its batch normalization;
`taylor`: how much the loss is expected to change without it, from gradients on training samples."""

COMPARABLE: frozenset[Criterion] = frozenset({"taylor"})
"""Criteria whose scores say the same in every group: changes of the loss do, norms of unlike layers do not."""

Scores: TypeAlias = Mapping[str, Tensor]
"""(units,) by the path of each group, float32, not negative."""

_TAYLOR_SAMPLES, _TAYLOR_BATCH = 1024, 64


def scores(criterion: Criterion, module: nn.Module, groups: Sequence[Group], task: Task) -> Scores:
    """Score every unit of `groups`.

    Raises StageError if a score is not finite, or if `bn_scale` is asked and a group has no batch normalization.
    """
    if criterion == "taylor":
        scores_of = taylor(module, groups, task)
    elif criterion == "bn_scale":
        scores_of = {group.path: bn_scale(module, group) for group in groups}
    else:
        scores_of = {group.path: magnitude(module, group, order=2 if criterion == "l2" else 1) for group in groups}
    for path, values in scores_of.items():
        if not values.isfinite().all():
            msg = f"every score must be a finite number, but {path} has others by {criterion}; look at its weights"
            raise StageError(msg)
    return scores_of


def magnitude(module: nn.Module, group: Group, *, order: Literal[1, 2]) -> Tensor:
    """Norm over all kernels, rows, columns and scales that leave with a unit (after DepGraph, arXiv 2301.12900)."""
    weights = [member for member in group.members if _is_weight(module, member)]
    powers = torch.stack([_per_unit(_tensor(module, member).abs() ** order, member) for member in weights]).sum(dim=0)
    return powers if order == 1 else powers.sqrt()


def bn_scale(module: nn.Module, group: Group) -> Tensor:
    """Sum of the absolute scales of all batch normalizations of a unit (network slimming, arXiv 1708.06519)."""
    scales = [
        _per_unit(_tensor(module, member).abs(), member)
        for member in group.members
        if member.name == "weight" and isinstance(module.get_submodule(member.path), nn.modules.batchnorm._BatchNorm)
    ]
    if not scales:
        msg = f"criterion bn_scale needs a batch normalization with scales in every group, but {group.path} has none"
        raise StageError(msg + "; choose l2, or protect it")
    return torch.stack(scales).sum(dim=0)


def taylor(module: nn.Module, groups: Sequence[Group], task: Task) -> Scores:
    """Squared first-order change of the loss without a unit, mean over batches (after Molchanov et al. 2019).

    A unit is silenced by zeros in all weights that read it, so the change is the sum of weight times gradient over
    these. Up to 1,024 samples spread over the training split are used, without augmentation, in evaluation mode.
    """
    scored = copy_module(module).eval()
    for parameter in scored.parameters():
        parameter.requires_grad_(True)
    sums = {group.path: torch.zeros(group.units) for group in groups}
    count = 0
    rows = evenly_spaced(task.train, _TAYLOR_SAMPLES)
    for start in range(0, len(rows), _TAYLOR_BATCH):
        batch = gather(task.train, rows[start : start + _TAYLOR_BATCH])
        scored.zero_grad()
        task.loss(scored(*batch.inputs), batch.targets).mean().backward()  # type: ignore[no-untyped-call]
        for group in groups:
            readers = [member for member in group.members if member.reads]
            change = [_per_unit(_gradient(scored, member), member) for member in readers]
            sums[group.path] += torch.stack(change).sum(dim=0) ** 2
        count += 1
    return {path: total / count for path, total in sums.items()}


def _tensor(module: nn.Module, member: Member) -> Tensor:
    tensor: Tensor = getattr(module.get_submodule(member.path), member.name).detach()
    return tensor


def _gradient(module: nn.Module, member: Member) -> Tensor:
    parameter = getattr(module.get_submodule(member.path), member.name)
    return torch.zeros_like(parameter) if parameter.grad is None else (parameter * parameter.grad).detach()


def _is_weight(module: nn.Module, member: Member) -> bool:
    """Whether it scales what flows through; biases and running statistics do not."""
    return member.name in dict(module.get_submodule(member.path).named_parameters(recurse=False)) and (
        not member.name.endswith("bias")
    )


def _per_unit(values: Tensor, member: Member) -> Tensor:
    """Sum of `values` over everything that leaves with each unit, (units,)."""
    entries = values.movedim(member.dim, 0).flatten(1).sum(dim=1) if values.ndim > 1 else values
    return entries[torch.tensor(member.index)].sum(dim=1).float()
