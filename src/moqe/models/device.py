"""Devices by name, checked before work begins."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from moqe.errors import ModelError
from moqe.models.processor import cpu_flags


def check_device(name: str) -> torch.device:
    """The device of that name. Raises ModelError when torch does not know it or the machine does not have it."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"device {name!r} cannot be used here ({reason}): `moqe doctor` lists what there is") from None
    return device


def product_dtype(device: str, precision: str) -> torch.dtype:
    """The type to train in: what `precision` names, and for `auto` bfloat16 where products in it are native.

    That is a CPU with AMX or AVX512-BF16, or a GPU that has it; elsewhere bfloat16 is emulated and float32 is faster.
    """
    if precision != "auto":
        return torch.bfloat16 if precision == "bfloat16" else torch.float32
    kind = torch.device(device).type
    if kind == "cpu":
        native = not cpu_flags().isdisjoint({"amx_bf16", "avx512_bf16"})
    else:
        native = kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float32


def mixed_precision(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[object]:
    """Products in `dtype`, everything else in float32; nothing where `dtype` is float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)
