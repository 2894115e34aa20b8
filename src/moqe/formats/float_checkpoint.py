"""A full-precision safetensors folder as an expert: another fine-tune, or the base itself in another type."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from moqe.errors import CheckpointError
from moqe.formats.safetensors_folder import SafetensorsFolder


class FloatFiles:
    """Reads a folder without quantization. Satisfies `ExpertFiles`."""

    format = "full-precision"

    def __init__(self, folder: Path) -> None:
        self._files = SafetensorsFolder(folder)

    def names(self) -> list[str]:
        """Names of all parameters."""
        return self._files.names()

    def activation_bits(self, name: str) -> int:
        """16: nothing is quantized."""
        return 16

    def load(self, name: str) -> Tensor:
        """One parameter. Raises CheckpointError when it is damaged or not floating point."""
        if not self._files.is_float(name):
            raise CheckpointError(
                f"{self._files.path(name)}: {name} holds integers, but config.json has no quantization_config: "
                "restore the config.json that belongs to these files"
            )
        return self._files.tensor(name)
