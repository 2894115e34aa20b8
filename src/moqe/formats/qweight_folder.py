"""What GPTQ and AWQ checkpoints have in common: `<linear>.qweight`, `.qzeros`, `.scales` in a safetensors folder.

They differ in how the words are packed and in what a zero point means; that is a `decode` function each.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from moqe.errors import CheckpointError
from moqe.formats.safetensors_folder import SafetensorsFolder
from moqe.quantized import Quantized

_FIELDS = (".qzeros", ".scales", ".g_idx")

Decode = Callable[[SafetensorsFolder, str], Quantized | Tensor]


class QweightFolder:
    """Reads a folder whose linears `decode` turns into tensors, given the folder and the linear's full name.

    Satisfies `ExpertFiles`. `decode` raises ValueError where fields do not belong together.
    """

    def __init__(self, folder: Path, file_format: str, decode: Decode) -> None:
        self.format, self._files, self._decode = file_format, SafetensorsFolder(folder), decode

    def names(self) -> list[str]:
        """Names of the parameters this folder holds, quantized or not."""
        stored = (name for name in self._files.names() if not name.endswith(_FIELDS))
        return sorted(
            f"{name.removesuffix('.qweight')}.weight" if name.endswith(".qweight") else name for name in stored
        )

    def activation_bits(self, name: str) -> int:
        """16: these formats quantize weights only."""
        return 16

    def load(self, name: str) -> Quantized | Tensor:
        """One parameter: quantized, or a float tensor. Raises CheckpointError when it is damaged or inconsistent."""
        linear = name.removesuffix(".weight")
        key = f"{linear}.qweight"
        if linear == name or key not in self._files:
            if not self._files.is_float(name):
                raise CheckpointError(f"{self._files.path(name)}: {name} holds integers and has no scales")
            return self._files.tensor(name)
        try:
            return self._decode(self._files, linear)
        except (ValueError, RuntimeError, ArithmeticError, IndexError) as error:
            where = self._files.path(key)
            raise CheckpointError(f"{where}: {name} is damaged ({error}): download it again") from error
