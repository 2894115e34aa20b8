"""Folding batch normalisations into the convolutions before them.

In eval mode a batch normalisation is y = (x - mean) / sqrt(var + eps) * weight + bias per channel, which a convolution
right before it can do itself. A pair is found by running the network: the normalisation's input is the very tensor that
the convolution returned, and nothing else read that tensor. Whether folding was right is then checked on the logits.

Faithful: every Conv2d, grouped and depthwise too, whose output only an `nn.BatchNorm2d` reads, or one with an
activation inside, as timm has them (the activation stays). A normalisation before a convolution, or after something
else, stays as it is.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moqe.errors import ModelError
from moqe.models.observation import Run, observe

TOLERANCE = 1e-4  # how far logits may move; float32 rounding stays an order of magnitude below


@dataclass(frozen=True)
class Folded:
    """A network without the batch normalisations that follow convolutions.

    network: a copy of the original; folded normalisations are `nn.Identity`, or what activation they had inside. pairs:
    names of (convolution, normalisation), in the order they run. max_difference: the largest distance of any logit of
    the example to the original network's.
    """

    network: nn.Module
    pairs: tuple[tuple[str, str], ...]
    max_difference: float


def fold_batch_norms(network: nn.Module, example: Tensor) -> Folded:
    """Fold every batch normalisation that can be folded into the convolution before it.

    network: float32, in eval mode; left as it is. example: images, (b, 3, h, w); random normal values serve.
    Raises ModelError when a module of a pair runs more than once, when a normalisation uses the batch's own statistics,
    or when logits move by 1e-4 or more (of the largest logit, where that is above 1).
    """
    run = observe(network, example)
    pairs = _pairs(run)
    folded = copy.deepcopy(network)
    for conv, norm in pairs:
        _fold(folded, conv, norm)
    with torch.no_grad():
        before, after = network(example), folded(example)
    difference = float((after - before).abs().max())
    if not difference < TOLERANCE * max(1.0, float(before.abs().max())):  # also true for nan
        raise ModelError(
            f"folding {len(pairs)} batch normalisations of {type(network).__name__} moved a logit by {difference:.2g}, "
            "more than rounding does: a module changes its weight or its input in a way that running it does not show"
        )
    return Folded(folded, pairs, difference)


def _pairs(run: Run) -> tuple[tuple[str, str], ...]:
    convs = {call.result: call.name for call in run.calls if isinstance(call.module, nn.Conv2d)}
    pairs = []
    for call in run.calls:
        if not _is_batch_norm(call.module) or call.source is None or call.source not in convs:
            continue
        if any(operation.module != call.name for operation in run.readers(call.source)):
            continue
        conv = convs[call.source]
        for name in (conv, call.name):
            if len(run.calls_of(name)) > 1:
                raise ModelError(
                    f"{name} runs {len(run.calls_of(name))} times for one input, so {call.name} cannot be folded into "
                    f"{conv}: give every place its own module"
                )
        pairs.append((conv, call.name))
    return tuple(pairs)


def _is_batch_norm(module: nn.Module) -> bool:
    """BatchNorm2d itself, or timm's with `drop` and `act` after it; another subclass may do anything."""
    return isinstance(module, nn.BatchNorm2d) and (
        type(module) in (nn.BatchNorm2d, nn.SyncBatchNorm) or {"drop", "act"} <= dict(module.named_children()).keys()
    )


def _fold(network: nn.Module, conv_name: str, norm_name: str) -> None:
    """Change the convolution's weight and bias, in float64 on the way, and take the normalisation out."""
    conv, norm = network.get_submodule(conv_name), network.get_submodule(norm_name)
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    if norm.running_mean is None or norm.running_var is None:
        raise ModelError(
            f"{norm_name} keeps no running statistics, so its output depends on the other images of a batch: train the "
            "network with track_running_stats=True"
        )
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    scale = (variance + norm.eps).rsqrt()  # (out,)
    shift = -mean * scale
    if norm.weight is not None:
        scale, shift = scale * norm.weight.double(), shift * norm.weight.double() + norm.bias.double()
    if conv.bias is not None:
        shift = shift + conv.bias.double() * scale
    weight = conv.weight.double() * scale[:, None, None, None]  # (out, in / groups, kh, kw)
    conv.weight = nn.Parameter(weight.to(conv.weight.dtype), requires_grad=False)
    conv.bias = nn.Parameter(shift.to(conv.weight.dtype), requires_grad=False)
    children = dict(norm.named_children())
    rest = nn.Sequential(children["drop"], children["act"]) if children else nn.Identity()
    parent, _, leaf = norm_name.rpartition(".")
    setattr(network.get_submodule(parent), leaf, rest.eval())
