"""Small networks of the kinds that users bring, for (N, 1, 8, 8) digits."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainNetwork(nn.Module):
    """Convolutions with BatchNorm, a pooling, two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.fc1 = nn.Linear(32 * 4 * 4, 64)
        self.fc2 = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


class ResidualNetwork(nn.Module):
    """An addition that ties the channels of three convolutions, one of them depthwise, and a global pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.pointwise = nn.Conv2d(16, 16, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.stem(x)))
        x = F.relu(x + self.bn3(self.pointwise(F.relu(self.bn2(self.depthwise(x))))))
        return self.head(x.mean((2, 3)))


class ResidualBlock(nn.Module):
    """A convolution around which its input is added back, (N, 16, H, W) to the same."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn(self.conv(x)))


class StackedNetwork(nn.Module):
    """Two stacks of equal blocks, which can lose blocks as well as channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.stack1 = nn.Sequential(*(ResidualBlock() for _ in range(6)))
        self.stack2 = nn.ModuleList(ResidualBlock() for _ in range(6))
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stack1(self.stem(x))
        for block in self.stack2:
            x = block(x)
        return self.head(x.mean((2, 3)))


class ConcatenatedNetwork(nn.Module):
    """Two branches whose channels are joined."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(1, 16, 3, padding=1)
        self.right = nn.Conv2d(1, 16, 1)
        self.joined = nn.Conv2d(32, 16, 3)
        self.head = nn.Linear(16 * 36, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([F.relu(self.left(x)), F.relu(self.right(x))], dim=1)
        return self.head(F.relu(self.joined(x)).flatten(1))


class GroupedNetwork(nn.Module):
    """Convolutions in groups, one after the other, of unequal numbers."""

    def __init__(self, first: int = 2, second: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 24, 3, padding=1)
        self.first = nn.Conv2d(24, 48, 3, padding=1, groups=first)
        self.second = nn.Conv2d(48, 24, 1, groups=second)
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(F.relu(self.stem(x))))
        return self.head(F.relu(self.second(x)).mean((2, 3)))


class SqueezeExciteNetwork(nn.Module):
    """Channels that are multiplied with what two layers make of their means, and pixels with a map of one channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.squeeze = nn.Linear(16, 8)
        self.excite = nn.Linear(8, 16)
        self.map = nn.Conv2d(16, 1, 3, padding=1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        x = x * torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3))))))[:, :, None, None]
        return self.head((x * torch.sigmoid(self.map(x))).mean((2, 3)))


class ConvNextNetwork(nn.Module):
    """LayerNorm over channels in the last axis, a wide linear layer, a scale for each channel, a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 2, stride=2)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.norm = nn.LayerNorm(16)
        self.widen = nn.Linear(16, 64)
        self.narrow = nn.Linear(64, 16)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 16))
        self.last_norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.narrow(F.gelu(self.widen(self.norm(self.depthwise(x).permute(0, 2, 3, 1)))))
        x = x + (self.scale * y).permute(0, 3, 1, 2)
        return self.head(self.last_norm(x.mean((2, 3))))


class DecoderNetwork(nn.Module):
    """A transposed convolution, GroupNorm and a PReLU with a slope for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(1, 16, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(4, 16)
        self.up = nn.ConvTranspose2d(16, 12, 2, stride=2)
        self.bn = nn.BatchNorm2d(12, affine=False)
        self.slope = nn.PReLU(12)
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(F.relu(self.norm(self.down(x))))
        return self.head(self.slope(self.bn(x)).mean((2, 3)))


class TenEverywhereNetwork(nn.Module):
    """A hidden layer as wide as the output, which only a trial can tell from it."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(64, 10)
        self.head = nn.Linear(10, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.hidden(x.flatten(1))))


class FixedViewNetwork(nn.Module):
    """A network with a channel count written in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 3)
        self.head = nn.Linear(16 * 36, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv(x)).view(-1, 16 * 36))


class TiedNetwork(nn.Module):
    """Two layers that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.second = nn.Linear(64, 64)
        self.second.weight = self.first.weight
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.second(F.relu(self.first(x.flatten(1))))))


class ManyClassesNetwork(nn.Module):
    """A linear layer to 5,000 classes, some far more likely than others."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 5000)
        nn.init.normal_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1))


def not_a_module() -> str:
    return "a model"


class WideNetwork(nn.Module):
    """Three convolutions of 96 channels, which take nearly all of the time."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 96, 3, padding=1)
        self.conv2 = nn.Conv2d(96, 96, 3, padding=1)
        self.conv3 = nn.Conv2d(96, 96, 3, padding=1)
        self.head = nn.Linear(96, 10)

    def forward(self, x):
        return self.head(self.conv3(self.conv2(self.conv1(x).relu()).relu()).relu().mean((2, 3)))
