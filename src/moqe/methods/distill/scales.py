"""A quantized tensor as a linear function of the scales its format stores.

    weight = scale * step + offset * lift

with one scale (and offset) per group of neighbouring inputs. `step` and `lift` are what integer codes and integer
sub-scales amount to and never change. For integer schemes step = code - zero point, and zero points, being integers,
stay; ggml's blocks have float offsets (`m`, `dmin`) which can be trained like scales.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moqe.quantized import BlockTensor, IntegerTensor, Quantized

OFFSETS = ("m", "dmin")  # ggml's names of a block's float offset


@dataclass(frozen=True)
class ScaleForm:
    """weight = scale * step + offset * lift, group by group.

    step: int8 or int16, (out, groups, width). scale: float32, (out, groups). lift: float32 like `step`, or one value
    per group, (out, groups, 1); with offset, float32, (out, groups); both None where a format has no float offset.
    """

    step: Tensor
    scale: Tensor
    lift: Tensor | None = None
    offset: Tensor | None = None

    def weight(self) -> Tensor:
        """float32, (out, in)."""
        return weight_of(self.step, self.scale, self.lift, self.offset, torch.float32)


def weight_of(step: Tensor, scale: Tensor, lift: Tensor | None, offset: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(out, in) of the parts of a `ScaleForm`, multiplied in `dtype`; steps are exact in any float type up to 2^8."""
    weight = step.to(dtype) * scale.to(dtype)[..., None]  # (out, groups, width)
    if lift is not None and offset is not None:
        weight = weight + lift.to(dtype) * offset.to(dtype)[..., None]
    return weight.flatten(1)


def scale_form(tensor: Quantized) -> ScaleForm:
    """Take a quantized tensor apart."""
    if isinstance(tensor, IntegerTensor):
        rows, groups = tensor.scale.shape
        step = tensor.codes.to(torch.int16).view(rows, groups, -1)
        if tensor.zero_point is not None:
            step = step - tensor.zero_point.to(torch.int16)[..., None]
        narrow = int(step.amin()) >= -128 and int(step.amax()) <= 127
        return ScaleForm(step.to(torch.int8) if narrow else step, tensor.scale.float())
    scale, name = tensor.fields["d"].float(), _offset_of(tensor)
    rows, groups = scale.shape
    ones, zeros = torch.ones_like(tensor.fields["d"]), torch.zeros_like(tensor.fields["d"])
    unit = {"d": ones} | ({name: zeros} if name else {})
    step = replace(tensor, fields=tensor.fields | unit).dequantize().view(rows, groups, -1).to(torch.int16)
    if not name:
        return ScaleForm(step, scale)
    raised = replace(tensor, fields=tensor.fields | {"d": zeros, name: ones}).dequantize()
    return ScaleForm(step, scale, raised.view(rows, groups, -1), tensor.fields[name].float())


def with_scales(tensor: Quantized, scale: Tensor, offset: Tensor | None = None) -> Quantized:
    """The same codes with other scales (and offsets), (out, groups), rounded to the types the tensor stores."""
    if isinstance(tensor, IntegerTensor):
        return replace(tensor, scale=scale.to(tensor.scale.dtype))
    changed = {"d": scale.to(tensor.fields["d"].dtype)}
    name = _offset_of(tensor)
    if name and offset is not None:
        changed[name] = offset.to(tensor.fields[name].dtype)
    return replace(tensor, fields=tensor.fields | changed)


def _offset_of(tensor: BlockTensor) -> str:
    return next((name for name in OFFSETS if name in tensor.fields), "")
