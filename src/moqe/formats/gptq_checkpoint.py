"""GPTQ checkpoints as AutoGPTQ, GPTQModel and optimum write them, read as experts.

Format: for a linear of shape (out, in) with b bits and groups of input channels,
    qweight   int32 (in * b / 32, out)      codes as a dense bit stream along the inputs, unsigned
    qzeros    int32 (groups, out * b / 32)  zero points as a dense bit stream along the outputs
    scales    (groups, out)                 w = (code - zero) * scale
    g_idx     int32 (in,)                   each input channel's group; absent where groups are equal runs
`checkpoint_format: gptq` (or none) stores zero - 1, modulo 2**b, a relic of the first CUDA kernels; `gptq_v2` stores
zero. Read exactly: 2, 3, 4 and 8 bits, which may differ between layers, and activation order (such layers come back as
float weights where their groups are scattered). Marlin and BitBLAS layouts, made for one kernel, are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moqe.errors import CheckpointError
from moqe.formats.bit_packing import unpack
from moqe.formats.grouped_codes import grouped
from moqe.formats.qweight_folder import QweightFolder
from moqe.formats.safetensors_folder import SafetensorsFolder
from moqe.quantized import Quantized

_BITS = (2, 3, 4, 8)
_ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}


def open_gptq(folder: Path, config: Mapping[str, Any]) -> QweightFolder:
    """Open a GPTQ folder with its `quantization_config`. Raises CheckpointError on a layout MoQE does not read."""
    layout = str(config.get("checkpoint_format") or config.get("format") or "gptq")
    if layout not in _ZERO_OFFSETS:
        raise CheckpointError(f"{folder}: GPTQ layout {layout!r} is made for one kernel: save it as gptq or gptq_v2")
    if config.get("pack_dtype", "int32") not in ("int32", "torch.int32"):
        raise CheckpointError(f"{folder}: only int32 words are read, not {config['pack_dtype']}: pack it again")
    bits = config.get("bits")
    if bits not in _BITS:
        raise CheckpointError(f"{folder}/config.json: {bits!r} is not a number of bits that GPTQ has")
    return QweightFolder(folder, "gptq", partial(_decode, bits=int(bits), zero_offset=_ZERO_OFFSETS[layout]))


def _decode(files: SafetensorsFolder, linear: str, *, bits: int, zero_offset: int) -> Quantized | Tensor:
    qweight, scale = files.tensor(f"{linear}.qweight"), files.tensor(f"{linear}.scales").T.contiguous()
    order = files.tensor(f"{linear}.g_idx") if f"{linear}.g_idx" in files else None
    if order is not None:
        bits, remainder = divmod(qweight.shape[0] * 32, len(order))  # a mixed checkpoint has other bits here and there
        if remainder or bits not in _BITS:
            raise ValueError(f"{qweight.shape[0]} words hold no whole number of bits for {len(order)} inputs")
    columns = qweight.shape[0] * 32 // bits
    rows = qweight.shape[1]
    codes = unpack(qweight.T, bits, columns)
    zero = unpack(files.tensor(f"{linear}.qzeros"), bits, rows).T.contiguous()  # (out, groups)
    zero = ((zero.to(torch.int16) + zero_offset) & ((1 << bits) - 1)).to(torch.uint8)
    symmetric = bool((zero == 1 << (bits - 1)).all())
    return grouped(codes, scale, None if symmetric else zero, bits, group_of=order)
