"""Keeping a router in training from sending everything to one expert: the paper's three mechanisms.

Source: Zhang et al., MoQE (arXiv 2508.09204), section on router training. Gating logits of a batch are

    gated = (logits + a * s * noise + bias) / temperature,     bias_i = -strength * max(0, usage_i - 1/N)

with `noise` standard normal, `s` a learnable scale, `a` annealed linearly from 1 to 0 over training, and `usage` the
moving average of the share of samples each expert got. To the objective is added alpha * (1 + spread(usage)) * L, with
L = N * sum_i P_i F_i of the Switch Transformer (Fedus et al. 2021, eq. 4): F_i the share of samples sent to expert i,
P_i its mean probability; alpha decays linearly to zero with `a`.

Faithful: the mechanisms and their numbers (decay 0.8, strength 0.8, scale 1.0, temperature 1.0; weight grows with the
relative standard deviation of usage and decays to zero). Differs: the paper does not write the bias's formula; here it
is proportional to use above an equal share. Evaluation is deterministic: no noise, and the bias as it stood at the end
of the chosen epoch is kept and *applied*, because the logits were trained together with it.
Cost: a few operations on (batch, experts). The experts here are frozen, so unlike in a mixture trained jointly balance
has nothing to win but exploration: `tuned` trains without it unless the recipe asks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moqe.recipe import Balance


def shares(gated: Tensor) -> Tensor:
    """Share of samples that each expert gets when the highest logit wins: (b, experts) -> (experts,)."""
    experts = gated.shape[1]
    return torch.bincount(gated.argmax(1), minlength=experts).to(gated.dtype) / gated.shape[0]


def load_balancing_loss(gated: Tensor) -> Tensor:
    """N * sum_i P_i F_i of gating logits, (b, experts): 1 at perfect balance, N when all goes surely to one expert.

    Gradients flow through the probabilities P only; the shares F are counts.
    """
    probability = gated.softmax(1).mean(0)  # (experts,)
    return gated.shape[1] * (probability * shares(gated.detach())).sum()


def overuse_bias(usage: Tensor, strength: float) -> Tensor:
    """What is added to the logits of experts used above an equal share: -strength * max(0, usage - 1/N), (experts,)."""
    return -strength * (usage - 1.0 / usage.shape[0]).clamp(min=0.0)


def usage_spread(usage: Tensor) -> Tensor:
    """Relative standard deviation of usage (population): 0 when all are equal, sqrt(N - 1) when one has everything."""
    return usage.std(correction=0) / usage.mean()


class Gate(nn.Module):
    """The state of the balance mechanisms during one training: usage, (experts,), and the noise's learnable scale."""

    usage: Tensor

    def __init__(self, experts: int, options: Balance) -> None:
        super().__init__()
        self.options = options
        self.register_buffer("usage", torch.full((experts,), 1.0 / experts))
        # A scale of zero switches the noise off; as a parameter it would wander away from zero.
        self.noise_scale = nn.Parameter(torch.tensor(options.noise_scale), requires_grad=options.noise_scale > 0)

    @property
    def bias(self) -> Tensor:
        """The bias for the present usage, (experts,)."""
        return overuse_bias(self.usage, self.options.bias_strength)

    def forward(self, logits: Tensor, annealing: float) -> Tensor:
        """Gating logits of a batch in training, (b, experts); `annealing` goes from 1 to 0."""
        noise = torch.randn_like(logits) * self.noise_scale * annealing
        return (logits + noise + self.bias) / self.options.temperature

    def penalty(self, gated: Tensor, annealing: float) -> Tensor:
        """The weighted load-balancing loss of gating logits, (b, experts), to be added to the objective."""
        weight = self.options.load_balancing_weight * annealing * (1.0 + usage_spread(self.usage))
        return weight * load_balancing_loss(gated)

    @torch.no_grad()
    def observe(self, gated: Tensor) -> None:
        """Move the usage average towards the shares of a batch of gating logits, (b, experts)."""
        decay = self.options.usage_decay
        self.usage.mul_(decay).add_(shares(gated), alpha=1.0 - decay)
