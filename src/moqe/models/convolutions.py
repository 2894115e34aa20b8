"""The layers of an image classifier that can be quantized, and the blocks they form, found by running it.

Nothing here knows an architecture. A layer is an `nn.Conv2d` or `nn.Linear` that runs exactly once and hands its own
weight to the convolution or product; anything else that multiplies by a parameter is an error, because it would stay
in full precision without a word.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from moqe.errors import ModelError
from moqe.models.folding import Folded, fold_batch_norms
from moqe.models.observation import Call, Key, Operation, Run, observe

__all__ = ["Folded", "LayerSite", "blocks", "fold_batch_norms", "observe_layers"]

_PRODUCTS = {"conv2d": nn.Conv2d, "linear": nn.Linear}
# Multiplications by a parameter that no Conv2d or Linear makes.
_OTHER_PRODUCTS = frozenset({"conv1d", "conv3d", "conv_transpose2d", "matmul", "__matmul__", "bmm", "einsum"}) | {
    "multi_head_attention_forward",
    "_native_multi_head_attention",
}
_RELU_LIKE = frozenset({"relu", "relu_", "relu6", "hardtanh", "hardtanh_", "clamp", "clamp_", "clamp_min", "threshold"})
# These give values of the input as they are, or zero: rounding before them is rounding after them.
_PICKING = frozenset({"max_pool2d", "flatten", "reshape", "view", "contiguous", "permute", "transpose", "dropout"})
_PICKING_OR_RELU = _PICKING | _RELU_LIKE | {"adaptive_max_pool2d", "squeeze", "unsqueeze", "__getitem__", "pad"}


@dataclass(frozen=True)
class LayerSite:
    """A convolution or linear that can be quantized.

    name: of the module. weight_shape: (out, in / groups, kh, kw) or (out, in). input_shape: of one image's input, so
    (in, h, w) for a convolution. input_nonnegative: no input was below zero, as after a ReLU: unsigned codes serve.
    needs_output: on some way the output meets something else than another of these layers, whose input quantizer stands
    there, or the end of the network; ReLU-like functions, maxima, padding and changes of shape in between do not count.
    Such as an addition or a mean: it reads full precision, so integer execution must quantize the output where it is
    made.
    """

    name: str
    kind: Literal["conv", "linear"]
    weight_shape: tuple[int, ...]
    input_shape: tuple[int, ...]
    input_nonnegative: bool
    needs_output: bool


def observe_layers(network: nn.Module, example: Tensor) -> tuple[LayerSite, ...]:
    """Every layer that can be quantized, in the order in which they run.

    network: eval mode, usually folded. example: images, (b, 3, h, w); random normal values serve. It is run on the
    example and on its negative.
    Raises ModelError when a layer runs more than once, shares its weight with another, or does not use its weight as it
    is, and when a parameter is multiplied elsewhere.
    """
    run, opposite = observe(network, example), observe(network, -example)
    calls = _layer_calls(network, run)
    results = {call.result: call.name for call in calls}
    negative = {call.name for call in opposite.calls if not call.input_nonnegative}
    sites = []
    for call in calls:
        assert isinstance(call.module, nn.Conv2d | nn.Linear)
        assert call.result in results
        sites.append(
            LayerSite(
                call.name,
                "conv" if isinstance(call.module, nn.Conv2d) else "linear",
                tuple(call.module.weight.shape),
                call.input_shape[1:],
                call.input_nonnegative and call.name not in negative,
                _meets_something_else(run, call.result, set(results.values())),
            )
        )
    return tuple(sites)


def blocks(network: nn.Module, example: Tensor) -> tuple[str, ...]:
    """Names of the modules that are reconstructed together, in the order in which they begin.

    A block is a smallest module with at least two of the layers of `observe_layers` that runs once, from one tensor to
    one tensor; it is widened to the module around it as long as that begins with the same tensor and holds no other
    such block, so that the addition at the end of a residual block belongs to it. A layer outside all of these is a
    block by itself. Raises as `observe_layers` does.
    """
    run = observe(network, example)
    layers = [call.name for call in _layer_calls(network, run)]
    sources = {
        call.name: call.source
        for call in run.calls
        if call.name and call.source is not None and call.result is not None and len(run.calls_of(call.name)) == 1
    }
    able = [name for name in sources if sum(_inside(layer, name) for layer in layers) >= 2]
    smallest = [name for name in able if not any(_inside(other, name) and other != name for other in able)]
    found = [_widened(name, smallest, able, sources) for name in smallest]
    lone = [layer for layer in layers if not any(_inside(layer, block) for block in found)]
    order = {name: min(i for i, layer in enumerate(layers) if _inside(layer, name)) for name in (*found, *lone)}
    return tuple(sorted(order, key=order.__getitem__))


def _widened(name: str, smallest: Sequence[str], able: Sequence[str], sources: Mapping[str, Key | None]) -> str:
    for outer in _around(name):
        only = sum(_inside(other, outer) for other in smallest) == 1
        if outer in able and only and sources[outer] == sources[name]:
            name = outer
    return name


def _around(name: str) -> Iterator[str]:
    """The modules around one, the innermost first, without the network itself."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _inside(name: str, outer: str) -> bool:
    return name == outer or name.startswith(outer + ".")


