"""From a student's features to the size of its teacher's, so that the two can be compared; trained and thrown away."""

from collections.abc import Sequence
from typing import final

import torch.nn.functional as F
from torch import Tensor, nn

from compressor.errors import InputError
from compressor.models.layers import LayerOutput

_CONVOLUTIONS: dict[int, type[nn.Module]] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
_INTERPOLATIONS = {1: "linear", 2: "bilinear", 3: "trilinear"}


def regressor(student: LayerOutput, teacher: LayerOutput) -> "Regressor":
    """Make the module that brings features of a student layer to the size of those of its teacher layer.

    A convolution of size 1 maps the channels (Romero et al. 2015, FitNets, section 2.2), or a linear layer where
    channels come last. Its weights come from torch's generator.

    Raises InputError unless both outputs are (N, C), tokens (N, L, C), (N, C, L), maps (N, C, H, W) or (N, C, D, H, W),
    of equally many dimensions.
    """
    rank = len(student.shape)
    if rank != len(teacher.shape) or not 2 <= rank <= 5:
        msg = (
            "a student layer and its teacher layer must give outputs of equally many dimensions, from 2 to 5, but "
            f"{student.path!r} gives {student.shape} and {teacher.path!r} gives {teacher.shape}; choose other layers"
        )
        raise InputError(msg)
    channels_in, channels_out = student.shape[student.channel_dimension], teacher.shape[teacher.channel_dimension]
    channels: nn.Module
    if channels_in == channels_out:
        channels = nn.Identity()
    elif student.channel_dimension == rank - 1:
        channels = nn.Linear(channels_in, channels_out)
    else:
        channels = _CONVOLUTIONS[rank](channels_in, channels_out, 1)
    return Regressor(channels, student.channel_dimension, teacher.channel_dimension)


@final
class Regressor(nn.Module):
    """Student features with the channels, layout and size of given teacher features; made by `regressor`.

    `channels` is an `nn.Identity` if both have equally many; what is equal costs nothing. `student_dimension` and
    `teacher_dimension` hold the channels.
    """

    def __init__(self, channels: nn.Module, student_dimension: int, teacher_dimension: int) -> None:
        super().__init__()
        self.channels = channels
        self.student_dimension = student_dimension
        self.teacher_dimension = teacher_dimension

    def forward(self, student_features: Tensor, teacher_features: Tensor) -> Tensor:
        """Return student features in the shape of `teacher_features`, of which nothing but the shape is used.

        Batch and sizes may differ from one call to the next; the numbers of channels and dimensions may not.
        """
        size = teacher_features.movedim(self.teacher_dimension, 1).shape[2:]
        features: Tensor = self.channels(student_features)
        return resize(features.movedim(self.student_dimension, 1), size).movedim(1, self.teacher_dimension)


def resize(features: Tensor, size: Sequence[int]) -> Tensor:
    """Change (N, C, …) to (N, C, *`size`).

    A dimension that is too large is averaged; one that is too small is interpolated linearly. Returns
    `features` itself if they have that size.
    """
    pooled = [min(found, wanted) for found, wanted in zip(features.shape[2:], size, strict=True)]
    if pooled != list(features.shape[2:]):
        features = F.interpolate(features, size=pooled, mode="area")  # adaptive average pooling, by its other name
    if pooled != list(size):
        features = F.interpolate(features, size=list(size), mode=_INTERPOLATIONS[len(pooled)], align_corners=False)
    return features
