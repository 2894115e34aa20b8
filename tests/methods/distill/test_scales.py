"""Scale forms: a quantized tensor equals scale * step + offset * lift, and other scales change nothing else."""

from __future__ import annotations

import pytest
import torch

from moqe.methods import METHODS
from moqe.methods.distill import scale_form, with_scales
from moqe.quantized import IntegerTensor, Quantized
from moqe.recipe import Expert
from moqe.schemes import SCHEMES, Scheme, scheme

INTEGER = [scheme("w4a16", 64, False), scheme("w4a16", 64), scheme("w8a16"), scheme("w3a16", 32, False)]
BLOCKS = [found for found in SCHEMES.values() if found.is_block]


def quantized(target: Scheme, rows: int = 6, columns: int = 256) -> Quantized:
    method = METHODS["kquants" if target.is_block else "rtn"]
    expert = Expert(name="x", method=method.name, scheme=target.name)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(3)) * 0.05 + 0.01
    return method.quantize(weight, None, target, expert, torch.bfloat16, {})


@pytest.mark.parametrize("target", [*INTEGER, *BLOCKS], ids=lambda found: f"{found.name}-{found.symmetric}")
def test_a_form_stands_for_the_tensor_s_weights(target: Scheme) -> None:
    tensor = quantized(target)
    form = scale_form(tensor)
    # ggml multiplies by the sub-scale first: the same product in another order, so the last bit may differ.
    torch.testing.assert_close(form.weight(), tensor.dequantize(), rtol=2e-6, atol=1e-8)
    assert (form.offset is not None) == (target.block in ("Q4_1", "Q2_K", "Q4_K", "Q5_K"))


@pytest.mark.parametrize("target", [*INTEGER, *BLOCKS], ids=lambda found: f"{found.name}-{found.symmetric}")
def test_other_scales_move_the_weights_as_the_form_says(target: Scheme) -> None:
    tensor = quantized(target)
    form = scale_form(tensor)
    offset = None if form.offset is None else 4 * form.offset
    changed = with_scales(tensor, 2 * form.scale, offset)  # powers of two: nothing is rounded
    wanted = 2 * form.scale[..., None] * form.step.float()
    if form.offset is not None and form.lift is not None:
        wanted = wanted + 4 * form.offset[..., None] * form.lift
    torch.testing.assert_close(changed.dequantize(), wanted.flatten(1), rtol=2e-6, atol=1e-8)
    assert torch.equal(changed.codes, tensor.codes)


def test_steps_beyond_a_byte_are_kept() -> None:
    codes = torch.tensor([[0, 255]], dtype=torch.uint8)
    zero = torch.tensor([[10]], dtype=torch.uint8)
    target = scheme("w8a16", 0, False)
    form = scale_form(IntegerTensor(codes, torch.ones(1, 1, dtype=torch.bfloat16), zero, target))
    assert form.step.flatten().tolist() == [-10, 245]
