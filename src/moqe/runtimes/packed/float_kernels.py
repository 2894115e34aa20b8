"""Weights that are not quantized: the output head, and layers that a recipe keeps."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from moqe.runtimes.packed.kernel import Multiply


class FloatKernels:
    """A weight, (out, in), multiplied in its own type. Satisfies `Kernels`."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        rows, columns = weight.shape
        self.shape, self.kind = (rows, columns), f"float {weight.dtype}"

    def candidates(self, rows: int) -> Mapping[str, Multiply]:
        """One way; a single row may also go as a vector."""
        if rows == 1:
            return {"matrix": self._matrix, "vector": self._vector}
        return {"matrix": self._matrix}

    def tensors(self) -> tuple[Tensor, ...]:
        """The weight."""
        return (self.weight,)

    def _matrix(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.to(self.weight.dtype), self.weight)

    def _vector(self, x: Tensor) -> Tensor:
        return (self.weight @ x[0].to(self.weight.dtype))[None]
