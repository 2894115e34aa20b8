"""Modules built without values: their parameters lie on the meta device until those of a file take their place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_FILLS = {"normal_", "trunc_normal_", "uniform_", "constant_", "fill_", "ones_", "zero_", "zeros_"} | {
    f"{kind}_{what}_" for kind in ("kaiming", "xavier") for what in ("normal", "uniform")
}


class Valueless(TorchFunctionMode):
    """Modules that are built inside have uninitialised tensors, which parameters are made from, on the meta device.

    Filling one of them draws no random numbers and takes no time. What is computed instead, such as rotary frequencies,
    which no file holds, is real; `torch.device("meta")` would swallow it.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if func is torch.empty:
            options["device"] = "meta"
        elif getattr(func, "__name__", None) in _FILLS:
            filled = args[0] if args else options.get("tensor")
            if isinstance(filled, Tensor) and filled.is_meta:
                return filled
        return func(*args, **options)
