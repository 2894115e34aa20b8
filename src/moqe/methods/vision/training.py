"""Training a quantized copy of a network against the full-precision one: the loop that qat, n2uq and dsconv share.

The copy's convolutions and linears get a parametrization (weight -> rounded weight) and a forward pre-hook (input ->
rounded input), both differentiable by some straight-through rule; everything else in the network stays as it is.

Learning rates are in quantization steps: with Adam, an update moves each weight by about `learning_rate` times its
layer's step, so one number fits layers and bit widths of very different size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from torch.nn.utils import parametrize

from moqe.errors import NumericalError
from moqe.method_options import DsConv, N2uq, Qat
from moqe.methods.vision.layer import QuantizedLayer, WeightCodes, signed_range
from moqe.methods.vision.method import CalibrationImages, Job
from moqe.methods.vision.observe import batches

Loss = Literal["distill", "labels"]
Update = Callable[[], None]

STEP_SHARE = 0.1  # learning rate of a step, relative to itself, as a share of the weights' rate in steps


class WeightQuantizer(Protocol):
    """A trained rounding of weights."""

    def codes(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """A weight's codes as float32, and their scale as `WeightCodes` has it."""


def trainable_copy(network: nn.Module) -> nn.Module:
    """A copy in the memory layout in which small convolutions train fastest; nothing in it requires a gradient yet."""
    copy = deepcopy(network).eval().requires_grad_(False)
    copy.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return copy


def attach(module: nn.Module, weight: nn.Module | None, activation: nn.Module | None) -> None:
    """Round a convolution's or linear's weight and input by these modules; weight and bias become trainable."""
    assert isinstance(module, nn.Conv2d | nn.Linear)
    module.weight.requires_grad_(True)
    if module.bias is not None:
        module.bias.requires_grad_(True)
    if weight is not None:
        parametrize.register_parametrization(module, "weight", weight.to(module.weight.device))
    if activation is not None:
        module.add_module("input_quantizer", activation.to(module.weight.device))
        module.register_forward_pre_hook(_through_input_quantizer)


def original_weight(module: nn.Module) -> nn.Parameter:
    """The trained float weight behind a module's parametrization."""
    parametrizations: Any = module.parametrizations
    original: nn.Parameter = parametrizations["weight"].original
    return original


def trained_weight(module: nn.Module, start: QuantizedLayer) -> tuple[WeightCodes, Tensor | None]:
    """The weight and the bias that a trained module stands for, number for number, on the CPU."""
    parametrizations: Any = module.parametrizations
    quantizer: WeightQuantizer = parametrizations["weight"][0]
    codes, scale = quantizer.codes(original_weight(module).detach())
    bias = module.bias.detach().cpu().clone() if isinstance(module.bias, Tensor) else None
    stored = codes.to(torch.int8).cpu().contiguous()
    return WeightCodes(stored, scale.cpu().contiguous(), start.weight.block, start.weight.bits), bias


def weight_groups(module: nn.Module, start: QuantizedLayer, rate: float) -> list[dict[str, Any]]:
    """Adam's groups for a layer's weight and bias. A bias moves as if it had a grid as fine as the weight's."""
    groups: list[dict[str, Any]] = [
        {"params": [original_weight(module)], "lr": rate * float(start.weight.scale.mean())}
    ]
    if start.bias is not None and float(start.bias.abs().max()) > 0:
        highest = signed_range(start.weight.bits)[1]
        groups.append({"params": [module.bias], "lr": rate * float(start.bias.abs().max()) / highest})
    return groups


def step_group(step: Tensor, rate: float) -> dict[str, Any]:
    """Adam's group for trained steps, or whatever else is measured in them."""
    return {"params": [step], "lr": STEP_SHARE * rate * float(step.detach().abs().mean())}


def shuffled(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Row numbers in batches of `size`, without end: one random order of all rows after the other."""
    left = torch.empty(0, dtype=torch.int64)
    while True:
        while len(left) < size:
            left = torch.cat([left, torch.randperm(count, generator=generator)])
        yield left[:size]
        left = left[size:]


@torch.no_grad()
def logits_of(network: nn.Module, images: CalibrationImages) -> Tensor:
    """The logits of all images, float32, (n, classes)."""
    return torch.cat([network(batch) for batch in batches(images)])


def train(
    job: Job,
    student: nn.Module,
    groups: Sequence[dict[str, Any]],
    constraints: Sequence[Update],
    options: Qat | N2uq | DsConv,
    loss: Loss = "distill",
    what: str = "training",
) -> float:
    """Follow Adam with a cosine schedule for `options.steps` updates; returns the mean loss of the last tenth.

    groups: Adam's parameter groups, each with its own `lr`. constraints are called after each update, for instance to
    keep steps positive. loss: `distill` is KL(teacher || student), both at `options.temperature`, the teacher being the
    job's full-precision network; `labels` the cross-entropy with the images' labels. what: to show beside the progress.
    Raises NumericalError when the loss is no longer finite.
    """
    images, steps, temperature = job.images, options.steps, options.temperature
    optimizer = torch.optim.Adam(list(groups))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    generator = torch.Generator().manual_seed(job.seed)
    rows_of = shuffled(len(images), min(options.batch_size, len(images)), generator)
    target, last = log_softmax(logits_of(job.network, images) / temperature, -1), list[float]()
    with job.progress.track(f"{job.expert.name}: {what}", steps) as advance:
        for step in range(steps):
            rows = next(rows_of)
            logits = student(images.batch(rows).contiguous(memory_format=torch.channels_last))
            if loss == "distill":
                value = kl_div(
                    log_softmax(logits / temperature, -1), target[rows], reduction="batchmean", log_target=True
                )
            else:
                value = cross_entropy(logits, images.labels[rows])
            if not torch.isfinite(value):
                raise NumericalError(
                    f"{job.expert.name}: the loss is not finite after {step} steps: lower learning_rate"
                )
            optimizer.zero_grad(set_to_none=True)
            value.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            for constrain in constraints:
                constrain()
            if step >= steps - max(1, steps // 10):
                last.append(float(value.detach()))
            advance(1)
    return sum(last) / len(last)


def _through_input_quantizer(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    quantizer: Any = module.input_quantizer
    return (quantizer(arguments[0]), *arguments[1:])
