"""How many units each group loses, and so which: from a share of all channels to the units to remove."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, TypeAlias

from torch import nn

from compressor.pruning.criteria import Scores
from compressor.pruning.groups import Group, Removal

Allocation: TypeAlias = Literal["uniform", "global", "isomorphic"]
"""`uniform`: every group loses the same share; `global`: the units with the smallest scores of all leave; `isomorphic`:
the same share of every class of groups built alike, ranked within the class."""

Counts: TypeAlias = Mapping[str, int]
"""How many units leave, by the path of their group."""

StepOf: TypeAlias = Callable[[Group], int]
"""How many units of a group must leave together."""

_LEAST_KEPT = 0.1
"""Share of units that a group keeps whatever their scores: else a ranking over groups could nearly close one."""


def units_kept(units: int, *, pruning_ratio: float, step: int) -> int:
    """Multiple of `step` nearest to (1 - `pruning_ratio`) * `units`, at least one; all `units` if nearer."""
    asked = units * (1 - pruning_ratio)
    multiple = min(units, max(1, round(asked / step)) * step)
    return units if units - asked < abs(multiple - asked) else multiple


def multiples_of(round_to: int) -> StepOf:
    """Leave every group a multiple of `round_to` channels; heads leave one at a time."""
    return lambda group: 1 if group.kind == "heads" else round_to // math.gcd(round_to, group.channels_per_unit)


def multiples_that_fit(round_to: int) -> StepOf:
    """Like `multiples_of`, but half as much, or a quarter and so on, for a group with less than two multiples."""

    def step(group: Group) -> int:
        channels, fitting = group.units * group.channels_per_unit, round_to
        while fitting > 1 and 2 * fitting > channels:
            fitting //= 2
        return multiples_of(fitting)(group)

    return step


def allocate(
    allocation: Allocation,
    module: nn.Module,
    groups: Sequence[Group],
    scores: Scores,
    *,
    comparable: bool,
    pruning_ratio: float,
    step_of: StepOf,
) -> Removal:
    """Choose the units to remove, a share `pruning_ratio` in (0, 1) of all channels as near as `step_of` allows.

    A larger ratio removes the same units and more. Units with equal scores leave in their order. Scores that are not
    `comparable` between groups are divided by their group's mean before they are ranked with others.
    """
    if allocation == "uniform":
        return uniform(groups, scores, pruning_ratio=pruning_ratio, step_of=step_of)
    if allocation == "global":
        relative = {path: score / score.mean().clamp(min=1e-30) for path, score in scores.items()}
        return rank(groups, scores if comparable else relative, pruning_ratio=pruning_ratio, step_of=step_of)
    classes: dict[object, list[Group]] = defaultdict(list)
    for group in groups:
        classes[_structure(module, group)].append(group)
    parts = [rank(alike, scores, pruning_ratio=pruning_ratio, step_of=step_of) for alike in classes.values()]
    return {path: units for part in parts for path, units in part.items()}


def uniform(groups: Sequence[Group], scores: Scores, *, pruning_ratio: float, step_of: StepOf) -> Removal:
    """Remove the same share of every group's units: those with the smallest scores."""
    return by_ratios(dict.fromkeys((group.path for group in groups), pruning_ratio), groups, scores, step_of=step_of)


def by_ratios(ratios: Mapping[str, float], groups: Sequence[Group], scores: Scores, *, step_of: StepOf) -> Removal:
    """Remove from each group the share of its units, in [0, 1), that `ratios` gives by its path."""
    removed = {}
    for group in groups:
        kept = units_kept(group.units, pruning_ratio=ratios[group.path], step=step_of(group))
        removed[group.path] = _ascending(scores, group)[: group.units - kept]
    return removed


def choose_by_counts(groups: Sequence[Group], scores: Scores, counts: Counts) -> Removal:
    """Remove as many units of each group as `counts` says: those with the smallest scores."""
    return {group.path: _ascending(scores, group)[: counts.get(group.path, 0)] for group in groups}


class _Slice(NamedTuple):
    """Units of one group that leave together so that a multiple of the step is left."""

    score: float
    order: int
    """Of the group, then in the group: equal scores leave in this order."""
    position: int
    path: str
    units: tuple[int, ...]
    channels: int


def rank(groups: Sequence[Group], scores: Scores, *, pruning_ratio: float, step_of: StepOf) -> Removal:
    """Remove the units with the smallest scores of all groups together, in slices of `step_of`."""
    slices = sorted(
        piece for order, group in enumerate(groups) for piece in _slices(group, scores, order, step_of(group))
    )
    wanted = pruning_ratio * sum(group.units * group.channels_per_unit for group in groups)
    removed: dict[str, tuple[int, ...]] = {group.path: () for group in groups}
    total = 0
    for piece in slices:
        if total + piece.channels / 2 > wanted:
            break
        removed[piece.path] += piece.units
        total += piece.channels
    return removed


def _slices(group: Group, scores: Scores, order: int, step: int) -> Sequence[_Slice]:
    ascending = _ascending(scores, group)
    least = max(step, math.ceil(group.units * _LEAST_KEPT / step) * step)
    excess = group.units % step or step  # what is above a multiple leaves first
    starts = [0, *range(excess, group.units, step)]
    slices: list[_Slice] = []
    for start, stop in zip(starts, [*starts[1:], group.units], strict=True):
        if group.units - stop < least:
            break
        units = ascending[start:stop]
        # not below the slice before it, which must leave first: means of equal scores differ by rounding
        score = max(float(scores[group.path][list(units)].mean()), slices[-1].score if slices else 0)
        slices.append(_Slice(score, order, start, group.path, units, len(units) * group.channels_per_unit))
    return slices


def _ascending(scores: Scores, group: Group) -> tuple[int, ...]:
    return tuple(scores[group.path].argsort(stable=True).tolist())


def _structure(module: nn.Module, group: Group) -> tuple[object, ...]:
    """What two groups must share to be ranked together (isomorphic pruning, Fang et al. 2024, arXiv 2407.04616)."""
    layers = sorted(
        (type(module.get_submodule(member.path)).__name__, member.name, member.dim, member.reads)
        for member in group.members
    )
    return (group.kind, group.units, group.channels_per_unit, tuple(layers))
