"""What happens between a decoded image and a network's input: resize, centre crop, scale, normalise.

Every image is resized with its shorter edge at a given length or to a given size, by Pillow with antialiasing, then cut
to the crop from its centre (an odd pixel is left over at the bottom or right), then each value becomes
(value * rescale - mean) / std per channel in float32. That is what classifiers are evaluated with in torchvision, timm
and transformers; the two last ones may work on tensors in place of Pillow's images and then differ by a grey level
here and there.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from moqe import recipe
from moqe.errors import DataError, RecipeError
from moqe.store import canonical_hash

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 178_956_970  # half a GiB in RGB, where Pillow too speaks of a decompression bomb
Channels = tuple[float, float, float]


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes a network's input.

    resize: length of the shorter edge, or (height, width), pixels; None leaves the image as it is. crop: (height,
    width) of the centre that is kept, and hence of what comes out. interpolation: nearest, box, bilinear, hamming,
    bicubic or lanczos. rescale: what a value of 0 to 255 is multiplied by. mean, std: per channel, of rescaled values.
    """

    resize: int | tuple[int, int] | None
    crop: tuple[int, int]
    mean: Channels
    std: Channels
    interpolation: str = "bilinear"
    rescale: float = 1 / 255

    @classmethod
    def from_recipe(cls, stated: recipe.Preprocessing) -> Preprocessing:
        """What a recipe's `data.preprocessing` says; without `crop` a square of the length `resize` is kept.

        Raises RecipeError when it states neither.
        """
        side = stated.crop or stated.resize
        if side is None:
            raise RecipeError("data.preprocessing states no size: add crop, the side of the images in pixels")
        return cls(stated.resize, (side, side), stated.mean, stated.std, stated.interpolation)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of what comes out."""
        return self.crop

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that name it."""
        return canonical_hash(asdict(self))

    def describe(self) -> str:
        """One line for people."""
        if self.resize is None:
            steps = ["size as it is"]
        elif isinstance(self.resize, int):
            steps = [f"shorter edge to {self.resize} ({self.interpolation})"]
        else:
            steps = [f"resize to {_by(self.resize)} ({self.interpolation})"]
        if self.crop != self.resize:
            steps.append(f"centre crop {_by(self.crop)}")
        scale = "1/255" if abs(self.rescale * 255 - 1) < 1e-6 else f"{self.rescale:g}"
        steps.append(f"values x {scale}, mean {_listed(self.mean)}, std {_listed(self.std)}")
        return ", ".join(steps)

    def arrange(self, image: Image, name: str) -> Tensor:
        """Resize and crop an RGB image: uint8, (3, h, w).

        Raises DataError, naming the image, when it is smaller than the crop or too long for resizing.
        """
        from PIL.Image import Resampling

        target = self._resized((image.height, image.width))
        if target[0] * target[1] > MAX_PIXELS:
            raise DataError(
                f"{name} is {image.width} x {image.height} pixels, and resizing it makes {target[1]:,} x {target[0]:,}:"
                " remove it"
            )
        if target != (image.height, image.width):
            image = image.resize((target[1], target[0]), Resampling[self.interpolation.upper()])
        height, width = self.crop
        if height > target[0] or width > target[1]:
            raise DataError(
                f"{name} is {target[1]} x {target[0]} pixels where {width} x {height} are to be cut from it: set "
                "resize in data.preprocessing, at least as large as crop"
            )
        if (height, width) != target:
            top, left = (target[0] - height) // 2, (target[1] - width) // 2
            image = image.crop((left, top, left + width, top + height))
        return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8, (b, 3, h, w), to the network's input, float32, of the same shape and on the same device."""
        mean = torch.tensor(self.mean, device=pixels.device)[:, None, None]
        std = torch.tensor(self.std, device=pixels.device)[:, None, None]
        return (pixels.float() * self.rescale - mean) / std

    def _resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) after resizing; the longer edge is rounded down."""
        if self.resize is None:
            return size
        if not isinstance(self.resize, int):
            return self.resize
        height, width = size
        if height <= width:
            return self.resize, int(self.resize * width / height)
        return int(self.resize * height / width), self.resize


def _by(size: tuple[int, int]) -> str:
    return f"{size[1]} x {size[0]}"


def _listed(values: Channels) -> str:
    return " ".join(f"{value:g}" for value in values)
