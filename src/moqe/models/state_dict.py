"""A network's parameters from a .safetensors file, every one of them or an error."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from moqe.errors import ModelError, NumericalError

_PARALLEL = "module."  # what torch's DataParallel puts in front of every name
_COUNTER = ".num_batches_tracked"  # of a batch normalisation: only training reads it


def load_state(network: nn.Module, path: Path) -> None:
    """Fill a network with the parameters and buffers of a file, as float32 where they are numbers.

    A prefix `module.` that all names have is taken off; counters of batches may be missing. Raises ModelError naming
    what is missing, unexpected, of another shape or already quantized, NumericalError where values are not finite.
    """
    stored = _read(path)
    if all(name.startswith(_PARALLEL) for name in stored):
        stored = {name.removeprefix(_PARALLEL): tensor for name, tensor in stored.items()}
    wanted = network.state_dict()
    missing = sorted(name for name in wanted.keys() - stored.keys() if not name.endswith(_COUNTER))
    unexpected = sorted(stored.keys() - wanted.keys())
    kind = type(network).__name__
    if missing or unexpected:
        found = [f"{_some(names)} {what}" for names, what in ((missing, "missing"), (unexpected, "unknown")) if names]
        raise ModelError(f"{path} does not fit {kind}: {'; '.join(found)}: choose the weights of this architecture")
    for name, tensor in stored.items():
        if tensor.shape != wanted[name].shape:
            raise ModelError(
                f"{path} does not fit {kind}: {name} has shape {tuple(tensor.shape)}, not {tuple(wanted[name].shape)}"
            )
        if wanted[name].is_floating_point() and not _is_full_precision(tensor):
            raise ModelError(
                f"{path} is already quantized ({name} is {tensor.dtype}): give the full-precision weights as base"
            )
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise NumericalError(f"{name} in {path} has values that are not finite: repair or replace the weights")
    network.load_state_dict(stored, strict=False)


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ModelError(f"weights {path} does not exist")
    if path.suffix != ".safetensors":
        raise ModelError(
            f"weights {path} is no .safetensors file, and MoQE unpickles nothing: convert the state dict with "
            "safetensors.torch.save_file"
        )
    try:
        stored: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be read ({error}): it is damaged, download it again") from error
    if not stored:
        raise ModelError(f"{path} holds no parameters")
    return stored


def _is_full_precision(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.element_size() > 1  # eight-bit floats are quantized too


def _some(names: list[str]) -> str:
    return (
        ", ".join(names[:3])
        + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        + (" are" if len(names) > 1 else " is")
    )
