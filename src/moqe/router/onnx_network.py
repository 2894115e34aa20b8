"""A router's network in ONNX Runtime, for mixtures of images: in torch its sixty small operations would cost more time
than the numbers they compute.

The file is written beside the saved router from the same parameters and gives its logits up to float32 rounding.
Verdicts are made with the saved router in torch; the file only answers single images.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from moqe.formats.onnx_writer import write_onnx_expert
from moqe.router.text_network import RoutingNetwork
from moqe.runtimes.onnx import OnnxRuntime

NETWORK = "network.onnx"


def write_network(path: Path, network: torch.nn.Module, dimension: int) -> None:
    """Write a network of vectors, (b, dimension) -> logits (b, experts). Raises what `write_onnx_expert` raises."""
    write_onnx_expert(path, network, (), (dimension,))


class OnnxNetwork(RoutingNetwork):
    """The network in a file, in the place of the one it was written from."""

    kind = "onnx"

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.options = {}
        self.runtime = OnnxRuntime(path, threads=1)  # a pool of threads of its own would cost more

    def forward(self, features: Tensor) -> Tensor:
        """Vectors, (b, dimension) -> logits, (b, experts), on the CPU."""
        return self.runtime.logits(features)
