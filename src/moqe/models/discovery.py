"""Finding the groups of a decoder block by running it.

Nothing here knows an architecture:

- Linears whose forward receives the very same tensor form a group. They share calibration statistics.
- A norm whose output is that tensor, or an earlier linear, is a *candidate* source of the group. A linear's rows are
  scaled by factors that are all different; the factor seen at an input channel names the row that feeds it. So the
  channels of `up_proj` are found to reach `down_proj` through the elementwise product, and those of `v_proj` to reach
  `o_proj` through attention with its heads repeated for grouped queries.
- A candidate becomes the source only when folding a random scale leaves the block's output unchanged to 1e-4. A norm
  that multiplies by `1 + weight` (Gemma), a norm that feeds the residual as well, a projection under a nonlinearity:
  all fail that check and the group then has no source.

Cost: a dozen runs of the block on a few tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moqe.errors import ModelError
from moqe.models.groups import Kind, LinearGroup, changed_tensors, fold, reduce_scale, weight_of

TOLERANCE = 1e-4  # relative change of the block's output that a fold may cause: float32 rounding stays far below
PROBE_SEED = 20240229

Identity = tuple[int, torch.Size, tuple[int, ...], torch.dtype, int]


def find_groups(
    block: nn.Module, hidden: Tensor, kwargs: Mapping[str, Any], name: str = "block"
) -> tuple[LinearGroup, ...]:
    """Every group of a block's linears, in the order in which they run, with its checked source.

    hidden: (batch, tokens, hidden), at least two tokens; random values serve, and are immune to the huge activations
    of real ones. kwargs: what the decoder passes to this block for that shape. `name` is used in errors.
    The block's parameters are changed while candidates are checked and restored to the last bit.
    Raises ModelError when a linear does not run exactly once.
    """
    if any(tensor.dtype != torch.float32 for tensor in block.parameters()):  # 1e-4 is below half precision's rounding
        block, hidden, kwargs = copy.deepcopy(block).float(), hidden.float(), _as_float32(kwargs)
    run = _Probe(block, hidden, kwargs)
    calls = run.record()
    linears = _check_linears(block, calls, name)
    groups: list[LinearGroup] = []
    for sharing in _sharing(linears):
        group = LinearGroup(tuple(call.name for call in sharing))
        for candidate in _candidates(group, sharing[0], calls, linears, run):
            if _is_foldable(run, candidate):
                group = candidate
                break
        groups.append(group)
    return tuple(groups)


@dataclass(frozen=True, eq=False)
class _Call:
    """One forward of a submodule, and the identity of its input and output at that moment.

    Holding the tensors keeps their memory from being reused by others.
    """

    name: str
    module: nn.Module
    inputs: Tensor
    output: Tensor
    input_identity: Identity
    output_identity: Identity


class _Probe:
    """A block with one fixed input, to be run with its submodules observed or their outputs changed."""

    def __init__(self, block: nn.Module, hidden: Tensor, kwargs: Mapping[str, Any]) -> None:
        self.block, self.hidden, self.kwargs = block, hidden, kwargs
        self.generator = torch.Generator().manual_seed(PROBE_SEED)

    def residual(self) -> Tensor:
        """What the block adds to its input: errors show here even where the input dwarfs them."""
        with torch.no_grad():
            output = self.block(self.hidden, **self.kwargs)
        return hidden_of(output) - self.hidden

    def record(self) -> list[_Call]:
        """Every call of a linear or a norm during one run, in order."""
        calls: list[_Call] = []

        def remember(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
            def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                    calls.append(_Call(name, module, args[0], output, _identity(args[0]), _identity(output)))

            return hook

        with _hooked(
            module.register_forward_hook(remember(name))
            for name, module in self.block.named_modules()
            if isinstance(module, nn.Linear) or _is_norm(module)
        ):
            self.residual()
        return calls

    def seen_by(self, reader: str, source: str, change: Callable[[Tensor], Tensor]) -> Tensor:
        """The input of linear `reader` when the output of module `source` passes through `change`."""
        seen: list[Tensor] = []
        with _hooked(
            (
                self.block.get_submodule(source).register_forward_hook(lambda _m, _a, output: change(output)),
                self.block.get_submodule(reader).register_forward_pre_hook(lambda _m, args: seen.append(args[0])),
            )
        ):
            self.residual()
        return seen[0]


def _candidates(
    group: LinearGroup, reader: _Call, calls: Sequence[_Call], linears: Sequence[_Call], run: _Probe
) -> Iterator[LinearGroup]:
    """Sources worth a check: the norm that made the input, else earlier linears whose channels reach it one by one."""
    norms = [call for call in calls if _is_norm(call.module) and call.output_identity == reader.input_identity]
    for call in norms:
        yield LinearGroup(group.names, call.name, "norm")
    if norms:
        return
    for call in reversed(linears[: linears.index(reader)]):
        rows = _rows_reaching(run, reader, call)
        if rows is not None:
            kind: Kind = "value" if _mixes_tokens(run, reader, call) else "linear"
            identity = tuple(range(weight_of(call.module).shape[0]))
            yield LinearGroup(group.names, call.name, kind, () if rows == identity else rows)


def _rows_reaching(run: _Probe, reader: _Call, source: _Call) -> tuple[int, ...] | None:
    """For every channel of the reader's input the one source row that it is proportional to, or None if any has none.

    Row r is scaled by 4^(r / rows); the factor at a channel, read where the channel is largest, gives r.
    """
    inputs, rows = reader.inputs, source.output.shape[-1]
    step = torch.log(torch.tensor(4.0)) / rows
    factors = (torch.arange(rows, device=inputs.device) * step.to(inputs.device)).exp()
    before = inputs.reshape(-1, inputs.shape[-1])  # (tokens, in)
    after = run.seen_by(reader.name, source.name, lambda output: output * factors).reshape(before.shape)
    largest = before.abs().argmax(0, keepdim=True)  # (1, in)
    ratio = (after.gather(0, largest) / before.gather(0, largest))[0]
    if not (ratio > 0).all():  # also false for nan, where a channel is zero at every token
        return None
    found = (ratio.log() / step.to(ratio.device)).round().long()
    if int(found.min()) < 0 or int(found.max()) >= rows:
        return None
    if _distance(after, before * factors[found]) > TOLERANCE:
        return None
    return tuple(found.tolist())


def _mixes_tokens(run: _Probe, reader: _Call, source: _Call) -> bool:
    """Whether the source's last but one token reaches the reader's last one, as it does through any attention."""

    def double_neighbour(output: Tensor) -> Tensor:
        output = output.clone()
        output[..., -2, :] *= 2
        return output

    seen = run.seen_by(reader.name, source.name, double_neighbour)
    return not torch.equal(seen[..., -1, :], reader.inputs[..., -1, :])


def _is_foldable(run: _Probe, group: LinearGroup) -> bool:
    """Whether folding a random scale leaves the block's output unchanged."""
    columns = weight_of(run.block.get_submodule(group.key)).shape[1]
    exponents = torch.rand(columns, generator=run.generator) * 2 - 1
    scale = reduce_scale(group, exponents.exp().to(run.hidden.device))
    before = run.residual()
    saved = {name: run.block.get_parameter(name).detach().clone() for name in changed_tensors(run.block, group)}
    try:
        fold(run.block, group, scale)
        after = run.residual()
    finally:
        with torch.no_grad():
            for name, tensor in saved.items():
                run.block.get_parameter(name).copy_(tensor)
    return _distance(after, before) <= TOLERANCE


