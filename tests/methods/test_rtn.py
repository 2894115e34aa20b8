"""rtn: against the definition, written out by hand."""

from __future__ import annotations

import torch

from moqe.methods.rtn import Rtn, rtn
from moqe.recipe import Expert
from moqe.schemes import scheme


def test_symmetric_rounding_by_hand() -> None:
    weight = torch.tensor([[-1.5, 0.75, 0.13, 0.35] * 8])
    tensor = rtn(weight, scheme("w4a16", 32), torch.float32)
    torch.testing.assert_close(tensor.scale, torch.tensor([[1.5 / 7.5]]))
    assert tensor.codes[0, 1:4].tolist() == [4, 1, 2]
    assert int(tensor.codes[0, 0]) in (-8, -7)  # the extreme lies half way
    assert tensor.zero_point is None


def test_asymmetric_rounding_by_hand() -> None:
    weight = torch.tensor([[-0.3, 1.2, 0.0, 0.52] * 8])
    tensor = rtn(weight, scheme("w4a16", 32, symmetric=False), torch.float32)
    torch.testing.assert_close(tensor.scale, torch.tensor([[0.1]]))
    assert tensor.zero_point is not None
    assert tensor.zero_point.tolist() == [[3]]
    assert tensor.codes[0, :4].tolist() == [0, 15, 3, 8]


def test_eight_bits_are_within_half_a_step() -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    tensor = rtn(weight, scheme("w8a8"), torch.float32)
    error = (tensor.dequantize() - weight).abs()
    assert bool((error <= 0.5001 * tensor.scale).all())


def test_the_option_chooses_the_grid() -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    wanted, method = scheme("w4a16", 64), Rtn()
    plain, searched = (
        method.quantize(
            weight,
            None,
            wanted,
            Expert(name="x", method="rtn", scheme="w4a16", rtn={"grid": grid}),
            torch.bfloat16,
            {},
        ).dequantize()
        for grid in ("minmax", "searched")
    )
    assert torch.equal(plain, rtn(weight, wanted, torch.bfloat16).dequantize())
    assert float((searched - weight).square().sum()) < float((plain - weight).square().sum())


def test_block_schemes_are_refused_with_the_fix() -> None:
    assert "kquants" in Rtn().supports(scheme("q4_k"))
    assert Rtn().supports(scheme("w4a8")) == ""


def test_scales_are_divided_as_compressed_tensors_divides_them() -> None:
    """So that the extreme of a group lies half way between two codes, and ties to even, on both sides."""
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(3))
    tensor = rtn(weight, scheme("w4a16", 64), torch.float32)
    grouped = weight.view(256, -1, 64)
    scale = grouped.abs().amax(-1) / (15.0 / 2)
    assert torch.equal(tensor.scale, scale)
    codes = (grouped / scale[..., None]).round().clamp(-8, 7).view_as(weight)
    assert torch.equal(tensor.codes.float(), codes)
