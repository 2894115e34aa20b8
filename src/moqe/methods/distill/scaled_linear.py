"""A linear layer whose integer codes are fixed and whose scales can be trained.

The weight is made in the forward pass and kept until the backward pass. Where a student's blocks are run again for
theirs, only codes stay in memory between the two. With G = dL/dW the gradients are, group by group,

    dL/d scale = sum over the group of G * step,   dL/d offset = sum over the group of G * lift

Scales are trained as s = s_0 * exp(u), so that one learning rate fits small and large ones and none changes its sign;
offsets as o = o_0 + |s_0| * v, in units of the scale.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moqe.methods.distill.scales import ScaleForm, weight_of
from moqe.models.activations import quantize_activations


class ScaledLinear(nn.Module):
    """y = W x + bias with W of a `ScaleForm`.

    log_scale: u, float32 (out, groups). shift: v, the same shape, or None where the form has no offset.
    activation_bits: below 16 inputs are rounded per token; gradients pass straight through the rounding.
    """

    def __init__(self, form: ScaleForm, bias: Tensor | None, activation_bits: int = 16) -> None:
        super().__init__()
        self.step: Tensor
        self.scale: Tensor
        self.register_buffer("step", form.step, persistent=False)
        self.register_buffer("scale", form.scale, persistent=False)
        self.register_buffer("lift", form.lift, persistent=False)
        self.register_buffer("offset", form.offset, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.log_scale = nn.Parameter(torch.zeros_like(form.scale))
        self.shift = None if form.offset is None else nn.Parameter(torch.zeros_like(form.offset))
        self.activation_bits = activation_bits

    def current(self) -> tuple[Tensor, Tensor | None]:
        """Scale and offset as trained so far, float32 (out, groups)."""
        scale = self.scale * self.log_scale.exp()
        offset = self.offset
        if isinstance(offset, Tensor) and self.shift is not None:
            return scale, offset + self.scale.abs() * self.shift
        return scale, None

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., in) -> (..., out). Under autocast the weight and the product are in its type."""
        if self.activation_bits < 16:
            inputs = inputs + (quantize_activations(inputs.detach(), self.activation_bits) - inputs).detach()
        kind = inputs.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else inputs.dtype
        scale, offset = self.current()
        lift = self.lift if isinstance(self.lift, Tensor) else None
        parts = (inputs.to(dtype), scale, offset, self.step, lift)
        output: Tensor = _Product.apply(*parts)  # type: ignore[no-untyped-call]
        return output + self.bias.to(output.dtype) if isinstance(self.bias, Tensor) else output


class _Product(torch.autograd.Function):
    """inputs @ W^T. W is kept for the backward pass: in a block that is run again, until that block's is done."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, scale: Tensor, offset: Tensor | None, step: Tensor, lift: Any) -> Tensor:
        weight = weight_of(step, scale, lift, offset, inputs.dtype)
        ctx.save_for_backward(inputs, weight, step, lift)
        ctx.has_offset = offset is not None
        return nn.functional.linear(inputs, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, step, lift = ctx.saved_tensors
        (outward,) = gradients
        to_inputs = outward @ weight if ctx.needs_input_grad[0] else None
        to_scale = to_offset = None
        if ctx.needs_input_grad[1]:
            flat = outward.flatten(0, -2)
            to_weight = (flat.T @ inputs.flatten(0, -2)).view(step.shape)  # (out, groups, width)
            to_scale = (to_weight * step.to(to_weight.dtype)).sum(-1, dtype=torch.float32)
            if ctx.has_offset and ctx.needs_input_grad[2]:
                to_offset = (to_weight * lift.to(to_weight.dtype)).sum(-1, dtype=torch.float32)
        return to_inputs, to_scale, to_offset, None, None
