"""Scikit-learn's 1,797 scanned digits: the models and the task that `digits.yaml` names."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from compressor import Augmentation, Inputs, Samples, Task


class Residual(nn.Module):
    """Two convolutions around which the input is added back; (N, channels, H, W) in and out."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, channels, H, W) to the same shape."""
        hidden = F.relu(self.bn1(self.conv1(x)))
        return F.relu(x + self.bn2(self.conv2(hidden)))


def residual_network(width: int, blocks: int) -> nn.Module:
    """A residual network for (N, 1, 8, 8) images: `width` channels, twice as many after the pooling."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        *(Residual(width) for _ in range(blocks)),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        *(Residual(2 * width) for _ in range(blocks)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, 10),
    )


def teacher() -> nn.Module:
    """The large model, 251 thousand parameters."""
    return residual_network(width=48, blocks=1)


def student() -> nn.Module:
    """The small model, 28 thousand parameters before pruning."""
    return residual_network(width=16, blocks=1)


def task() -> Task:
    """1,257 digits to learn from, 180 to choose by, 360 to report on; some of the first calibrate int8."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = (torch.from_numpy(digits.images).float() / 16).unsqueeze(1)[order]
    targets = torch.from_numpy(digits.target).long()[order]

    def split(start: int, stop: int) -> Samples:
        return Samples((images[start:stop],), targets[start:stop])

    return Task(
        train=split(540, 1797),
        validation=split(360, 540),
        test=split(0, 360),
        calibration=split(540, 1052),
        example_inputs=(images[:2],),
        augmentation=Augmentation(numbers=2, apply=shift_by_one_pixel),
        labels=tuple("0123456789"),
        preprocessing={"layout": "NCHW", "scale": 1 / 16, "range": [0, 16]},
    )


def shift_by_one_pixel(inputs: Inputs, uniform: Tensor) -> Inputs:
    """Move each image by -1, 0 or 1 pixel in both directions; `uniform` is (N, 2) in [0, 1)."""
    (images,) = inputs
    height, width = images.shape[-2:]
    offsets = (uniform * 3).long()
    rows = offsets[:, :1] + torch.arange(height)
    columns = offsets[:, 1:] + torch.arange(width)
    padded = F.pad(images, (1, 1, 1, 1))
    return (padded[torch.arange(len(images))[:, None, None], :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1),)
