"""Running an image expert: the reference network in torch, or ONNX Runtime on the same file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from moqe.errors import NumericalError
from moqe.formats.onnx_reader import read_onnx_layers
from moqe.methods.vision.network import quantize_network
from moqe.runtimes.onnx import OnnxRuntime


class ImageRuntime(Protocol):
    """One image expert, or a full-precision model, ready to run."""

    name: str  # stands beside every number the runtime makes

    def logits(self, x: Tensor) -> Tensor:
        """Logits of preprocessed images: float32, (n, classes) on the CPU, for float32, (n, 3, h, w).

        Raises NumericalError when a logit is not finite.
        """


class ReferenceImageRuntime:
    """The exact arithmetic of an expert's file in float32, on the folded network of its full-precision model.

    Codes, scales and the rounding of activations are the file's; sums are float32, not integers. Without a file it runs
    the network as it is. Satisfies `ImageRuntime`. Raises CheckpointError when the file is damaged, ModelError when it
    does not belong to the network.
    """

    name = "reference"

    def __init__(self, network: nn.Module, path: Path | None) -> None:
        self.network = network if path is None else quantize_network(network, read_onnx_layers(path))
        self._where = "the base model" if path is None else str(path)

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """See `ImageRuntime`; x is on the network's device."""
        found: Tensor = self.network(x).float().cpu()
        if not torch.isfinite(found).all():
            raise NumericalError(f"{self._where}: a logit is not finite; build it again or remove it")
        return found


def _onnx(network: nn.Module, path: Path | None) -> ImageRuntime:
    if path is None:
        raise ValueError("ONNX Runtime runs files: write the network first")
    return OnnxRuntime(path, torch.get_num_threads())


IMAGE_RUNTIMES: dict[str, Callable[[nn.Module, Path | None], ImageRuntime]] = {
    "reference": ReferenceImageRuntime,
    "onnx": _onnx,
}
