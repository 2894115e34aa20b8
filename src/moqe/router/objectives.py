"""What a routing network is trained to minimise: three losses of its logits, given the experts' losses.

`cross_entropy` is the paper's: the best expert is a class label. It ignores by how much an expert is better, and where
experts differ by less than noise the label is a coin toss. Experts that tie share the label: 0/1 losses tie on most
samples, the paper says nothing of ties, and the first of the tied would teach the order of the experts.
`expected_loss` weighs the experts' losses by the softmax of the logits: what a randomised router would pay.
`centred_regression` predicts each expert's loss relative to the mean over the experts, so that predictions mean nats
and a guard can ask for a margin.

All take logits, (b, experts), higher for better experts, and losses, (b, experts) in any one unit; all return a scalar.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

Objective = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, losses: Tensor) -> Tensor:
    """Mean negative log probability of the expert with the lowest loss, averaged over those where losses are equal."""
    best = (losses == losses.min(1, keepdim=True).values).to(logits.dtype)
    return functional.cross_entropy(logits, best / best.sum(1, keepdim=True))


def expected_loss(logits: Tensor, losses: Tensor) -> Tensor:
    """Mean over samples of sum_j softmax(logits)_j * (loss_j - mean loss): the gain of a randomised choice."""
    centred = losses - losses.mean(1, keepdim=True)
    return (logits.softmax(1) * centred).sum(1).mean()


def centred_regression(logits: Tensor, losses: Tensor) -> Tensor:
    """Mean squared error of -logits as a prediction of each loss minus its sample's mean over the experts."""
    return functional.mse_loss(-logits, losses - losses.mean(1, keepdim=True))


OBJECTIVES: dict[str, Objective] = {
    "cross_entropy": cross_entropy,
    "expected_loss": expected_loss,
    "centred_regression": centred_regression,
}