def _check_linears(block: nn.Module, calls: Sequence[_Call], name: str) -> list[_Call]:
    """The calls of linears, after making sure that every linear ran once."""
    linears = [call for call in calls if isinstance(call.module, nn.Linear)]
    ran = [call.name for call in linears]
    for linear, module in block.named_modules():
        if isinstance(module, nn.Linear) and ran.count(linear) != 1:
            raise ModelError(
                f"linear {linear} of {name} runs {ran.count(linear)} times for one input: "
                "MoQE calibrates dense decoders, whose linears each run once; choose another base model"
            )
    return linears


def _sharing(linears: Sequence[_Call]) -> list[list[_Call]]:
    """Linears grouped by the tensor they receive, in order of first use."""
    groups: dict[Identity, list[_Call]] = {}
    for call in linears:
        groups.setdefault(call.input_identity, []).append(call)
    return list(groups.values())


def _identity(tensor: Tensor) -> Identity:
    """What tells a tensor apart: its memory, how that is read, and how often it was written to."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version


def _is_norm(module: nn.Module) -> bool:
    """Whether a module looks like a normalisation: a leaf with a weight vector."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 1 and not list(module.children())


def hidden_of(output: Any) -> Tensor:
    """The hidden states in what a block returns: a tensor, or a tuple that begins with it."""
    hidden = output[0] if isinstance(output, tuple) else output
    assert isinstance(hidden, Tensor)
    return hidden


def _distance(a: Tensor, b: Tensor) -> float:
    """Relative Frobenius distance of `a` to `b`; infinite where it is not a number."""
    distance = float((a - b).norm() / b.norm().clamp(min=1e-30))
    return distance if distance == distance else float("inf")


def _as_float32(value: Any) -> Any:
    """Floating point tensors inside nested kwargs as float32."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: _as_float32(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_as_float32(item) for item in value)
    return value


@contextmanager
def _hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove hooks when the block ends."""
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
