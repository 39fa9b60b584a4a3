"""What a student learns from how its teacher places the samples of a batch relative to each other.

Embeddings: (N, …), flattened to (N, D); D may differ between student and teacher. Each loss is a value of the whole
batch, expressed as (N,), one value per sample whose mean is the loss, in float32 or wider whatever comes in. InputError
is raised if student and teacher differ in N.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from compressor.distillation.pairs import match_samples


def relational_distance_loss(student_embeddings: Tensor, teacher_embeddings: Tensor) -> Tensor:
    """Smooth L1 difference of the distances between samples, in units of the mean distance of each model.

    Park et al. 2019 (RKD-D, arXiv 1904.05068): the unit is the mean of the distances that are not 0, the loss the mean
    over all N² ordered pairs, a sample with itself included. Unchanged by rotating, moving or scaling either side's
    embeddings. Returns (N,).
    """
    student, teacher = match_samples(student_embeddings, teacher_embeddings)
    return F.smooth_l1_loss(_distances(student), _distances(teacher), reduction="none").mean(dim=1)


def relational_angle_loss(student_embeddings: Tensor, teacher_embeddings: Tensor) -> Tensor:
    """Smooth L1 difference of the cosines of the angles that three samples form.

    Park et al. 2019 (RKD-A, arXiv 1904.05068): the mean over all N³ ordered triples; an angle of which a side has
    length 0 counts as cosine 0. The value of a sample is the mean over the angles at it. Unchanged by rotating, moving
    or scaling either side's embeddings. Returns (N,). Memory: several times N³ + N²·D floats; in float32 N³ alone is
    8 MB for 128 samples and 4 GB for 1024.
    """
    student, teacher = match_samples(student_embeddings, teacher_embeddings)
    return F.smooth_l1_loss(_cosines(student), _cosines(teacher), reduction="none").mean(dim=(1, 2))


def similarity_loss(student_embeddings: Tensor, teacher_embeddings: Tensor) -> Tensor:
    """Squared difference of the similarities of samples, each sample's similarities scaled to length 1.

    ‖G_s - G_t‖_F² / N² with G = F Fᵀ, its rows divided by their L2 norm, Tung & Mori 2019 (SP, arXiv 1907.09682).
    Returns (N,).
    """
    student, teacher = match_samples(student_embeddings, teacher_embeddings)
    return (_similarities(student) - _similarities(teacher)).square().mean(dim=1)


def _distances(embeddings: Tensor) -> Tensor:
    points = embeddings.flatten(1)
    # The faster mode subtracts squares, which loses the distances of samples that are close beside their size.
    distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    mean = distances.sum() / (distances > 0).sum().clamp(min=1)
    return distances / torch.where(mean > 0, mean, 1.0)


def _cosines(embeddings: Tensor) -> Tensor:
    """Return (N, N, N): at [i, j, k] the cosine of the angle at i between j and k."""
    points = embeddings.flatten(1)
    directions = _unit(points.unsqueeze(0) - points.unsqueeze(1))
    return directions @ directions.mT


def _similarities(embeddings: Tensor) -> Tensor:
    points = embeddings.flatten(1)
    return _unit(points @ points.T)


def _unit(vectors: Tensor) -> Tensor:
    # A vector of 0 has no direction. Divided by inf it stays 0 and gets no gradient; a small number would give 1e12.
    norms = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors / torch.where(norms > 0, norms, math.inf)
