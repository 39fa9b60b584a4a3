"""What a student learns from its teacher's features: their values, and where in the input they are large.

A loss returns (N,), one value per sample, in float32 or wider whatever comes in.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from compressor.distillation.pairs import match_samples, match_shapes, widen
from compressor.errors import InputError


def hint_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Mean squared difference of features, Romero et al. 2015 (FitNets, arXiv 1412.6550, eq. 3, there a sum / 2).

    Features: (N, …), the student's already mapped to the teacher's shape. Returns (N,), the mean over all dimensions
    but the first. Raises InputError if the shapes differ.
    """
    student, teacher = match_shapes(student_features, teacher_features)
    return (student - teacher).square().flatten(1).mean(dim=1)


def attention_map(features: Tensor) -> Tensor:
    """How large features are at each position, as a vector of length 1 per sample.

    Mean of squares over the channels, Zagoruyko & Komodakis 2017 (arXiv 1612.03928, F²_sum, of which the mean is a
    multiple). `features`: (N, C, H, W) gives (N, H·W); tokens (N, L, D) give (N, L). Features that are 0 everywhere
    give 0. Raises InputError for other numbers of dimensions.
    """
    if features.ndim not in (3, 4):
        msg = f"features must be (N, C, H, W) or tokens (N, L, D), got {tuple(features.shape)}; choose another layer"
        raise InputError(msg)
    channels = 1 if features.ndim == 4 else 2
    return F.normalize(widen(features).square().mean(dim=channels).flatten(1), dim=1)


def attention_transfer_loss(
    student_features: Tensor, teacher_features: Tensor, *, normalization: Literal["mean_square", "euclidean"]
) -> Tensor:
    """Difference of the attention maps of student and teacher; their channels may differ.

    "mean_square": mean over positions of the squared difference, as in the authors' code. "euclidean": L2 norm of the
    difference, as in the paper (arXiv 1612.03928, eq. 2); it is larger, and its gradient keeps its size near the
    optimum: the two need different weights. Features: (N, C, H, W), of which the larger are average-pooled to the
    smaller, or tokens (N, L, D). Returns (N,). Raises InputError if the maps of tokens differ in length.
    """
    student, teacher = match_samples(student_features, teacher_features)
    if student.ndim == teacher.ndim == 4:
        size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
        student, teacher = F.adaptive_avg_pool2d(student, size), F.adaptive_avg_pool2d(teacher, size)
    student, teacher = match_shapes(attention_map(student), attention_map(teacher))
    if normalization == "mean_square":
        return (student - teacher).square().mean(dim=1)
    distance: Tensor = torch.linalg.vector_norm(student - teacher, dim=1)
    return distance
