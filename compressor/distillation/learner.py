"""A student together with the regressors that only its training needs."""

from collections.abc import Mapping
from typing import TypeAlias, final

import torch
from torch import Tensor, nn

from compressor.distillation.losses import FeatureLoss, Losses
from compressor.distillation.regressors import regressor
from compressor.errors import InputError
from compressor.models.layers import LayerOutput, capture_outputs, check_fires, pair_paths
from compressor.task import Inputs

Pairs: TypeAlias = Mapping[str, tuple[tuple[str, str], ...]]
"""By name of the loss: paths of student layers, each with the path of the teacher layer it is compared with."""


def layer_pairs(losses: Losses, student: nn.Module, teacher: nn.Module) -> Pairs:
    """Find the layers that the losses name. Raises InputError for one that is not there."""
    return {name: pair_paths(student, teacher, loss.layers) for name, loss in losses.of_features.items()}


@final
class Learner(nn.Module):
    """A student, the layers of it that losses look at, and a regressor for each pair of a loss that wants one."""

    def __init__(self, student: nn.Module, pairs: Pairs, regressors: Mapping[str, nn.ModuleList]) -> None:
        super().__init__()
        self.student = student
        self.pairs = pairs
        self.regressors = nn.ModuleDict(regressors)

    def forward(self, inputs: Inputs, teacher_features: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """Return the student's logits and, by name of the loss, its features, one for each pair of layers."""
        paths = [path for pairs in self.pairs.values() for path, _ in pairs]
        with capture_outputs(self.student, paths) as found:
            logits = self.student(*inputs)
        features = {}
        for name, pairs in self.pairs.items():
            features[name] = [found[path] for path, _ in pairs]
            if name in self.regressors:
                wanted = [teacher_features[path] for _, path in pairs]
                regressors = self.regressors.get_submodule(name).children()
                features[name] = [
                    regress(ours, theirs)
                    for regress, ours, theirs in zip(regressors, features[name], wanted, strict=True)
                ]
        return logits, features


def build_learner(
    student: nn.Module, teacher: nn.Module, losses: Losses, pairs: Pairs, example_inputs: Inputs, *, seed: int
) -> Learner:
    """Size the regressors by a dry run of both models, which are not changed; try the losses that need none.

    Raises InputError naming a layer that never fires, or two whose features cannot be compared.
    """
    regressors = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, paths in pairs.items():
            ours = check_fires(student, [path for path, _ in paths], example_inputs)
            theirs = check_fires(teacher, [path for _, path in paths], example_inputs)
            for output in (*ours, *theirs):
                _check_batch_first(output, len(example_inputs[0]))
            if losses.of_features[name].regresses:
                regressors[name] = nn.ModuleList([regressor(*pair) for pair in zip(ours, theirs, strict=True)])
                continue
            for one, other in zip(ours, theirs, strict=True):
                _check_comparable(name, losses.of_features[name], one, other)
    return Learner(student, pairs, regressors)


def _check_batch_first(output: LayerOutput, batch_size: int) -> None:
    if output.shape[:1] != (batch_size,):
        msg = (
            f"layer {output.path!r} must give outputs (N, …), the batch first, but gives {output.shape} for "
            f"{batch_size} samples; torch's transformers have them so with batch_first=True"
        )
        raise InputError(msg)


def _check_comparable(name: str, loss: FeatureLoss, student: LayerOutput, teacher: LayerOutput) -> None:
    for output in (student, teacher):
        if loss.compares_positions and len(output.shape) == 3 and output.channel_dimension == 1:
            msg = f"{name} must have maps (N, C, H, W) or tokens (N, L, D), but {output.path!r} gives (N, C, L)"
            raise InputError(msg)
    try:
        loss.compare(torch.zeros(student.shape), torch.zeros(teacher.shape))
    except InputError as error:
        msg = f"{name} must be able to compare {student.path!r} with {teacher.path!r}, but {error}"
        raise InputError(msg) from error
