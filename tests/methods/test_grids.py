"""Grids: what every grid guarantees, and what the search must win."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moqe.errors import NumericalError, UnsupportedLayer
from moqe.methods.grids import Grid, clipped_grid, minmax_grid, round_to_grid, searched_grid
from moqe.schemes import Scheme, scheme

INTEGER_SCHEMES = [
    scheme("w4a16", 32),
    scheme("w4a16", 0),
    scheme("w4a16", 64, symmetric=False),
    scheme("w3a16", 32),
    scheme("w3a16", 64, symmetric=True),
    scheme("w8a16"),
    scheme("w8a16", 32, symmetric=False),
]


def matrix(seed: int, rows: int = 12, columns: int = 128, tail: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    outlier = torch.rand(rows, columns, generator=generator) < tail
    return torch.where(outlier, weight * 10, weight) * 0.05


def importances(seed: int, columns: int = 128) -> Tensor:
    return torch.randn(columns, generator=torch.Generator().manual_seed(seed + 1000)).mul(2).exp()


def weighted_error(weight: Tensor, grid: Grid, wanted: Scheme, importance: Tensor | None = None) -> Tensor:
    """Per group: (out, groups)."""
    squares = (round_to_grid(weight, *grid, wanted).dequantize() - weight).double().square()
    if importance is not None:
        squares = squares * importance
    return squares.view(len(weight), grid[0].shape[1], -1).sum(-1)


@pytest.mark.parametrize("wanted", INTEGER_SCHEMES, ids=str)
@settings(max_examples=5, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    tail=st.sampled_from([0.0, 0.02]),
    weighted=st.booleans(),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
)
def test_searched_never_loses_to_minmax_in_any_group(
    wanted: Scheme, seed: int, tail: float, weighted: bool, dtype: torch.dtype
) -> None:
    weight, importance = matrix(seed, tail=tail), importances(seed) if weighted else None
    searched = weighted_error(weight, searched_grid(weight, wanted, dtype, importance), wanted, importance)
    plain = weighted_error(weight, minmax_grid(weight, wanted, dtype), wanted, importance)
    assert bool((searched <= plain * (1 + 1e-4)).all())


@pytest.mark.parametrize(("name", "share"), [("w2a16", 0.85), ("w3a16", 0.75), ("w4a16", 0.85), ("w8a16", 0.97)])
def test_the_search_wins_what_it_is_there_for(name: str, share: float) -> None:
    wanted = scheme(name, 64)
    weight, importance = matrix(1, 64, 256, tail=0.01), importances(1, 256)
    searched = weighted_error(weight, searched_grid(weight, wanted, torch.bfloat16, importance), wanted, importance)
    plain = weighted_error(weight, minmax_grid(weight, wanted, torch.bfloat16), wanted, importance)
    assert float(searched.sum() / plain.sum()) < share


def test_the_search_comes_close_to_trying_everything() -> None:
    wanted, importance = scheme("w3a16", 32), importances(5, 32)
    weight = matrix(5, 6, 32)
    found = weighted_error(weight, searched_grid(weight, wanted, torch.float32, importance), wanted, importance)
    best = torch.full_like(found, torch.inf)
    span = weight.amax(1, keepdim=True) - weight.amin(1, keepdim=True)
    for factor in torch.linspace(0.3, 1.2, 300).tolist():
        for zero in range(8):
            grid = (span / 7 * factor, torch.full_like(span, zero).to(torch.uint8))
            best = torch.minimum(best, weighted_error(weight, grid, wanted, importance))
    assert float(found.sum() / best.sum()) < 1.02


@pytest.mark.parametrize("make", [minmax_grid, searched_grid])
@pytest.mark.parametrize("symmetric", [True, False])
@settings(max_examples=5, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000))
def test_more_bits_are_never_worse(make, symmetric: bool, seed: int) -> None:
    weight = matrix(seed)
    schemes = [scheme(name, 32, symmetric=symmetric) for name in ("w3a16", "w4a16", "w8a16")]
    errors = [float(weighted_error(weight, make(weight, wanted, torch.bfloat16), wanted).sum()) for wanted in schemes]
    assert errors[0] >= errors[1] >= errors[2]


@pytest.mark.parametrize("wanted", INTEGER_SCHEMES, ids=str)
@pytest.mark.parametrize("make", [minmax_grid, searched_grid])
def test_types_shapes_and_ranges(wanted: Scheme, make) -> None:
    weight = matrix(3, tail=0.02)
    scale, zero = make(weight, wanted, torch.bfloat16)
    tensor = round_to_grid(weight, scale, zero, wanted)
    groups = 128 // (wanted.group_size or 128)
    assert scale.dtype is torch.bfloat16
    assert scale.shape == (12, groups)
    assert bool((scale > 0).all())
    assert tensor.codes.dtype is (torch.int8 if wanted.symmetric else torch.uint8)
    assert int(tensor.codes.min()) >= wanted.levels[0]
    assert int(tensor.codes.max()) <= wanted.levels[1]
    if wanted.symmetric:
        assert zero is None
    else:
        assert zero is not None
        assert zero.dtype is torch.uint8
        assert int(zero.max()) <= wanted.levels[1]


@pytest.mark.parametrize("wanted", INTEGER_SCHEMES, ids=str)
def test_codes_are_the_nearest_for_the_scale_that_is_stored(wanted: Scheme) -> None:
    weight = matrix(4)
    scale, zero = searched_grid(weight, wanted, torch.bfloat16)
    tensor = round_to_grid(weight, scale, zero, wanted)
    best = (tensor.dequantize() - weight).abs()
    for step in (-1, 1):
        moved = (tensor.codes.int() + step).clamp(*wanted.levels).to(tensor.codes.dtype)
        other = type(tensor)(moved, scale, zero, wanted).dequantize()
        assert bool((best <= (other - weight).abs() + 1e-7).all())


@pytest.mark.parametrize("make", [minmax_grid, searched_grid])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_groups_of_zeros_stay_zeros(make, symmetric: bool, dtype: torch.dtype) -> None:
    wanted = scheme("w4a16", 32, symmetric=symmetric)
    weight = matrix(6)
    weight[:, 32:64] = 0
    weight[3] = 0
    grid = make(weight, wanted, dtype)
    result = round_to_grid(weight, *grid, wanted).dequantize()
    assert bool((grid[0][:, 1] == 1).all())
    assert not result[:, 32:64].any()
    assert not result[3].any()


@pytest.mark.parametrize("make", [minmax_grid, searched_grid])
def test_weights_of_one_sign_keep_their_zero_point_in_range(make) -> None:
    wanted = scheme("w4a16", 32, symmetric=False)
    for sign in (1.0, -1.0):
        weight = sign * (matrix(7).abs() + 1.0)
        error = weighted_error(weight, make(weight, wanted, torch.float32), wanted)
        step = float(weight.abs().max()) / 15
        assert float(error.max()) <= 32 * step**2 / 3


def test_a_channel_without_importance_costs_nothing() -> None:
    wanted = scheme("w4a16", 64)
    weight, importance = matrix(8, columns=64), torch.ones(64)
    weight[:, 5], importance[5] = 0.3, 0.0  # an outlier nobody looks at
    searched = weighted_error(weight, searched_grid(weight, wanted, torch.bfloat16, importance), wanted, importance)
    alone = weight.clone()
    alone[:, 5] = 0
    without = weighted_error(alone, searched_grid(alone, wanted, torch.bfloat16, importance), wanted, importance)
    assert float(searched.sum()) < 1.1 * float(without.sum())


def test_importance_of_any_size_gives_the_same_grid() -> None:
    wanted, weight, importance = scheme("w4a16", 64), matrix(9) * 1e-5, importances(9)
    grids = [searched_grid(weight, wanted, torch.bfloat16, importance * size)[0] for size in (1.0, 2.0**110, 2.0**-110)]
    assert torch.equal(grids[0], grids[1])
    assert torch.equal(grids[0], grids[2])
    silent = searched_grid(weight, wanted, torch.bfloat16, torch.zeros(128))[0]
    assert torch.equal(silent, searched_grid(weight, wanted, torch.bfloat16)[0])


def test_chunks_of_rows_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, weight, importance = scheme("w3a16", 64), matrix(10), importances(10)
    whole = searched_grid(weight, wanted, torch.bfloat16, importance)
    monkeypatch.setattr("moqe.methods.grids.CHUNK_ELEMENTS", 128 * 5)
    parts = searched_grid(weight, wanted, torch.bfloat16, importance)
    assert torch.equal(whole[0], parts[0])
    assert whole[1] is not None
    assert parts[1] is not None
    assert torch.equal(whole[1], parts[1])


def test_clipping_to_the_whole_range_is_minmax() -> None:
    wanted, weight = scheme("w4a16", 32), matrix(11)
    whole = clipped_grid(weight, torch.tensor(1.0), wanted, torch.bfloat16)[0]
    half = clipped_grid(weight, torch.full((12, 4), 0.5), wanted, torch.float32)[0]
    assert torch.equal(whole, minmax_grid(weight, wanted, torch.bfloat16)[0])
    torch.testing.assert_close(half, 0.5 * minmax_grid(weight, wanted, torch.float32)[0])


@pytest.mark.parametrize("make", [minmax_grid, searched_grid])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(make, bad: float) -> None:
    weight = matrix(12)
    weight[2, 7] = bad
    with pytest.raises(NumericalError, match="weights are not finite"):
        make(weight, scheme("w4a16", 32), torch.bfloat16)


def test_scales_that_overflow_their_type() -> None:
    with pytest.raises(NumericalError, match=r"overflow float16.*bfloat16"):
        minmax_grid(torch.full((2, 32), 1e6), scheme("w3a16", 32, symmetric=True), torch.float16)


@pytest.mark.parametrize(("columns", "fix"), [(576, "group_size to 64"), (96, "group_size to 32"), (100, "to 0")])
def test_a_group_size_that_does_not_divide_names_one_that_does(columns: int, fix: str) -> None:
    with pytest.raises(UnsupportedLayer, match=f"rows of {columns} .* groups of 128: set .*{fix}"):
        minmax_grid(torch.ones(2, columns), scheme("w4a16", 128), torch.bfloat16)
