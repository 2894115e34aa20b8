"""How much the task loss minds an error at the output of a block: the diagonal of the Fisher information, for brecq.

Source: Li et al., BRECQ, ICLR 2021 (arXiv 2102.05426), section 3.3: the Hessian of the task loss with respect to a
block's output is replaced by the squared gradient.

The Fisher information is an expectation over labels that the model itself would give, so no data set labels are needed:
one label is drawn per image from the full-precision network's prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from moqe.methods.vision.method import CalibrationImages
from moqe.methods.vision.observe import BATCH


def fisher_weights(network: nn.Module, names: Sequence[str], images: CalibrationImages, seed: int) -> dict[str, Tensor]:
    """The mean squared gradient at each module's output, by name: float32, (c, h, w) or (c,), with mean 1.

    network: full precision; its parameters need no gradients. All ones where the gradient vanishes.
    """
    modules = dict(network.named_modules())
    outputs, sums = dict[str, Tensor](), dict[str, Tensor]()
    handles = [modules[name].register_forward_hook(_keep(outputs, name)) for name in names]
    generator = torch.Generator().manual_seed(seed)
    try:
        for rows in torch.split(torch.arange(len(images)), BATCH):
            logits = network(images.batch(rows).requires_grad_(True))
            chances = logits.detach().softmax(-1).cpu()
            labels = torch.multinomial(chances, 1, generator=generator)[:, 0].to(logits.device)
            loss = cross_entropy(logits, labels, reduction="sum")
            gradients = torch.autograd.grad(loss, [outputs[name] for name in names])
            for name, gradient in zip(names, gradients, strict=True):
                # In float64: squares of small gradients would vanish, and what is left could not be divided by.
                sums[name] = sums.get(name, torch.zeros(())) + gradient.double().square().sum(0)
            outputs.clear()
    finally:
        for handle in handles:
            handle.remove()
    return {name: _with_mean_one(total) for name, total in sums.items()}


def _with_mean_one(weights: Tensor) -> Tensor:
    mean = weights.mean()
    return (weights / mean if float(mean) > 0 else torch.ones_like(weights)).float()


def _keep(where: dict[str, Tensor], name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
    def hook(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        where[name] = output

    return hook
