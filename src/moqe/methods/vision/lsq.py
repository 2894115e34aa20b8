"""Learned step sizes: rounding whose step is trained, the core of qat and of brecq's activations.

Paper: Esser, McKinstry, Bablani, Appuswamy, Modha, "Learned Step Size Quantization", ICLR 2020 (arXiv 1902.08153),
section 2. With v / s clipped to [lowest, highest] and rounded, times s:

    d v_hat / d v = 1 inside the range, 0 outside
    d v_hat / d s = round(v / s) - v / s inside, lowest or highest outside, times g = 1 / sqrt(n * highest)

g balances the step's updates against the weights': n is the number of values that share the step.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

SMALLEST_STEP = 1e-8  # a step stays positive


class LearnedStep(nn.Module):
    """Rounds to multiples of a trained step, float32 in and out.

    step: positive, a scalar for inputs; for weights (out,), or (out, blocks, kh, kw) or (out, blocks) with `block`
    input channels to a step. lowest, highest: the codes. count: values that share one step, for the gradient's scale:
    weights of a channel or block, features of an image.
    """

    def __init__(self, step: Tensor, lowest: int, highest: int, count: int, block: int = 0) -> None:
        super().__init__()
        self.step = nn.Parameter(step.detach().clone())
        self.lowest, self.highest, self.block = lowest, highest, block
        self.gradient_scale = 1.0 / math.sqrt(count * highest)

    def forward(self, value: Tensor) -> Tensor:
        """The nearest multiple of the step within the range."""
        rounded: Tensor = _Round.apply(  # type: ignore[no-untyped-call]
            value, self._spread(value), self.lowest, self.highest, self.gradient_scale
        )
        return rounded

    @torch.no_grad()
    def codes(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """A weight's codes as float32, and their scale as `WeightCodes` has it."""
        codes = (weight / self._spread(weight)).round_().clamp_(self.lowest, self.highest)
        return codes, self.step.detach().clone()

    @torch.no_grad()
    def keep_positive(self) -> None:
        """Call after every update."""
        self.step.clamp_(min=SMALLEST_STEP)

    def _spread(self, value: Tensor) -> Tensor:
        """The step of every value: something that broadcasts over them."""
        if self.block:
            return self.step.repeat_interleave(self.block, dim=1)[:, : value.shape[1]]
        return self.step.view(-1, *[1] * (value.ndim - 1)) if self.step.ndim else self.step


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, step: Tensor, lowest: int, highest: int, gradient_scale: float) -> Tensor:
        scaled = value / step
        codes = scaled.round().clamp_(lowest, highest)
        ctx.save_for_backward(scaled, codes, step)
        ctx.lowest, ctx.highest, ctx.gradient_scale = lowest, highest, gradient_scale
        return codes * step

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        scaled, codes, step = ctx.saved_tensors
        # the gradient where lowest < scaled < highest, 0 elsewhere
        inside = torch.ops.aten.hardtanh_backward(gradient, scaled, ctx.lowest, ctx.highest)
        to_step = None
        if ctx.needs_input_grad[1]:
            if step.ndim == 0:
                to_step = torch.dot(_flat(gradient), _flat(codes)) - torch.dot(_flat(inside), _flat(scaled))
            else:
                to_step = (gradient * codes).addcmul_(inside, scaled, value=-1.0).sum_to_size(step.shape)
            to_step = to_step * ctx.gradient_scale
        return inside if ctx.needs_input_grad[0] else None, to_step, None, None, None


def _flat(tensor: Tensor) -> Tensor:
    """All elements in one row, channels last: no copy where training keeps images in that layout."""
    return tensor.movedim(1, -1).reshape(-1) if tensor.ndim > 2 else tensor.reshape(-1)
