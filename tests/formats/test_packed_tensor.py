from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moqe.formats import packed_tensor
from moqe.formats.compressed_tensors import encode
from moqe.formats.packed_tensor import PackedTensor
from moqe.quantized import IntegerTensor
from moqe.schemes import Scheme
from split_experts import random_codes


def packed(tensor: IntegerTensor) -> PackedTensor:
    fields = {name.removeprefix("x."): value for name, value in encode("x", tensor).items()}
    codes = fields["weight_packed"] if "weight_packed" in fields else fields["weight"]
    rows, columns = tensor.codes.shape
    return PackedTensor(codes, tensor.scale, fields.get("weight_zero_point"), (rows, columns), tensor.scheme)


@settings(max_examples=80, deadline=None)
@given(
    bits=st.integers(2, 8),
    activation_bits=st.sampled_from([8, 16]),
    symmetric=st.booleans(),
    rows=st.integers(1, 40),
    groups=st.integers(1, 5),
    size=st.integers(1, 48),
    at_once=st.integers(1, 4000),
)
def test_weights_equal_those_of_unpacked_codes_bit_for_bit(
    bits: int, activation_bits: int, symmetric: bool, rows: int, groups: int, size: int, at_once: int
) -> None:
    tensor = random_codes(rows, groups * size, Scheme("w", bits, activation_bits, symmetric, size))
    tensor.scale[::3] *= -1  # ggml-like grids have negative scales; signs of zeros must agree too
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_tensor, "_ELEMENTS", at_once)
        got = packed(tensor).dequantize()
    assert got.dtype == torch.float32
    assert torch.equal(got.view(torch.int32), tensor.dequantize().view(torch.int32))


def test_zero_points_may_be_stored_unpacked_beside_packed_codes() -> None:
    tensor = random_codes(6, 64, Scheme("w", 4, symmetric=False, group_size=16))
    assert tensor.zero_point is not None
    whole = packed(tensor)
    signed = (tensor.zero_point.to(torch.int16) - 8).to(torch.int8)
    assert torch.equal(
        PackedTensor(whole.codes, whole.scale, signed, (6, 64), whole.scheme).dequantize(), whole.dequantize()
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"codes": torch.zeros(6, 7, dtype=torch.int32)}, r"codes of shape \(6, 7\) instead of \(6, 8\)"),
        ({"codes": torch.zeros(6, 8)}, "codes of type"),
        ({"scale": torch.zeros(5, 4)}, r"scales of shape \(5, 4\)"),
        ({"scale": torch.zeros(6, 3)}, "zero points"),
        ({"zero_point": torch.zeros(2, 4, dtype=torch.int32)}, "zero points"),
        ({"scale": torch.zeros(6, 3), "zero_point": torch.zeros(1, 3, dtype=torch.int32)}, "3 equal groups"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(changed: dict[str, Tensor], message: str) -> None:
    whole = packed(random_codes(6, 64, Scheme("w", 4, symmetric=False, group_size=16)))
    parts = {"codes": whole.codes, "scale": whole.scale, "zero_point": whole.zero_point, **changed}
    with pytest.raises(ValueError, match=message):
        PackedTensor(**parts, shape=(6, 64), scheme=whole.scheme)  # type: ignore[arg-type]
