"""gptq: equal to the textbook's loop, never worse than rounding, and honest about matrices it cannot factorise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moqe.errors import NumericalError, UnsupportedLayer
from moqe.methods.gptq import Gptq, factorise, gptq
from moqe.methods.grids import minmax_grid, round_to_grid, searched_grid
from moqe.methods.output_error import output_error
from moqe.methods.statistics import InputStatistics, accumulate
from moqe.quantized import IntegerTensor
from moqe.recipe import Expert
from moqe.recipe import Gptq as Options
from moqe.schemes import Scheme, scheme


def correlated_inputs(seed: int, tokens: int = 400, columns: int = 96) -> Tensor:
    """Inputs with channels of very different size, mixed as an activation's are."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) * 0.3 + torch.eye(columns)
    size = torch.randn(columns, generator=generator).exp()
    return (torch.randn(tokens, columns, generator=generator) @ mixing) * size


def layer(seed: int, rows: int = 24, columns: int = 96) -> tuple[Tensor, InputStatistics]:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed + 500)) * 0.05
    return weight, accumulate(None, correlated_inputs(seed, columns=columns))


def run(weight: Tensor, statistics: InputStatistics, wanted: Scheme, **options: object) -> IntegerTensor:
    chosen = Options(**options)
    factor = factorise(statistics.hessian, chosen.damping, chosen.activation_order)
    return gptq(weight, factor, statistics.importance, wanted, torch.float32, chosen)


def naive(
    weight: Tensor, hessian: Tensor, scale: Tensor, zero: Tensor | None, wanted: Scheme, options: Options
) -> Tensor:
    """Algorithm 1 with the inverse of H downdated column by column, in float64: no Cholesky factor, no blocks."""
    columns = weight.shape[1]
    width = wanted.group_size or columns
    h = hessian.double().clone()
    h += options.damping * h.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    remaining = list(range(columns))
    if options.activation_order:
        remaining = torch.argsort(hessian.diagonal(), descending=True, stable=True).tolist()
    w, result = weight.double().clone(), torch.zeros_like(weight)
    while remaining:
        column = remaining[0]
        inverse = torch.linalg.inv(h[remaining][:, remaining])
        group = column // width
        step = scale[:, group].double()
        offset = torch.zeros_like(step) if zero is None else zero[:, group].double()
        code = ((w[:, column] / step).round() + offset).clamp(*wanted.levels)
        rounded = (code - offset) * step
        result[:, column] = rounded.float()
        error = (w[:, column] - rounded) / inverse[0, 0]
        w[:, remaining] -= error[:, None] * inverse[0][None, :]
        remaining = remaining[1:]
    return result


@pytest.mark.parametrize("name", ["w4a16", "w3a16"])
@pytest.mark.parametrize("activation_order", [True, False])
@pytest.mark.parametrize("group_size", [32, 0])
@pytest.mark.parametrize("block_columns", [128, 20])
def test_equals_the_naive_reference(name: str, activation_order: bool, group_size: int, block_columns: int) -> None:
    wanted = scheme(name, group_size)
    weight, statistics = layer(1)
    options = Options(activation_order=activation_order, block_columns=block_columns)
    ours = run(weight, statistics, wanted, **options.model_dump())
    reference = naive(weight, statistics.hessian, ours.scale, ours.zero_point, wanted, options)
    torch.testing.assert_close(ours.dequantize(), reference, rtol=1e-4, atol=1e-4 * float(weight.abs().max()))


@pytest.mark.parametrize("grid", ["searched", "minmax"])
def test_with_activation_order_grids_come_from_the_original_weights(grid: str) -> None:
    wanted = scheme("w4a16", 32)
    weight, statistics = layer(2)
    make = minmax_grid if grid == "minmax" else lambda *arguments: searched_grid(*arguments, statistics.importance)
    assert torch.equal(run(weight, statistics, wanted, grid=grid).scale, make(weight, wanted, torch.float32)[0])


def test_in_natural_order_a_later_group_gets_a_grid_for_its_compensated_weights() -> None:
    wanted = scheme("w4a16", 32)
    weight, statistics = layer(3)
    ours = run(weight, statistics, wanted, activation_order=False, grid="minmax")
    fixed = minmax_grid(weight, wanted, torch.float32)[0]
    assert torch.equal(ours.scale[:, 0], fixed[:, 0])
    assert not torch.equal(ours.scale[:, 1], fixed[:, 1])


@pytest.mark.parametrize("name", ["w2a16", "w3a16", "w4a16", "w8a16"])
@pytest.mark.parametrize("seed", range(4))
def test_output_error_never_above_rounding_on_the_same_grid(name: str, seed: int) -> None:
    wanted = scheme(name, 32)
    weight, statistics = layer(seed)
    ours = run(weight, statistics, wanted)
    rounded = round_to_grid(weight, ours.scale, ours.zero_point, wanted)
    gptq_error = output_error(ours.dequantize() - weight, statistics.hessian)
    rounding_error = output_error(rounded.dequantize() - weight, statistics.hessian)
    assert gptq_error < 0.8 * rounding_error


