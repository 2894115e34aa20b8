"""Devices by name, checked before work begins."""

from __future__ import annotations

import torch

from moqe.errors import ModelError


def check_device(name: str) -> torch.device:
    """The device of that name. Raises ModelError when torch does not know it or the machine does not have it."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"device {name!r} cannot be used here ({reason}): `moqe doctor` lists what there is") from None
    return device
