"""The paper's image router: one feature vector of an image to logits per expert.

Source: Zhang et al., MoQE (arXiv 2508.09204), section on router models. A global feature of 2048 numbers passes an MLP
of widths 1024, 128 and 1024, each layer with batch normalisation and ReLU; its output is read as 16 channels of 8 x 8
positions and passes SE-ResNet-8 (stages of 16, 32 and 64 channels, strides 1, 2 and 2, one basic block each, with
squeeze and excitation) and 8-head self-attention over the positions (heads of 8 numbers, learnable temperature that
starts at 1.0); the mean over positions gives the logits.

Faithful: all of that. The depth 8 counts as in He et al. 2015: a first 3x3 convolution, three blocks of two, the last
linear layer. Left open by the paper and chosen here: squeeze-and-excitation reduces 16-fold (its authors' default,
Hu et al. 2018) and sits before the addition; a shortcut that changes shape is a 1x1 convolution with batch
normalisation; attention scores are divided by sqrt(8) and by one temperature for all heads, learnt as its logarithm so
that it stays positive; attention has an output projection, a residual connection and no positions or dropout.
Differs: 2048 is the width of ResNet-50's penultimate layer, and other bases and the `stem` feature have another; the
first layer of the MLP takes whatever width there is and everything behind it is as in the paper.
Cost: 1024 (d + 256) + 0.9 million multiplications an image, 3.3 million at d = 2048, against 4,100 million of
ResNet-50; 2.5 million parameters there.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from moqe.router.text_network import RoutingNetwork

MLP_WIDTHS = (1024, 128, 1024)
MAP = (16, 8, 8)  # channels, height, width: the 1024 numbers that the MLP ends in
STAGES = ((16, 1), (32, 2), (64, 2))  # channels, stride
REDUCTION = 16
HEADS = 8


class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation of vectors that takes a batch of one, which has no variance, as in evaluation."""

    def forward(self, x: Tensor) -> Tensor:
        """(b, width) -> (b, width)."""
        if self.training and len(x) == 1:
            return functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(x)


class SqueezeExcitation(nn.Module):
    """A weight between 0 and 1 for every channel, from the means of all channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze = nn.Linear(channels, channels // REDUCTION)
        self.excite = nn.Linear(channels // REDUCTION, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels, h, w) -> the same shape."""
        weight: Tensor = self.excite(functional.relu(self.squeeze(x.mean((2, 3))))).sigmoid()
        return x * weight[:, :, None, None]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, squeeze and excitation, and a shortcut around them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            SqueezeExcitation(outputs),
        )
        same = stride == 1 and inputs == outputs
        self.shortcut = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        )

    def forward(self, x: Tensor) -> Tensor:
        """(b, inputs, h, w) -> (b, outputs, h / stride, w / stride)."""
        return functional.relu(self.body(x) + self.shortcut(x))


class PositionAttention(nn.Module):
    """Self-attention between the positions of a map, with a learnable temperature."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(channels, 3 * channels)
        self.projection = nn.Linear(channels, channels)
        self.log_temperature = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """(b, positions, channels) -> the same shape."""
        batch, positions, channels = x.shape
        shape = (batch, positions, 3, self.heads, channels // self.heads)
        query, key, value = self.query_key_value(x).view(shape).permute(2, 0, 3, 1, 4)  # (b, heads, positions, 8) each
        # The temperature belongs to the scores; put on the queries, the fused kernel can be used.
        mixed = functional.scaled_dot_product_attention(query / self.log_temperature.exp(), key, value)
        out: Tensor = self.projection(mixed.transpose(1, 2).flatten(2))
        return out


class ImageNetwork(RoutingNetwork):
    """Logits per expert from one vector per image; `dimension` is the vector's width."""

    kind = "image"

    def __init__(self, dimension: int, experts: int) -> None:
        super().__init__()
        self.options = {"dimension": dimension, "experts": experts}
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise((dimension, *MLP_WIDTHS)):
            layers += [nn.Linear(inputs, outputs), BatchNorm(outputs), nn.ReLU()]
        self.mlp = nn.Sequential(*layers)
        width = MAP[0]
        self.entry = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.stages = nn.Sequential()
        for channels, stride in STAGES:
            self.stages.append(BasicBlock(width, channels, stride))
            width = channels
        self.attention = PositionAttention(width, HEADS)
        self.head = nn.Linear(width, experts)

    def forward(self, features: Tensor) -> Tensor:
        """Vectors, (b, dimension) -> logits, (b, experts)."""
        x = self.mlp(features).view(-1, *MAP)
        # Contiguous: on a strided view the kernel depends on whether weights want gradients, and with it the last bit.
        x = self.stages(self.entry(x)).flatten(2).transpose(1, 2).contiguous()  # (b, 2 x 2 positions, 64)
        x = x + self.attention(x)
        logits: Tensor = self.head(x.mean(1))
        return logits
