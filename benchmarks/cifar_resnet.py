"""The CIFAR form of residual networks, as factories: `base: benchmarks.cifar_resnet:resnet20` in a recipe.

He et al. 2015 (arXiv 1512.03385, section 4.2): a 3x3 convolution, three stages of n basic blocks with 16, 32 and 64
channels and strides 1, 2 and 2, a mean over positions, a linear layer; 6n + 2 layers. Shortcuts are option A: where
the shape changes, every second pixel and zeros for the new channels, no parameters. Parameters carry the names of the
checkpoints that are commonly found (`layer1.0.conv1.weight`, `linear.bias`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

CHANNELS = (16, 32, 64)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around which the input is added."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.new_channels = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        """(b, inputs, h, w) -> (b, outputs, h / stride, w / stride)."""
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(y)) + self._shortcut(x))

    def _shortcut(self, x: Tensor) -> Tensor:
        if self.new_channels == 0:
            return x
        half = self.new_channels // 2
        return functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, half))


class CifarResNet(nn.Module):
    """Logits of ten classes, (b, 10), from images, (b, 3, 32, 32)."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        first, second, third = CHANNELS
        self.conv1 = nn.Conv2d(3, first, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.layer1 = _stage(first, first, 1, blocks)
        self.layer2 = _stage(first, second, 2, blocks)
        self.layer3 = _stage(second, third, 2, blocks)
        self.linear = nn.Linear(third, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(b, 3, 32, 32) -> (b, 10)."""
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = torch.flatten(functional.adaptive_avg_pool2d(x, 1), 1)  # (b, 64)
        logits: Tensor = self.linear(x)
        return logits


def _stage(inputs: int, outputs: int, stride: int, blocks: int) -> nn.Sequential:
    rest = (BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1))
    return nn.Sequential(BasicBlock(inputs, outputs, stride), *rest)


def resnet20() -> CifarResNet:
    """0.27 M parameters."""
    return CifarResNet(3)


def resnet32() -> CifarResNet:
    """0.46 M parameters."""
    return CifarResNet(5)


def resnet44() -> CifarResNet:
    """0.66 M parameters."""
    return CifarResNet(7)


def resnet56() -> CifarResNet:
    """0.85 M parameters."""
    return CifarResNet(9)