def _layer_calls(network: nn.Module, run: Run) -> list[Call]:
    """The one call of every convolution and linear that runs, after making sure that nothing escapes."""
    calls = [call for call in run.calls if isinstance(call.module, nn.Conv2d | nn.Linear)]
    names = [call.name for call in calls]
    owners: dict[int, str] = {}
    for call in calls:
        if names.count(call.name) > 1:
            raise ModelError(
                f"{call.name} runs {names.count(call.name)} times for one input, and a layer is quantized for one "
                "place: give every place its own module"
            )
        assert isinstance(call.module, nn.Conv2d | nn.Linear)
        owner = owners.setdefault(id(call.module.weight), call.name)
        if owner != call.name:
            raise ModelError(f"{owner} and {call.name} share one weight: give each its own copy")
        products = [operation for operation in run.operations if operation.module == call.name]
        if not any(_is_own_product(operation, call) for operation in products):
            raise ModelError(
                f"{call.name} ({type(call.module).__name__}) does not use its weight as it is, so it cannot be "
                "quantized: put the weight that it computes into a plain nn.Conv2d or nn.Linear"
            )
    _refuse_others(network, run, set(names))
    return calls


def _is_own_product(operation: Operation, call: Call) -> bool:
    kind = _PRODUCTS.get(operation.function)
    return kind is not None and isinstance(call.module, kind) and f"{call.name}.weight" in operation.weights


def _refuse_others(network: nn.Module, run: Run, layers: set[str]) -> None:
    for operation in run.operations:
        if operation.module in layers or not operation.weights:
            continue
        if operation.function in _PRODUCTS or operation.function in _OTHER_PRODUCTS:
            raise ModelError(
                f"{operation.weights[0]} is multiplied by {operation.function} in "
                f"{operation.module or type(network).__name__}, outside nn.Conv2d and nn.Linear: it would stay in full "
                "precision; choose a network whose layers are modules"
            )


def _meets_something_else(run: Run, start: Key | None, layers: set[str]) -> bool:
    """Whether a tensor reaches anything but layers through functions that keep its values or clip them at zero."""
    pending, seen = [start], {start}
    end = run.calls[0].result  # the network's own call is the first to begin
    while pending:
        key = pending.pop()
        readers = list(run.readers(key)) if key is not None else []
        if not readers and (key is None or key != end):
            return True  # read by a function that nothing is known of
        for operation in readers:
            if operation.module in layers:
                continue
            if operation.function not in _PICKING_OR_RELU:
                return True
            if operation.function in _RELU_LIKE and not operation.nonnegative:
                return True
            pending += [made for made in operation.makes if made not in seen]
            seen.update(operation.makes)
    return False
