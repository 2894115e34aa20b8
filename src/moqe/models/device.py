"""Devices by name, checked before work begins."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

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


@contextmanager
def rounded_products(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Products of float32 matrices from rounded inputs, added up and returned in float32; all else as it is.

    With bfloat16 a CPU's inputs are rounded to bfloat16, where it has instructions for that, and a GPU's to TF32, which
    keeps three bits more. float32 leaves products as they are. Unlike `mixed_precision` nothing is stored in the
    smaller type. The setting is the process's: no other thread should multiply meanwhile.
    """
    if dtype == torch.float32:
        yield
        return
    backends: Any = torch.backends
    place, wanted = (backends.cuda.matmul, "tf32") if device.type == "cuda" else (backends.mkldnn.matmul, "bf16")
    before = place.fp32_precision
    place.fp32_precision = wanted
    try:
        yield
    finally:
        place.fp32_precision = before
