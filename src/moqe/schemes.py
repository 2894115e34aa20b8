"""Number formats: how many bits a weight and an activation take, and how they are grouped.

Integer schemes `w<bits>a<bits>` store codes, scales (and zero points) and become compressed-tensors folders.
Block schemes `q<bits>_...` are ggml's types and become GGUF files. A scheme's bits per weight counts codes, scales,
offsets and super-block scales, because a comparison at equal bytes is the only fair one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from moqe.errors import RecipeError, did_you_mean


@dataclass(frozen=True)
class Scheme:
    """A number format.

    `group_size` is the number of consecutive input channels that share a scale; 0 means one scale per output
    channel. `activation_bits` of 16 means activations stay in floating point; otherwise they are quantized per token,
    symmetrically, when the layer runs. `block` names ggml's type for block schemes and is empty for integer schemes.
    `scale_bits` are those of an integer scheme's scales as a recipe asks for them: 16, in the type that the base model
    suggests, or 32. Scales that are read have the type of their tensor, whatever this says.
    """

    name: str
    weight_bits: int
    activation_bits: int = 16
    symmetric: bool = True
    group_size: int = 0
    block: str = ""
    block_size: int = 0  # rows must be a multiple of it
    block_bytes: int = 0
    scale_bits: int = 16

    @property
    def is_block(self) -> bool:
        """True for ggml's block types, false for integer codes with separate scales."""
        return bool(self.block)

    @property
    def levels(self) -> tuple[int, int]:
        """Smallest and largest integer code: signed for symmetric schemes, unsigned for asymmetric ones."""
        half = 1 << (self.weight_bits - 1)
        return (-half, half - 1) if self.symmetric else (0, 2 * half - 1)

    def bits_per_weight(self, columns: int) -> float:
        """Stored bits per weight of a row of `columns` inputs: codes, scales, zero points at the codes' width.

        Codes that meet quantized activations are stored as int8 whatever their width, which is what loaders expect.
        """
        if self.is_block:
            return 8 * self.block_bytes / self.block_size
        size = self.group_size or columns
        stored = self.weight_bits if self.activation_bits == 16 else 8
        return stored + (self.scale_bits + (0 if self.symmetric else stored)) / size

    def configured(self, group_size: int | None, symmetric: bool | None, scale_bits: int | None = None) -> Scheme:
        """The scheme with a recipe's group size, symmetry and width of scales; None leaves the scheme's own.

        Raises RecipeError where the scheme does not leave that choice open.
        """
        if self.is_block:
            if any(value is not None for value in (group_size, symmetric, scale_bits)):
                raise RecipeError(
                    f"scheme {self.name} has a fixed block layout: remove group_size, symmetric and scale_bits"
                )
            return self
        if group_size and self.activation_bits < 16 and self.weight_bits == 8:
            raise RecipeError(f"scheme {self.name} has one weight scale per output channel: set group_size to 0")
        return replace(
            self,
            group_size=self.group_size if group_size is None else group_size,
            symmetric=self.symmetric if symmetric is None else symmetric,
            scale_bits=scale_bits or self.scale_bits,
        )


SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("w8a16", 8),
        Scheme("w4a16", 4, group_size=128),
        Scheme("w3a16", 3, group_size=64, symmetric=False),
        Scheme("w2a16", 2, group_size=64, symmetric=False),
        Scheme("w8a8", 8, activation_bits=8),
        Scheme("w4a8", 4, activation_bits=8, group_size=128),
        Scheme("q2_k", 2, symmetric=False, block="Q2_K", block_size=256, block_bytes=84),
        Scheme("q3_k", 3, block="Q3_K", block_size=256, block_bytes=110),
        Scheme("q4_k", 4, symmetric=False, block="Q4_K", block_size=256, block_bytes=144),
        Scheme("q5_k", 5, symmetric=False, block="Q5_K", block_size=256, block_bytes=176),
        Scheme("q6_k", 6, block="Q6_K", block_size=256, block_bytes=210),
        Scheme("q4_0", 4, block="Q4_0", block_size=32, block_bytes=18),
        Scheme("q4_1", 4, symmetric=False, block="Q4_1", block_size=32, block_bytes=20),
        Scheme("q5_0", 5, block="Q5_0", block_size=32, block_bytes=22),
        Scheme("q8_0", 8, block="Q8_0", block_size=32, block_bytes=34),
    )
}


def scheme(
    name: str, group_size: int | None = None, symmetric: bool | None = None, scale_bits: int | None = None
) -> Scheme:
    """Look a scheme up by name and configure it. Raises RecipeError on an unknown name."""
    if name not in SCHEMES:
        raise RecipeError(f"unknown scheme {name!r}; {did_you_mean(name, SCHEMES)}")
    return SCHEMES[name].configured(group_size, symmetric, scale_bits)


# Of image classifiers: one weight scale per output channel, activations quantized with scales found by calibration.
VISION_SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("w8a8", 8, activation_bits=8),
        Scheme("w4a8", 4, activation_bits=8),
        Scheme("w4a4", 4, activation_bits=4),
    )
}


def vision_scheme(name: str) -> Scheme:
    """Look a scheme for images up by name. Raises RecipeError on an unknown name."""
    if name not in VISION_SCHEMES:
        raise RecipeError(f"unknown scheme {name!r} for images; {did_you_mean(name, VISION_SCHEMES)}")
    return VISION_SCHEMES[name]
