"""The seam between expert files and whoever runs them: parameters by name, loaded one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from moqe.quantized import Quantized


class ExpertFiles(Protocol):
    """An expert on disk, opened for reading. Nothing is read before `load` asks for it."""

    format: str  # "compressed-tensors", "gguf", "gptq", "awq"

    def names(self) -> list[str]:
        """The base model's parameter names that this expert replaces, e.g. `model.layers.0.mlp.up_proj.weight`."""

    def load(self, name: str) -> Quantized | Tensor:
        """One parameter: quantized, or a float tensor (norms, biases). Raises CheckpointError when it is damaged."""

    def activation_bits(self, name: str) -> int:
        """Bits of the dynamic per-token quantization of the input of the linear `name`; 16 means none."""


class ExpertWriter(Protocol):
    """Writes an expert block by block, resumably: a block that `has` is whole and is never written again."""

    def has(self, block: int) -> bool:
        """Whether block `block` is already on disk, whole."""

    def write(self, block: int, tensors: Mapping[str, Quantized | Tensor]) -> None:
        """Write all parameters of one decoder block, by the base model's full parameter names."""

    def finish(self) -> None:
        """Write what surrounds the blocks; afterwards the folder can be loaded by others."""
