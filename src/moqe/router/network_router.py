"""A trained network as a router: evaluation mode, no noise, the balance bias frozen and applied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from moqe.errors import CheckpointError, did_you_mean
from moqe.models.valueless import Valueless
from moqe.router.features import Features
from moqe.router.image_network import ImageNetwork
from moqe.router.mlp_network import MlpNetwork
from moqe.router.router import Unit
from moqe.router.text_network import RoutingNetwork, TextNetwork

NETWORKS: dict[str, type[RoutingNetwork]] = {
    "text": TextNetwork,
    "image": ImageNetwork,
    "mlp": MlpNetwork,
}
PREDICTION_BATCH = 16  # samples; bounds memory: a batch of 512 tokens holds a few dozen MB of activations


@dataclass(frozen=True)
class NetworkRouter:
    """Costs = -scale * (logits + bias).

    bias: (experts,), what balance added to the logits at the end of training; without balance one zero. scale: turns
    logits into `unit`: nats per token for a regression, 1 / temperature otherwise.
    """

    network: RoutingNetwork
    bias: Tensor
    scale: float
    name: str
    unit: Unit
    kind: ClassVar[str] = "network"

    @torch.no_grad()
    def predict(self, features: Features) -> Tensor:
        """See `Router`."""
        training = self.network.training
        if training:  # else there is nothing to switch, and walking through the modules takes time
            self.network.eval()
        device = features.batch(torch.zeros(1, dtype=torch.int64)).device
        first = next(self.network.parameters(), None)  # a network in an ONNX file has none
        if first is not None and first.device != device:  # a loaded router comes on the CPU
            self.network.to(device)
        batches = torch.split(torch.arange(len(features)), PREDICTION_BATCH)
        logits = torch.cat([self.network(features.batch(rows)) for rows in batches])
        if training:
            self.network.train()
        return -self.scale * (logits + self.bias.to(device))

    def options(self) -> dict[str, Any]:
        """What is saved beside the tensors."""
        network = {"kind": self.network.kind, "options": self.network.options}
        return {"network": network, "scale": self.scale, "name": self.name, "unit": self.unit}

    def tensors(self) -> dict[str, Tensor]:
        """What is saved: the bias, and the network's parameters under `network.`."""
        return {"bias": self.bias} | {f"network.{key}": value for key, value in self.network.state_dict().items()}

    @classmethod
    def restore(cls, options: dict[str, Any], tensors: dict[str, Tensor]) -> NetworkRouter:
        """The router that was saved. Raises CheckpointError when its network is of a kind this version lacks."""
        saved = options["network"]
        if saved["kind"] not in NETWORKS:
            raise CheckpointError(f"unknown router network {saved['kind']!r}; {did_you_mean(saved['kind'], NETWORKS)}")
        with Valueless():
            network = NETWORKS[saved["kind"]](**saved["options"])
        prefix = "network."
        state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        network.load_state_dict(state, assign=True)
        network.eval()
        return cls(network, tensors["bias"], options["scale"], options["name"], options["unit"])
