"""MNIST, 70,000 handwritten digits: the models and the task that `mnist.yaml` names."""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressor.task import Augmentation, Inputs, Samples, Task


def lenet5() -> nn.Module:
    """The large model: LeNet-5 with 20, 50 and 500 features, 431 thousand parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 20, 5),
        nn.MaxPool2d(2),
        nn.Conv2d(20, 50, 5),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(50 * 4 * 4, 500),
        nn.ReLU(),
        nn.Linear(500, 10),
    )


def lenet_300_100() -> nn.Module:
    """Two hidden layers of 300 and 100 units, 267 thousand parameters."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )


def student() -> nn.Module:
    """The small model, 38 thousand parameters before pruning.

    Shaped for int8 at batch 1, where an operator costs more than its arithmetic: strides instead of pooling, no
    padding between convolutions, 28x28 pixels down to 9x9 positions at once.
    """
    return nn.Sequential(
        *convolution(1, 32, kernel_size=5, stride=3, padding=1),
        *convolution(32, 32, kernel_size=3),
        *convolution(32, 32, kernel_size=3, stride=2),
        *convolution(32, 64, kernel_size=3),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def smallest_student() -> nn.Module:
    """Three layers, 10 thousand parameters before pruning: beside LeNet-300-100 each further operator shows."""
    return nn.Sequential(
        *convolution(1, 16, kernel_size=5, stride=3, padding=1),
        *convolution(16, 32, kernel_size=3, stride=2),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 10),
    )


def convolution(
    channels: int, features: int, *, kernel_size: int, stride: int = 1, padding: int = 0
) -> list[nn.Module]:
    """Convolution, normalization, ReLU; the first two become one on export."""
    return [
        nn.Conv2d(channels, features, kernel_size, stride, padding, bias=False),
        nn.BatchNorm2d(features),
        nn.ReLU(),
    ]


def task(data_dir: Path) -> Task:
    """55,000 images to learn from, 5,000 to choose by, MNIST's own 10,000 to report on.

    `data_dir` holds `train.npz` and `test.npz`, each with `x`, uint8 (N, 28, 28), and `y`, uint8 (N,).
    """
    images, targets = load(data_dir / "train.npz")
    test_images, test_targets = load(data_dir / "test.npz")
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
    images, targets = images[order], targets[order]
    return Task(
        train=Samples((images[5000:],), targets[5000:]),
        validation=Samples((images[:5000],), targets[:5000]),
        test=Samples((test_images,), test_targets),
        calibration=Samples((images[5000:6000],), targets[5000:6000]),
        example_inputs=(images[:2],),
        augmentation=Augmentation(numbers=5, apply=distort),
        labels=tuple("0123456789"),
        preprocessing={"layout": "NCHW", "scale": 1 / 255, "range": [0, 255]},
    )


def load(file: Path) -> tuple[Tensor, Tensor]:
    """Images, float32 (N, 1, 28, 28) in [0, 1], and targets, int64 (N,)."""
    with np.load(file) as arrays:
        images = torch.from_numpy(arrays["x"]).unsqueeze(1).float() / 255
        return images, torch.from_numpy(arrays["y"]).long()


def distort(inputs: Inputs, uniform: Tensor) -> Inputs:
    """Turn each image by up to 10 degrees, scale and shear it by up to 10 %, move it by up to 2 pixels.

    `uniform` is (N, 5) in [0, 1): for the angle, scale, shear and the two moves.
    """
    (images,) = inputs
    angle, scale, shear, right, down = (uniform * 2 - 1).unbind(dim=1)
    angle = angle * math.radians(10)
    scale = 1 + 0.1 * scale
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    shear = 0.1 * shear
    width = images.shape[-1] / 2  # grid coordinates run from -1 to 1
    rows = [
        torch.stack([cosine, shear * cosine - sine, right * 2 / width], dim=1),
        torch.stack([sine, shear * sine + cosine, down * 2 / width], dim=1),
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    return (F.grid_sample(images, grid, align_corners=False),)
