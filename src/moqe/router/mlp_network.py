"""A small network on one vector per sample, for `tuned`: not the paper's.

The vector is brought to zero mean and unit variance by batch normalisation, then d -> width -> experts with ReLU and
dropout. A few thousand parameters are what a few hundred to a few thousand images can train.
Cost: width (d + experts) multiplications an image.
"""

from __future__ import annotations

from torch import Tensor, nn

from moqe.router.image_network import BatchNorm
from moqe.router.text_network import RoutingNetwork


class MlpNetwork(RoutingNetwork):
    """Logits per expert from one vector per sample; `dimension` is the vector's width."""

    kind = "mlp"

    def __init__(self, dimension: int, experts: int, width: int = 64, dropout: float = 0.2) -> None:
        super().__init__()
        self.options = {"dimension": dimension, "experts": experts, "width": width, "dropout": dropout}
        self.body = nn.Sequential(
            BatchNorm(dimension, affine=False),
            nn.Linear(dimension, width),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(width, experts),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Vectors, (b, dimension) -> logits, (b, experts)."""
        logits: Tensor = self.body(features)
        return logits
