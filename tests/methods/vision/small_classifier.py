"""A small folded network with a residual addition and a depthwise convolution, and images for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from moqe.methods.vision import Job
from moqe.models.convolutions import LayerSite, blocks, observe_layers
from moqe.progress import Silent
from moqe.recipe import Expert
from moqe.schemes import vision_scheme

SIDE = 8
CLASSES = 5


class Residual(nn.Module):
    """Two convolutions around which the input is added."""

    def __init__(self, channels: int, groups: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, groups=groups)
        self.conv2 = nn.Conv2d(channels, channels, 1 if groups > 1 else 3, padding=0 if groups > 1 else 1)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.conv2(functional.relu(self.conv1(x))) + x)


class Small(nn.Module):
    """Six convolutions, one of them depthwise, and a linear: (b, 3, 8, 8) -> (b, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.plain = Residual(8)
        self.depthwise = Residual(8, groups=8)
        self.widen = nn.Conv2d(8, 16, 1, stride=2)
        self.linear = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.stem(x))
        x = functional.relu(self.widen(self.depthwise(self.plain(x))))
        return self.linear(x.mean((2, 3)))


@dataclass(frozen=True)
class Images:
    """Images in memory. Satisfies `CalibrationImages`."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: Tensor) -> Tensor:
        return self.pixels[rows]


@dataclass(frozen=True)
class Setting:
    """All that a method is given."""

    network: nn.Module
    sites: tuple[LayerSite, ...]
    blocks: tuple[str, ...]
    images: Images
    held_out: Images


def make_images(count: int, seed: int) -> Images:
    """Noisy gratings of one direction a class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    angle = labels * torch.pi / CLASSES
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    phase = torch.rand(count, 1, 1, generator=generator) * 6
    wave = torch.sin(phase + 1.3 * (angle.cos()[:, None, None] * x + angle.sin()[:, None, None] * y))
    return Images(wave[:, None] + torch.randn(count, 3, SIDE, SIDE, generator=generator), labels)


def make_setting() -> Setting:
    """A network trained for a second, with 96 images to calibrate on and 160 others."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Small()
    images = make_images(96, seed=1)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.005)
    for _ in range(80):
        optimizer.zero_grad()
        functional.cross_entropy(network(images.pixels), images.labels).backward()
        optimizer.step()
    network.eval().requires_grad_(False)
    example = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))
    return Setting(
        network, observe_layers(network, example), blocks(network, example), images, make_images(160, seed=3)
    )


def expert(method: str, scheme: str, **options: object) -> Expert:
    """An expert of a method with the options of its section."""
    return Expert.model_validate({"name": "test", "method": method, "scheme": scheme, method: options})


def job(setting: Setting, method: str, scheme: str, seed: int = 0, **options: object) -> Job:
    """What a method with these options is asked to do with the small classifier."""
    return Job(
        setting.network,
        setting.sites,
        setting.blocks,
        setting.images,
        vision_scheme(scheme),
        expert(method, scheme, **options),
        seed,
        Silent(),
    )


@torch.no_grad()
def divergence(network: nn.Module, quantized: nn.Module, images: Images) -> float:
    """Squared difference of the logits, relative to their square."""
    truth, result = network(images.pixels), quantized(images.pixels)
    return float((truth - result).square().sum() / truth.square().sum())
