"""What student and teacher give, made fit to be compared: in float32 or wider, and for the same samples."""

import torch
from torch import Tensor

from compressor.errors import InputError


def widen(tensor: Tensor) -> Tensor:
    """Return `tensor` in float32, or in float64 if it is that. Squares and 1e-8 leave the range of half precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def match_shapes(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return both, widened; raises InputError if the shapes differ, because they would broadcast."""
    if student.shape != teacher.shape:
        msg = (
            f"student and teacher must have one shape, got {tuple(student.shape)} and {tuple(teacher.shape)}; "
            f"choose outputs of one shape, or map the student's to the teacher's"
        )
        raise InputError(msg)
    return widen(student), widen(teacher)


def match_samples(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return both, widened; raises InputError if their first dimensions, the samples, differ."""
    if len(student) != len(teacher):
        msg = f"student and teacher must see the same samples, got {len(student)} and {len(teacher)}"
        raise InputError(msg)
    return widen(student), widen(teacher)
