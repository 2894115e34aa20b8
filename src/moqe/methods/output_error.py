"""The output error of a changed weight, from second moments alone.

For y = W x the squared output error of a change dW, summed over tokens, is the sum of |dW x|^2 = tr(dW H dW^T) with H
the sum of x x^T: exact, without keeping a single activation.
"""

from __future__ import annotations

import torch
from torch import Tensor


def output_error(difference: Tensor, hessian: Tensor) -> float:
    """tr(D H D^T): the squared output error, summed over tokens, of a weight that is off by D, float32 (out, in)."""
    return float(((difference @ hessian) * difference).sum(dtype=torch.float64))


def unfold(weight: Tensor, original: Tensor, stored: Tensor, scale: Tensor | None) -> Tensor:
    """Take quantized weights back to the base model's coordinates. All are (out, in); returns float32.

    weight: what `stored` was quantized to. stored: the original weights times `scale`, (in,), on columns and times some
    factor on every row, which a fold of the following layer's scale has left there; the factor is found by comparing
    the two.
    """
    columns = weight if scale is None else weight / scale
    if torch.equal(original, stored):
        return columns
    unscaled = stored.float() if scale is None else stored.float() / scale
    size = unscaled.square().sum(1)
    factor = torch.where(size > 0, (unscaled * original).sum(1) / size, torch.ones_like(size))  # (out,)
    return columns * factor[:, None]
