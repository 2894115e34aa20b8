"""Learned rounding: whether each weight goes up or down is trained, for brecq.

Paper: Nagel, Amjad, van Baalen, Louizos, Blankevoort, "Up or Down? Adaptive Rounding for Post-Training Quantization",
ICML 2020 (arXiv 2004.10568), equations 22 to 24.

w_hat = s * clamp(floor(w / s) + h(v), lowest, highest), where h(v) = clamp(1.2 sigmoid(v) - 0.1, 0, 1) reaches 0 and 1
for finite v, so a weight can settle. The regularizer sum(1 - |2 h(v) - 1|^beta) costs nothing at 0 and 1; a beta that
falls from 20 to 2 leaves rounding free at first and pushes it to an end later.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

STRETCH = 1.2  # zeta - gamma: of the sigmoid, so that both ends are reached
SHIFT = -0.1  # gamma


def rectified_sigmoid(v: Tensor) -> Tensor:
    """h(v) in [0, 1]."""
    return torch.sigmoid(v).mul(STRETCH).add(SHIFT).clamp(0.0, 1.0)


def inverse_rectified_sigmoid(h: Tensor) -> Tensor:
    """The v whose h(v) is `h`, for h in [0, 1]."""
    return torch.logit((h - SHIFT) / STRETCH)


class LearnedRounding(nn.Module):
    """A weight whose rounding is trained; a parametrization that ignores the weight it is attached to.

    weight: float32, (out, ...). scale: (out,). It starts at the weight itself: h(v) is the share that rounding down
    would lose. `hard` rounds for good, up where h(v) is at least one half.
    """

    step: Tensor
    floor: Tensor

    def __init__(self, weight: Tensor, scale: Tensor, lowest: int, highest: int) -> None:
        super().__init__()
        self.lowest, self.highest, self.hard = lowest, highest, False
        step = scale.view(-1, *[1] * (weight.ndim - 1))
        self.register_buffer("step", step)
        self.register_buffer("floor", (weight / step).floor())
        self.v = nn.Parameter(inverse_rectified_sigmoid(weight / step - self.floor))

    def forward(self, weight: Tensor) -> Tensor:
        """The rounded weight, partly rounded while it is trained."""
        return (self.codes() if self.hard else self._soft_codes()) * self.step

    @torch.no_grad()
    def codes(self) -> Tensor:
        """The codes it has settled on, as float32, (out, ...)."""
        return (self.floor + (self.v >= 0)).clamp_(self.lowest, self.highest)

    def _soft_codes(self) -> Tensor:
        return (self.floor + rectified_sigmoid(self.v)).clamp(self.lowest, self.highest)

    def regularizer(self, beta: float) -> Tensor:
        """Sum over weights of 1 - |2 h(v) - 1|^beta: 0 when every rounding has settled."""
        return (1.0 - (2.0 * rectified_sigmoid(self.v) - 1.0).abs().pow(beta)).sum()

    def settled(self) -> float:
        """Share of weights whose rounding is 0 or 1 already."""
        with torch.no_grad():
            h = rectified_sigmoid(self.v)
            return float(((h == 0) | (h == 1)).float().mean())
