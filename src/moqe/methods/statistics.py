"""What the closed forms need from data: second moments, extremes and the token count of a linear's input.

RTN needs nothing, imatrix the diagonal of H over n, AWQ tr(dW H dW^T) and mean |x|, GPTQ the Cholesky factor of H's
inverse, SmoothQuant max |x|. All of it adds up over samples, so statistics are kept per calibration domain and an
expert for any mix of domains is a weighted sum away, without another forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moqe.errors import NumericalError

_STRIP, _STRIPS = 192, 8  # columns of H computed at a time, at least, and into how many strips H is divided, at most


@dataclass(frozen=True)
class InputStatistics:
    """Sums over the tokens that reached a linear layer's input.

    hessian: sum of x x^T, float32, (in, in). absmax: max |x|, float32, (in,). abssum: sum |x|, float32, (in,).
    tokens: how many x were summed; a float, because domains may be weighted.
    """

    hessian: Tensor
    absmax: Tensor
    abssum: Tensor
    tokens: float

    @property
    def importance(self) -> Tensor:
        """Mean x^2 per input channel, (in,): ggml's importance matrix."""
        return torch.diagonal(self.hessian) / self.tokens

    @property
    def absmean(self) -> Tensor:
        """Mean |x| per input channel, (in,)."""
        return self.abssum / self.tokens

    def scaled_inputs(self, divisor: Tensor) -> InputStatistics:
        """The statistics of x / divisor, with divisor (in,) positive."""
        return InputStatistics(
            self.hessian / divisor[:, None] / divisor[None, :],
            self.absmax / divisor,
            self.abssum / divisor,
            self.tokens,
        )


def accumulate(total: InputStatistics | None, inputs: Tensor) -> InputStatistics:
    """Add a batch of inputs, (tokens, in) of any float type, to `total`."""
    x = inputs.to(torch.float32)
    if total is None:
        size, zeros = x.shape[1], x.new_zeros(x.shape[1])
        total = InputStatistics(x.new_zeros(size, size), zeros, zeros.clone(), 0.0)
    absolute = x.abs()
    _add_gram(total.hessian, x)
    return InputStatistics(
        total.hessian,
        torch.maximum(total.absmax, absolute.amax(0)),
        total.abssum.add_(absolute.sum(0)),
        total.tokens + x.shape[0],
    )


def _add_gram(total: Tensor, x: Tensor) -> None:
    """Add x^T x, x (tokens, in), to a symmetric matrix in place: strips of what lies above the diagonal, mirrored.

    A full product computes everything twice; n strips take (n + 1) / 2n of its multiplications, and the sum is
    symmetric to the last bit.
    """
    columns = len(total)
    width = max(_STRIP, columns // _STRIPS)
    for begin in range(0, columns, width):
        end = min(begin + width, columns)
        total[begin:end, begin:].addmm_(x[:, begin:end].T, x[:, begin:])
        total[end:, begin:end] = total[begin:end, end:].T


def combine(by_domain: Mapping[str, InputStatistics], weights: Mapping[str, float] | None = None) -> InputStatistics:
    """The weighted sum of domains' statistics; a domain without a weight counts 1, with weight 0 it is left out.

    Raises NumericalError when nothing is left or something is not finite.
    """
    parts = [(float((weights or {}).get(domain, 1.0)), part) for domain, part in sorted(by_domain.items())]
    parts = [(weight, part) for weight, part in parts if weight > 0]
    if not parts or sum(part.tokens for _, part in parts) == 0:
        raise NumericalError("no calibration tokens are left: give at least one domain a positive weight")
    total = InputStatistics(
        torch.stack([weight * part.hessian for weight, part in parts]).sum(0)
        if len(parts) > 1
        else parts[0][1].hessian * parts[0][0],
        torch.stack([part.absmax for _, part in parts]).amax(0),
        torch.stack([weight * part.abssum for weight, part in parts]).sum(0),
        sum(weight * part.tokens for weight, part in parts),
    )
    if not (torch.isfinite(total.hessian).all() and torch.isfinite(total.absmax).all()):
        raise NumericalError("calibration statistics are not finite: the base model's activations overflow")
    return total
