"""From the fields of a foreign file to a quantized tensor: unsigned codes, scales and zero points by group.

Every integer format stores w = (code - zero) * scale with one scale and zero per group of input channels. They differ
in how bits are packed, in signs and orientation, and in whether a group's channels are neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moqe.quantized import IntegerTensor
from moqe.schemes import Scheme


def grouped(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bits: int,
    activation_bits: int = 16,
    group_of: Tensor | None = None,
) -> IntegerTensor | Tensor:
    """Combine codes and their grid.

    codes: uint8, (out, in), unsigned. scale: (out, groups). zero_point: uint8, (out, groups), unsigned; None means the
    middle of the range, a symmetric grid. group_of: the group of each input channel, (in,), or None for equal runs.
    Returns an IntegerTensor, or float32 weights, (out, in), where groups are uneven or activation order
    scattered their channels.
    Raises ValueError where the shapes do not belong together.
    """
    rows, columns = codes.shape
    groups = scale.shape[1]
    half = 1 << (bits - 1)
    uneven = columns % groups != 0
    misfit = scale.shape[0] != rows or (zero_point is not None and zero_point.shape != scale.shape)
    if misfit or (uneven and group_of is None):
        shapes = [tuple(part.shape) for part in (codes, scale, zero_point) if part is not None]
        raise ValueError(f"codes, scales and zero points have the shapes {shapes}, which do not belong together")
    size = columns // groups
    if group_of is not None:
        group_of = group_of.to(torch.int64)
        if group_of.shape != (columns,) or int(group_of.min()) < 0 or int(group_of.max()) >= groups:
            raise ValueError(f"g_idx does not assign {columns} input channels to {groups} groups")
        if uneven or not torch.equal(group_of, torch.arange(columns, device=group_of.device) // size):
            zero = zero_point[:, group_of].to(torch.float32) if zero_point is not None else float(half)
            return (codes.to(torch.float32) - zero) * scale[:, group_of].to(torch.float32)
    scheme = Scheme(
        f"w{bits}a{activation_bits}",
        bits,
        activation_bits,
        symmetric=zero_point is None,
        group_size=0 if groups == 1 else size,
    )
    if zero_point is None:
        codes = (codes.to(torch.int16) - half).to(torch.int8)
    return IntegerTensor(codes, scale, zero_point, scheme)