def test_more_bits_are_never_worse() -> None:
    weight, statistics = layer(4)
    errors = [
        output_error(run(weight, statistics, scheme(name, 32)).dequantize() - weight, statistics.hessian)
        for name in ("w2a16", "w3a16", "w4a16", "w8a16")
    ]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("activation_order", [True, False])
def test_uncorrelated_inputs_leave_plain_rounding(activation_order: bool) -> None:
    wanted = scheme("w4a16", 32)
    weight, _ = layer(5)
    statistics = InputStatistics(torch.eye(96) * 7, torch.ones(96), torch.ones(96), 7.0)
    ours = run(weight, statistics, wanted, activation_order=activation_order)
    expected = round_to_grid(weight, ours.scale, ours.zero_point, wanted)
    assert torch.equal(ours.codes, expected.codes)


def test_block_columns_only_change_speed() -> None:
    wanted = scheme("w3a16", 32)
    weight, statistics = layer(6)
    for activation_order in (True, False):
        results = [
            run(weight, statistics, wanted, block_columns=block, activation_order=activation_order).dequantize()
            for block in (1, 33, 96, 500)
        ]
        for other in results[1:]:
            torch.testing.assert_close(other, results[0], rtol=1e-4, atol=1e-5)


def test_rows_are_independent() -> None:
    wanted = scheme("w4a16", 32)
    weight, statistics = layer(7)
    whole = run(weight, statistics, wanted).dequantize()
    parts = torch.cat([run(part, statistics, wanted).dequantize() for part in (weight[:10], weight[10:])])
    torch.testing.assert_close(whole, parts, rtol=1e-5, atol=1e-6)


def test_dead_channels_are_rounded_and_counted() -> None:
    wanted = scheme("w4a16", 32)
    inputs = correlated_inputs(8)
    inputs[:, [3, 40]] = 0
    statistics, (weight, _) = accumulate(None, inputs), layer(8)
    notes: dict[str, float] = {}
    expert = Expert(name="x", method="gptq", scheme="w4a16")
    ours = Gptq().quantize(weight, statistics, wanted, expert, torch.bfloat16, notes)
    expected = round_to_grid(weight, ours.scale, None, wanted)
    assert notes == {"damping": 0.01, "dead_channels": 2.0}
    assert torch.equal(ours.codes[:, [3, 40]], expected.codes[:, [3, 40]])


def test_fewer_tokens_than_channels() -> None:
    weight, _ = layer(9)
    statistics = accumulate(None, correlated_inputs(9, tokens=10))
    ours = run(weight, statistics, scheme("w4a16", 32)).dequantize()
    assert output_error(ours - weight, statistics.hessian) < output_error(weight, statistics.hessian)


def test_the_factor_is_that_of_the_damped_inverse() -> None:
    _, statistics = layer(10)
    factor = factorise(statistics.hessian, 0.01, True)
    h = statistics.hessian.double()[factor.order][:, factor.order]
    mean = h.diagonal().mean()
    inverse = torch.linalg.inv(h / mean + 0.01 * torch.eye(96, dtype=torch.float64))
    upper = factor.upper.double()
    torch.testing.assert_close(upper.T @ upper, inverse, rtol=1e-3, atol=1e-4)
    assert torch.equal(upper, upper.triu())
    assert bool((statistics.hessian.diagonal()[factor.order].diff() <= 0).all())


def test_damping_grows_until_the_factorisation_works_and_is_noted() -> None:
    hessian = torch.eye(32)
    hessian[0, 1] = hessian[1, 0] = 1.05  # not positive definite: smallest eigenvalue -0.05
    factor = factorise(hessian, 0.01, True)
    assert factor.damping == pytest.approx(0.1)
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    notes: dict[str, float] = {}
    expert = Expert(name="x", method="gptq", scheme="w4a16")
    statistics = InputStatistics(hessian, torch.ones(32), torch.ones(32), 1.0)
    Gptq().quantize(weight, statistics, scheme("w4a16", 32), expert, torch.bfloat16, notes)
    assert notes["damping"] == pytest.approx(0.1)


def test_a_hopeless_matrix_names_the_knob() -> None:
    hessian = torch.eye(32)
    hessian[0, 1] = hessian[1, 0] = 1e6
    with pytest.raises(NumericalError, match="damping"):
        factorise(hessian, 0.01, True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_statistics_that_are_not_finite(bad: float) -> None:
    hessian = torch.eye(32)
    hessian[3, 3] = bad
    with pytest.raises(NumericalError, match="statistics are not finite"):
        factorise(hessian, 0.01, True)


def test_needs_statistics_and_a_dividing_group_size() -> None:
    expert = Expert(name="x", method="gptq", scheme="w4a16")
    weight, statistics = layer(11)
    with pytest.raises(NumericalError, match="needs calibration statistics"):
        Gptq().quantize(weight, None, scheme("w4a16", 32), expert, torch.bfloat16, {})
    with pytest.raises(UnsupportedLayer, match="set group_size to 32"):
        Gptq().quantize(weight, statistics, scheme("w4a16", 64), expert, torch.bfloat16, {})
    assert "imatrix" in Gptq().supports(scheme("q4_k"))
