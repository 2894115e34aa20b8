"""What distillation will take, before it is done: windows counted, one layer's training step measured."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from moqe.expert_options import OWN_WEIGHTS
from moqe.methods.distill.scaled_linear import ScaledLinear
from moqe.methods.distill.scales import ScaleForm
from moqe.recipe import Expert, Specialists

_SIDE, _GROUP = 1024, 64
_HEAD_PRODUCTS = 4  # logits of the base and of the expert, and two products backward


def training_steps(expert: Expert, specialists: Specialists | None) -> int:
    """How many updates an expert's training takes in all: branches, candidates for own_weight and rounds counted."""
    options = expert.distill
    if options is None:
        return 0
    candidates = len(OWN_WEIGHTS) if None in options.weights.values() else 1
    rounds = 1 + (specialists.rounds if specialists is not None and expert.codes_of else 0)
    return candidates * rounds * (options.steps - (options.branch_after if expert.codes_of else 0))


def seconds_per_step_and_weight(tokens: int, dtype: torch.dtype, device: str) -> float:
    """Time of one update of `tokens` tokens per weight of the blocks, of a layer that is run as in training."""
    random = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (_SIDE, _SIDE // _GROUP, _GROUP), generator=random, dtype=torch.int8)
    layer = ScaledLinear(ScaleForm(codes, torch.full(codes.shape[:2], 0.01)), None).to(device)
    inputs = torch.randn(tokens, _SIDE, generator=random).to(device, dtype).requires_grad_(True)

    def step() -> None:
        with torch.autocast(torch.device(device).type, dtype=dtype, enabled=dtype != torch.float32):
            with torch.no_grad():
                layer(inputs)  # the block is run again for the backward pass
            output = layer(inputs)
        (found,) = torch.autograd.grad(output.float().sum(), [layer.log_scale])
        float(found[0, 0])  # wait: kernels of an accelerator run on their own

    step()
    start = time.perf_counter()
    step()
    return (time.perf_counter() - start) / codes.numel()


def distill_seconds(
    experts: Sequence[Expert],
    specialists: Specialists | None,
    *,
    linear_weights: int,
    head_weights: int,
    window: int,
    windows: int,
    dtype: torch.dtype,
    device: str,
    flops_per_second: float,
) -> float:
    """Seconds of all trainings, of the base's answers that they follow, and of looking at validation windows.

    linear_weights, head_weights: of all blocks' linears and of the output head. windows: of calibration text, `window`
    tokens each. flops_per_second: of products in `dtype`.
    """
    seconds = 0.0
    forward = 2.0 * window * (linear_weights + 2 * head_weights) / flops_per_second
    for expert in experts:
        if expert.distill is not None:
            tokens = expert.distill.batch_windows * window
            head = 2.0 * _HEAD_PRODUCTS * tokens * head_weights / flops_per_second
            each = linear_weights * seconds_per_step_and_weight(tokens, dtype, device) + head
            steps = training_steps(expert, specialists)
            looks = 2 + steps // expert.distill.evaluate_every
            seconds += steps * each + looks * min(expert.distill.validation_windows, windows) * forward
    if seconds:
        seconds += 2.0 * windows * window * linear_weights / flops_per_second
    return seconds
