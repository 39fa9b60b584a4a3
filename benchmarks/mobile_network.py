"""A small network of what makes int8 slow: depthwise convolutions, squeeze-excite, Hardswish, SiLU, LayerNorm, GELU."""

import torch
from torch import Tensor, nn


class SqueezeExcite(nn.Module):
    """Channels weighted by what the whole image says, as in MobileNetV3."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.squeeze = nn.Conv2d(channels, squeezed, 1)
        self.excite = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, channels, H, W) to the same shape."""
        weights = self.excite(torch.relu(self.squeeze(self.pool(x))))
        return x * nn.functional.hardsigmoid(weights)


class InvertedResidual(nn.Module):
    """Pointwise, depthwise, pointwise convolution, and the input added where sizes allow."""

    def __init__(
        self, channels_in: int, expanded: int, channels: int, stride: int, activation: type[nn.Module], *, excite: bool
    ) -> None:
        super().__init__()
        self.expand = nn.Sequential(
            nn.Conv2d(channels_in, expanded, 1, bias=False), nn.BatchNorm2d(expanded), activation()
        )
        self.depthwise = nn.Sequential(
            nn.Conv2d(expanded, expanded, 3, stride, padding=1, groups=expanded, bias=False),
            nn.BatchNorm2d(expanded),
            activation(),
        )
        self.excite = SqueezeExcite(expanded, max(8, expanded // 4)) if excite else nn.Identity()
        self.project = nn.Sequential(nn.Conv2d(expanded, channels, 1, bias=False), nn.BatchNorm2d(channels))
        self.residual = stride == 1 and channels_in == channels

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, channels_in, H, W) to (N, channels, H / stride, W / stride)."""
        y = self.project(self.excite(self.depthwise(self.expand(x))))
        return x + y if self.residual else y


class MobileNetwork(nn.Module):
    """Logits, (N, 10), of images (N, 3, 16, 16); 57 thousand parameters, after MobileNetV3 (arXiv 1905.02244)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.Hardswish())
        self.blocks = nn.Sequential(
            InvertedResidual(16, 32, 16, 1, nn.ReLU, excite=True),
            InvertedResidual(16, 64, 24, 2, nn.Hardswish, excite=False),
            InvertedResidual(24, 96, 24, 1, nn.SiLU, excite=True),
            InvertedResidual(24, 96, 40, 2, nn.Hardswish, excite=True),
            InvertedResidual(40, 120, 40, 1, nn.Hardswish, excite=True),
        )
        self.norm = nn.LayerNorm(40)
        self.hidden = nn.Linear(40, 96)
        self.head = nn.Linear(96, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, 3, 16, 16) to (N, 10)."""
        x = self.blocks(self.stem(x))
        x = self.norm(x.permute(0, 2, 3, 1)).mean((1, 2))
        return self.head(nn.functional.gelu(self.hidden(x)))
