"""AWQ checkpoints as AutoAWQ writes them for its GEMM kernel, read as experts.

Format: 4-bit codes and zero points, for a linear of shape (out, in),
    qweight   int32 (in, out / 8)      eight outputs to a word, in the order 0 2 4 6 1 3 5 7 from the lowest bits up
    qzeros    int32 (groups, out / 8)  packed alike
    scales    float16 (groups, out)    w = (code - zero) * scale
The scaling that gives AWQ its name is already folded into weights and norms. The GEMV layouts, made for one kernel, are
refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moqe.errors import CheckpointError
from moqe.formats.grouped_codes import grouped
from moqe.formats.qweight_folder import QweightFolder
from moqe.formats.safetensors_folder import SafetensorsFolder
from moqe.quantized import Quantized

_NIBBLE_OF_OUTPUT = (0, 4, 1, 5, 2, 6, 3, 7)  # where output k of eight lies: the inverse of the order above


def open_awq(folder: Path, config: Mapping[str, Any]) -> QweightFolder:
    """Open an AWQ folder with its `quantization_config`. Raises CheckpointError on a layout MoQE does not read."""
    version = str(config.get("version") or "gemm").lower()
    bits = config.get("bits", config.get("w_bit", 4))
    if version != "gemm" or bits != 4:
        raise CheckpointError(f"{folder}: AWQ {version} with {bits} bits is not read: save it as gemm with 4 bits")
    return QweightFolder(folder, "awq", _decode)


def _decode(files: SafetensorsFolder, linear: str) -> Quantized | Tensor:
    codes = _unpack(files.tensor(f"{linear}.qweight")).T.contiguous()  # (out, in)
    scale = files.tensor(f"{linear}.scales").T.contiguous()
    zero = _unpack(files.tensor(f"{linear}.qzeros")).T.contiguous()  # (out, groups)
    return grouped(codes, scale, zero, 4)


def _unpack(words: Tensor) -> Tensor:
    """Words of eight nibbles, int32 (rows, words), to uint8 (rows, 8 * words)."""
    shifts = torch.tensor(_NIBBLE_OF_OUTPUT, device=words.device) * 4
    nibbles = (words.to(torch.int64)[..., None] >> shifts) & 15
    return nibbles.to(torch.uint8).view(words.shape[0], -1)
