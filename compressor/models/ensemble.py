"""Several models as one: the weighted mean of their answers."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias, cast, final, get_args

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from compressor.errors import InputError, did_you_mean
from compressor.models.artifact import TorchModel
from compressor.references.reference import Reference

Mean: TypeAlias = Literal["mean_probability", "mean_logit"]
"""What the mean is taken of; deep ensembles (Lakshminarayanan et al. 2017, arXiv 1612.01474) take probabilities."""


def combine_logits(
    logits: Sequence[Tensor], *, weights: Sequence[float], combine: Mean, temperature: float = 1.0
) -> Tensor:
    """Weighted mean of the answers of several models, as the logits z of one.

    Each of `logits` is (N, C, …), of one shape; `weights` are positive and sum to 1. `mean_logit`: z = Σ wₖ zₖ.
    `mean_probability`: softmax(z / T) = Σ wₖ softmax(zₖ / T), which holds at this `temperature` T; z is shifted by what
    the members are in the mean, so that members that agree give their own logits. Returns (N, C, …).
    """
    if combine == "mean_logit":
        return torch.stack([weight * one for one, weight in zip(logits, weights, strict=True)]).sum(dim=0)
    softened = torch.stack([one / temperature for one in logits])
    counts = softened.new_tensor(weights).reshape(-1, *[1] * (softened.ndim - 1))
    levels = torch.logsumexp(softened, dim=2, keepdim=True)
    # in log space no probability is too small
    return temperature * (torch.logsumexp(softened - levels + counts.log(), dim=0) + (counts * levels).sum(dim=0))


@final
class Ensemble(nn.Module):
    """Members that each see the whole input and whose answers are combined by `combine_logits`.

    `weights` are positive, scaled here to sum to 1; without them all members count alike. Raises InputError for no
    members, weights that do not fit them, or an unknown `combine`.
    """

    def __init__(
        self,
        members: Sequence[nn.Module],
        *,
        weights: Sequence[float] | None = None,
        combine: str = "mean_probability",
    ) -> None:
        super().__init__()
        if not members:
            msg = "an ensemble must have at least one member, got none"
            raise InputError(msg)
        if combine not in get_args(Mean):
            known = did_you_mean(combine, get_args(Mean)) if isinstance(combine, str) else ""
            msg = f"combine must be {' or '.join(map(repr, get_args(Mean)))}, got {combine!r}{known}"
            raise InputError(msg)
        self.members = nn.ModuleList(members)
        self.weights = _normalize([1.0] * len(members) if weights is None else weights, members=len(members))
        self.combine = cast("Mean", combine)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return (N, C, …). Raises InputError if the members give outputs of different shapes."""
        logits = [member(*inputs) for member in self.members]
        shapes = [tuple(one.shape) for one in logits]
        if any(shape != shapes[0] for shape in shapes):
            msg = f"members of an ensemble must give outputs of one shape, (N, classes), got {shapes}"
            raise InputError(msg)
        return combine_logits(logits, weights=self.weights, combine=self.combine)


def ensemble(
    members: list[dict[str, Any]], combine: str = "mean_probability", weights: list[float] | None = None
) -> Ensemble:
    """Build an ensemble from references, such as `{factory: digits:teacher, weights_file: a.safetensors}`.

    Members without a `weights_file` start from different random weights, which torch's generator decides. Raises
    InputError if a member is no reference or cannot be built, and as `Ensemble` does.
    """
    if not isinstance(members, list):
        msg = f"members must be a list of references, got {members!r}"
        raise InputError(msg)
    seeds = torch.randint(2**63 - 1, (len(members),)).tolist()
    modules = [
        TorchModel.build(_reference(member, position), seed=seed).module
        for position, (member, seed) in enumerate(zip(members, seeds, strict=True))
    ]
    return Ensemble(modules, weights=weights, combine=combine)


def members_of(module: nn.Module) -> tuple[tuple[nn.Module, float], ...]:
    """The members of an ensemble with their weights, which sum to 1; of any other module itself, with weight 1."""
    if isinstance(module, Ensemble):
        return tuple(zip(module.members, module.weights, strict=True))
    return ((module, 1.0),)


def _normalize(weights: Sequence[float], *, members: int) -> tuple[float, ...]:
    if not isinstance(weights, list | tuple):
        msg = f"weights must be a list of numbers, one per member, got {weights!r}"
        raise InputError(msg)
    if len(weights) != members:
        msg = f"weights must be one per member, {members}, got {len(weights)}: {list(weights)}"
        raise InputError(msg)
    if not all(isinstance(weight, int | float) and 0 < weight < math.inf for weight in weights):
        msg = f"weights must be positive numbers, got {list(weights)}; leave out a member that is not to count"
        raise InputError(msg)
    total = sum(weights)
    return tuple(weight / total for weight in weights)


def _reference(member: Mapping[str, Any], position: int) -> Reference:
    try:
        return Reference.model_validate(member)
    except ValidationError as error:
        reason = error.errors(include_url=False)[0]["msg"]
        msg = f"members.{position} must be a reference such as {{factory: digits:teacher}}, got {member!r}: {reason}"
        raise InputError(msg) from error
