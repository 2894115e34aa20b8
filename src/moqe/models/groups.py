"""Linears of a decoder block that share an input, and the earlier tensor that can absorb a scale of that input.

AWQ and SmoothQuant multiply the columns of linears by a scale and divide whatever makes their input by it; in full
precision the block computes the same. `moqe.models.discovery` finds the groups of a block by running it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

Kind = Literal["norm", "linear", "value", "none"]


@dataclass(frozen=True)
class LinearGroup:
    """Linears that share an input, and what can absorb a scale of it. Names are relative to the block.

    names: the linears, in the order in which they run; the first one is the group's key.
    source: the module whose output channels feed the input, or None where nothing can absorb a scale exactly.
    kind: `norm`, `linear` (token by token), `value` (through attention, which mixes tokens), or `none`.
    rows: for every input channel the row of the source that feeds it; empty when channel i is fed by row i.
    """

    names: tuple[str, ...]
    source: str | None = None
    kind: Kind = "none"
    rows: tuple[int, ...] = field(default=(), repr=False)

    @property
    def key(self) -> str:
        """The name under which the group's statistics are kept: its first linear."""
        return self.names[0]


def reduce_scale(group: LinearGroup, scale: Tensor) -> Tensor:
    """The nearest scale that can be folded: channels fed by one source row get their geometric mean.

    scale: (in,), positive. Returns a new tensor, (in,). It is `scale` itself for all but repeated value heads.
    """
    if not group.rows:
        return scale.clone()
    rows = torch.tensor(group.rows, device=scale.device)
    count = int(rows.max()) + 1
    logs = torch.zeros(count, dtype=torch.float64, device=scale.device).index_add_(0, rows, scale.double().log())
    fed = torch.bincount(rows, minlength=count).clamp(min=1)
    return (logs / fed).exp()[rows].to(scale.dtype)


def fold(block: nn.Module, group: LinearGroup, scale: Tensor) -> None:
    """Multiply the group's columns by `scale` and divide its source's rows by it, in place.

    scale: (in,), positive, and equal over repeated heads (see `reduce_scale`). The source's bias is divided too, and
    the block's full-precision output stays the same.
    Raises ValueError for a group without a source or a scale that cannot be folded.
    """
    if group.source is None:
        raise ValueError(f"group {group.key} has no source: its input scale cannot be folded")
    if not torch.allclose(reduce_scale(group, scale), scale, rtol=1e-5, atol=0.0):
        raise ValueError(f"group {group.key}: channels fed by one row need one scale; use reduce_scale first")
    with torch.no_grad():
        for name in group.names:
            weight = weight_of(block.get_submodule(name))  # (out, in)
            weight.mul_(scale.to(weight.dtype))
        source = block.get_submodule(group.source)
        divisor = torch.ones(weight_of(source).shape[0], dtype=scale.dtype, device=scale.device)  # (rows,)
        if group.rows:
            divisor[torch.tensor(group.rows, device=scale.device)] = scale
        else:
            divisor.copy_(scale)
        for tensor in source.parameters(recurse=False):  # weight (rows, in) or (rows,), bias (rows,)
            tensor.div_(divisor.to(tensor.dtype).view(-1, *[1] * (tensor.dim() - 1)))


def changed_tensors(block: nn.Module, group: LinearGroup) -> tuple[str, ...]:
    """Names, relative to the block, of the parameters that `fold` changes for this group."""
    names = [f"{name}.weight" for name in group.names]
    if group.source is not None:
        source = block.get_submodule(group.source)
        names += [f"{group.source}.{name}" for name, _ in source.named_parameters(recurse=False)]
    return tuple(names)


def weight_of(module: nn.Module) -> Tensor:
    """The `weight` of a linear, (out, in), or of a norm, (channels,)."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight
