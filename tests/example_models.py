"""Networks for export and quantization: the operators that int8 kernels are made of, and what cannot be exported."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SeparableNetwork(nn.Module):
    """Depthwise and pointwise convolutions, clips in place, channel attention, for (N, 1, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU6(inplace=True))
        self.depthwise = nn.Sequential(
            nn.Conv2d(16, 16, 3, padding="same", groups=16, bias=False), nn.BatchNorm2d(16), nn.Hardtanh(inplace=True)
        )
        self.attention = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 16, 1), nn.Sigmoid())
        self.pointwise = nn.Sequential(nn.Conv2d(16, 32, 1), nn.BatchNorm2d(32), nn.LeakyReLU())
        self.head = nn.Linear(32 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.stem(x))
        x = self.pointwise(x * self.attention(x)).clamp_(-1, 4)
        return self.head(F.dropout(F.avg_pool2d(x, 4).flatten(1), training=self.training))


class SignalNetwork(nn.Module):
    """One-dimensional convolutions, for (N, 1, 8, 8) read row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(1, 8, 5, padding=2)
        self.conv2 = nn.Conv1d(8, 32, 5)
        self.head = nn.Linear(32 * 7, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool1d(F.relu(self.conv1(x.flatten(2))), 2)
        return self.head(F.avg_pool1d(F.relu(self.conv2(x)), 4).flatten(1))


class SequenceNetwork(nn.Module):
    """Attention over the 8 rows of (N, 1, 8, 8), with a residual stream and LayerNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(8, 16)
        self.norm = nn.LayerNorm(16)
        self.query_key_value = nn.Linear(16, 48)
        self.projection = nn.Linear(16, 16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x.squeeze(1))
        query, key, value = self.query_key_value(self.norm(x)).chunk(3, dim=-1)
        x = x + self.projection(torch.softmax(query @ key.transpose(1, 2) / 4, dim=-1) @ value)
        return self.head(x.mean(1))


class TextNetwork(nn.Module):
    """Two inputs of open length: token numbers and a mask, each (N, L)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        embedded = self.embedding(input_ids) * attention_mask.unsqueeze(-1)
        return self.head(embedded.sum(1) / attention_mask.sum(1, keepdim=True))


class CifarBlock(nn.Module):
    """Two convolutions and a shortcut without parameters: every second pixel, new channels zero."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.added = channels - channels_in

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.added:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.added // 2, self.added // 2))
        return F.relu(y + x)


class CifarResNet(nn.Module):
    """ResNet for (N, 3, 32, 32) of He et al. 2015, section 4.2: 6 * `blocks` + 2 layers."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        for position, (channels_in, channels, stride) in enumerate([(16, 16, 1), (16, 32, 2), (32, 64, 2)], start=1):
            rest = [CifarBlock(channels, channels, 1) for _ in range(blocks - 1)]
            setattr(self, f"layer{position}", nn.Sequential(CifarBlock(channels_in, channels, stride), *rest))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(F.avg_pool2d(x, x.size(3)).flatten(1))


class BranchingNetwork(nn.Module):
    """Its path depends on the values of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.head(x.flatten(1))
        return logits * 2 if logits.sum() > 0 else logits


class FixedBatchNetwork(nn.Module):
    """Its forward holds the batch size of the example."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.reshape(2, 64))


class AttentionOfRankThree(nn.Module):
    """Attention without a head dimension, which torch computes and does not translate."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.squeeze(1)
        return F.scaled_dot_product_attention(x, x, x)


class SingularNetwork(nn.Module):
    """It uses an operator that ONNX does not have."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.svdvals(x.squeeze(1))


class RandomNetwork(nn.Module):
    """Its dropout is on in evaluation mode as well."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.dropout(x.flatten(1), 0.5, training=True))
