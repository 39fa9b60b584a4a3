"""CIFAR-10 as a folder of JPEG files: the models and the task that `cifar10.yaml` names."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from compressor import Augmentation, Inputs, Samples, Task

MEAN, STANDARD_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Block(nn.Module):
    """Two convolutions and a shortcut: every `stride`-th pixel, new channels zero.

    With `projection` the shortcut to another size is a 1x1 convolution that begins as just that.
    """

    def __init__(self, channels_in: int, channels: int, stride: int, *, projection: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        if projection and stride > 1:
            self.projection = nn.Conv2d(channels_in, channels, 1, stride, bias=False)
            before = (channels - channels_in) // 2
            with torch.no_grad():
                self.projection.weight[:, :, 0, 0] = torch.eye(channels, channels_in).roll(before, dims=0)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, channels_in, H, W) to (N, channels, H / stride, W / stride)."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if hasattr(self, "projection"):
            x = self.projection(x)
        elif self.stride > 1:
            added = y.shape[1] - x.shape[1]
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, added // 2, added - added // 2))
        return F.relu(y + x)


class ResNet(nn.Module):
    """ResNet for (N, 3, 32, 32) of He et al. 2015, section 4.2, with 6 * `blocks` + 2 layers."""

    def __init__(self, blocks: int, classes: int = 10, *, projections: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = stack(16, 16, blocks, stride=1, projection=projections)
        self.layer2 = stack(16, 32, blocks, stride=2, projection=projections)
        self.layer3 = stack(32, 64, blocks, stride=2, projection=projections)
        self.linear = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, (N, classes)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def stack(channels_in: int, channels: int, blocks: int, *, stride: int, projection: bool = False) -> nn.Sequential:
    """Blocks in a row; the first changes the channels and the size."""
    rest = [Block(channels, channels, 1) for _ in range(blocks - 1)]
    return nn.Sequential(Block(channels_in, channels, stride, projection=projection), *rest)


def resnet20() -> nn.Module:
    """A smaller model, 270 thousand parameters."""
    return ResNet(blocks=3)


def resnet56() -> nn.Module:
    """The large model, 853 thousand parameters."""
    return ResNet(blocks=9)


def prunable_resnet56(weights_path: Path) -> nn.Module:
    """ResNet-56 with the weights of `resnet56` in a file, and equal logits, whose shortcuts are layers."""
    return with_projections(9, weights_path)


def prunable_resnet20(weights_path: Path) -> nn.Module:
    """ResNet-20 in the same way."""
    return with_projections(3, weights_path)


def with_projections(blocks: int, weights_path: Path) -> nn.Module:
    """A ResNet with weights of one that has none, and equal logits.

    Zeros that a shortcut adds in `forward` stand before and behind the channels of the layers before it: such channels
    cannot leave one by one.
    """
    module = ResNet(blocks, projections=True)
    incompatible = module.load_state_dict(load_file(weights_path), strict=False)
    if incompatible.unexpected_keys or not all("projection" in key for key in incompatible.missing_keys):
        msg = f"{weights_path} must hold the weights of a ResNet of {blocks} blocks a stack, but: {incompatible}"
        raise ValueError(msg)
    return module


def resnet8(classes: int = 10) -> nn.Module:
    """The small model, 75 thousand parameters."""
    return ResNet(blocks=1, classes=classes)


def task(data_dir: Path, labels: int | None = None) -> Task:
    """All but 1,000 training images to learn from, those to choose by, the test images to report on.

    `data_dir` holds `train/CLASS/*.jpg` and `test/CLASS/*.jpg`. With `labels`, only so many training images keep their
    label; the others are unlabeled.
    """
    classes = sorted(path.name for path in (data_dir / "train").iterdir())
    images, targets = load(data_dir / "train", classes)
    test_images, test_targets = load(data_dir / "test", classes)
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
    images, targets = images[order], targets[order]
    labeled = len(targets) - 1000 if labels is None else labels
    learned, learned_targets = images[1000:], targets[1000:]
    return Task(
        train=Samples((learned[:labeled],), learned_targets[:labeled]),
        unlabeled=None if labels is None else Samples((learned[labels:],), torch.zeros(len(learned) - labels)),
        validation=Samples((images[:1000],), targets[:1000]),
        test=Samples((test_images,), test_targets),
        calibration=Samples((learned[:512],), learned_targets[:512]),
        example_inputs=(images[:2],),
        augmentation=Augmentation(numbers=3, apply=crop_and_flip),
        labels=tuple(classes),
        preprocessing={"layout": "NCHW", "color": "RGB", "mean": list(MEAN), "std": list(STANDARD_DEVIATION)},
    )


def load(directory: Path, classes: list[str]) -> tuple[Tensor, Tensor]:
    """Images, float32 (N, 3, 32, 32) with mean 0 and standard deviation 1, and targets, int64 (N,)."""
    files = [(file, number) for number, name in enumerate(classes) for file in sorted((directory / name).glob("*.jpg"))]
    pixels = np.stack([np.asarray(Image.open(file).convert("RGB")) for file, _ in files])
    images = torch.from_numpy(pixels).movedim(-1, 1).float() / 255
    mean, deviation = (torch.tensor(values).reshape(3, 1, 1) for values in (MEAN, STANDARD_DEVIATION))
    return (images - mean) / deviation, torch.tensor([number for _, number in files])


def crop_and_flip(inputs: Inputs, uniform: Tensor) -> Inputs:
    """Move each image by up to 4 pixels in both directions and mirror every other one.

    `uniform` is (N, 3) in [0, 1): for the two moves and the mirror.
    """
    (images,) = inputs
    height, width = images.shape[-2:]
    offsets = (uniform[:, :2] * 9).long()
    rows = offsets[:, :1] + torch.arange(height)
    columns = offsets[:, 1:] + torch.arange(width)
    columns = torch.where(uniform[:, 2:] < 0.5, columns.flip(1), columns)
    padded = F.pad(images, (4, 4, 4, 4))
    return (padded[torch.arange(len(images))[:, None, None], :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1),)
