"""The seam between expert files and whoever runs them: parameters by name, loaded one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from torch import Tensor

from moqe.formats.packed_tensor import PackedTensor
from moqe.formats.shared_codes import Lease
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


@runtime_checkable
class PackedFiles(ExpertFiles, Protocol):
    """An expert whose codes can stay as they are on disk, in common with experts that have the same files of codes."""

    def packed(self, name: str, lease: Lease) -> PackedTensor | Quantized | Tensor:
        """Like `load`, but with codes and scales as views of files that `lease` holds, where the layout allows it."""

    def close(self) -> None:
        """Forget what was opened for `load`; files are opened again when they are needed."""


class ExpertWriter(Protocol):
    """Writes an expert block by block, resumably: a block that `has` is whole and is never written again."""

    def has(self, block: int) -> bool:
        """Whether block `block` is already on disk, whole."""

    def write(self, block: int, tensors: Mapping[str, Quantized | Tensor]) -> None:
        """Write all parameters of one decoder block, by the base model's full parameter names."""

    def finish(self) -> None:
        """Write what surrounds the blocks; afterwards the folder can be loaded by others."""
