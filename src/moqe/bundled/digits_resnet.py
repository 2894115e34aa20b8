"""The architecture of `bundled:digits-resnet`: a residual network for images of 8 x 8 pixels, 78 thousand parameters.

The CIFAR form of He et al. 2015 (arXiv 1512.03385, section 4.2) at its smallest, depth 8: a 3x3 convolution, three
stages of one basic block with 16, 32 and 64 channels and strides 1, 2 and 2, a mean over positions, a linear layer.
Differs: where the shape changes the shortcut is a 1x1 convolution with batch normalisation (their option B).
Convolution, batch normalisation and ReLU follow each other as in large networks, so that folding, depth blocks and
the quantized addition after a shortcut all occur.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

CHANNELS = (16, 32, 64)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut around them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(b, inputs, h, w) -> (b, outputs, h / stride, w / stride)."""
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class DigitsResNet(nn.Module):
    """Logits of ten digits, (b, 10), from images, (b, 3, h, w)."""

    def __init__(self) -> None:
        super().__init__()
        first, second, third = CHANNELS
        self.conv1 = nn.Conv2d(3, first, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.layer1 = BasicBlock(first, first, 1)
        self.layer2 = BasicBlock(first, second, 2)
        self.layer3 = BasicBlock(second, third, 2)
        self.head = nn.Linear(third, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(b, 3, h, w) -> (b, 10)."""
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits
