"""rtn: round every weight to the nearest point of its group's grid. The baseline that calibrated methods must beat.

Source: common practice; nothing to cite. Differs from most tools only in what is offered beside the min-max grid:
`grid: searched` minimises the plain squared error of each group. No data is used in either case.
Cost: one pass over the weights on min-max grids, see `grids.py` for searched ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moqe.methods.grids import minmax_grid, round_to_grid, searched_grid
from moqe.methods.method import Notes
from moqe.methods.statistics import InputStatistics
from moqe.quantized import IntegerTensor
from moqe.recipe import Expert
from moqe.schemes import Scheme


def rtn(weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype, grid: str = "minmax") -> IntegerTensor:
    """Round a weight, float32 (out, in), to the nearest codes of a `minmax` or `searched` grid.

    Raises UnsupportedLayer when the group size does not divide `in`, NumericalError when numbers are not finite.
    """
    make = searched_grid if grid == "searched" else minmax_grid
    return round_to_grid(weight, *make(weight, scheme, scale_dtype), scheme)


class Rtn:
    """Round to nearest."""

    name = "rtn"
    calibrated = False

    def supports(self, scheme: Scheme) -> str:
        """Every integer scheme."""
        return f"write method: kquants for the block scheme {scheme.name}" if scheme.is_block else ""

    def smooth(
        self,
        weights: Sequence[Tensor],
        statistics: InputStatistics,
        scheme: Scheme,
        expert: Expert,
        reduce: Callable[[Tensor], Tensor],
        notes: Notes,
    ) -> None:
        """Nothing is moved between inputs and weights."""

    def quantize(
        self,
        weight: Tensor,
        statistics: InputStatistics | None,
        scheme: Scheme,
        expert: Expert,
        scale_dtype: torch.dtype,
        notes: Notes,
    ) -> IntegerTensor:
        """See `rtn`; `expert.rtn.grid` chooses the grid."""
        return rtn(weight, scheme, scale_dtype, expert.rtn.grid)
