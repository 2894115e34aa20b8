"""A linear layer that keeps its codes packed and makes its weight when it is used.

What is faithful: the weight equals the reference runtime's bit for bit, and so do the layer's outputs. What it costs:
the weight is made anew at every call, see `PackedTensor`. At 4 bits that is a quarter of the time for 256 tokens and
six sevenths of it for a single one.
"""

from __future__ import annotations

from torch import Tensor, nn

from moqe.formats.packed_tensor import PackedTensor


class CodedLinear(nn.Module):
    """y = W x + bias, W stored as codes and scales. bias: (out,) or None. Replaces an nn.Linear; not trainable."""

    def __init__(self, packed: PackedTensor, bias: Tensor | None) -> None:
        super().__init__()
        self.packed = packed
        self.out_features, self.in_features = packed.shape
        self.bias: Tensor | None
        self.register_buffer("bias", bias, persistent=False)

    @property
    def weight(self) -> Tensor:
        """W as it stands for now: float32, (out, in), made at every access."""
        return self.packed.dequantize()

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return nn.functional.linear(inputs, self.weight.to(inputs.dtype), self.bias)

    def extra_repr(self) -> str:
        """What is printed of it, as nn.Linear prints itself."""
        scheme = self.packed.scheme
        return f"in_features={self.in_features}, out_features={self.out_features}, scheme={scheme.name}"
