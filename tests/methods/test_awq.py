"""awq: the loss from second moments is the loss from activations, and both searches win on it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moqe.methods.awq import Awq, channel_scale, search_clipping, search_scale
from moqe.methods.grids import clipped_grid, minmax_grid, round_to_grid
from moqe.methods.output_error import output_error
from moqe.methods.statistics import accumulate
from moqe.recipe import Expert
from moqe.schemes import Scheme, scheme

EXPERT = Expert(name="x", method="awq", scheme="w4a16")


def salient_inputs(seed: int, tokens: int = 300, columns: int = 64) -> Tensor:
    """A few channels a hundred times larger than the others: what awq is for."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(tokens, columns, generator=generator)
    inputs[:, torch.randperm(columns, generator=generator)[:3]] *= 100
    return inputs


def weights(seed: int, *rows: int, columns: int = 64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed + 100)
    return [torch.randn(count, columns, generator=generator) * 0.05 for count in rows]


def identity(scale: Tensor) -> Tensor:
    return scale


def rounded(weight: Tensor, scale: Tensor, wanted: Scheme) -> Tensor:
    scaled = weight * scale
    return round_to_grid(scaled, *minmax_grid(scaled, wanted, torch.float32), wanted).dequantize() / scale


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), alpha=st.floats(0.0, 0.99))
def test_loss_from_second_moments_equals_loss_from_activations(seed: int, alpha: float) -> None:
    inputs, (weight,) = salient_inputs(seed), weights(seed, 16)
    statistics = accumulate(None, inputs)
    change = rounded(weight, channel_scale(statistics.absmean, alpha), scheme("w4a16", 32)) - weight
    raw = float((inputs.double() @ change.double().T).square().sum())
    assert output_error(change, statistics.hessian) == pytest.approx(raw, rel=1e-4)


def test_the_scale_is_the_best_of_the_grid() -> None:
    wanted = scheme("w4a16", 32)
    inputs, group = salient_inputs(1), weights(1, 16, 8)
    statistics = accumulate(None, inputs)
    scale, alpha = search_scale(group, statistics, wanted, 20, identity)
    raw = []
    for point in range(20):
        candidate = channel_scale(statistics.absmean, point / 20)
        raw.append(sum(float((inputs @ (rounded(w, candidate, wanted) - w).T).double().square().sum()) for w in group))
    assert alpha == min(range(20), key=lambda point: raw[point]) / 20
    torch.testing.assert_close(scale, channel_scale(statistics.absmean, alpha))
    assert min(raw) < 0.6 * raw[0]


def test_alpha_zero_is_no_scale_and_extremes_multiply_to_one() -> None:
    absmean = torch.tensor([0.01, 1.0, 50.0, 0.0])
    torch.testing.assert_close(channel_scale(absmean, 0.0), torch.ones(4))
    scale = channel_scale(absmean, 0.7)
    assert float(scale.max() * scale.min()) == pytest.approx(1.0, rel=1e-5)
    assert bool(torch.isfinite(scale).all())
    assert bool((scale > 0).all())


def test_candidates_are_measured_as_they_will_be_folded() -> None:
    def halves(scale: Tensor) -> Tensor:
        return scale.view(2, -1).log().mean(0).exp().repeat(2)

    statistics = accumulate(None, salient_inputs(2))
    scale, _ = search_scale(weights(2, 16), statistics, scheme("w4a16", 32), 10, halves)
    torch.testing.assert_close(scale[:32], scale[32:])


@pytest.mark.parametrize("group_size", [32, 0])
def test_clipping_is_the_best_step_of_every_group_under_its_block_of_h(group_size: int) -> None:
    wanted = scheme("w4a16", group_size)
    width = group_size or 64
    inputs, (weight,) = salient_inputs(3), weights(3, 10)
    weight[0, 5] = 1.0
    hessian = accumulate(None, inputs).hessian
    shrink = search_clipping(weight, hessian, wanted, torch.bfloat16, 10, 0.5)

    def group_errors(share: Tensor) -> Tensor:
        change = round_to_grid(weight, *clipped_grid(weight, share, wanted, torch.bfloat16), wanted).dequantize()
        change = (change - weight).view(10, -1, width)
        grouped = inputs.view(len(inputs), -1, width)
        return torch.einsum("tgi,rgi->rgt", grouped, change).double().square().sum(-1)  # (out, groups)

    best = group_errors(shrink)
    for step in range(10):
        assert bool((best <= group_errors(torch.full_like(shrink, 1 - 0.05 * step)) * (1 + 1e-3)).all())
    assert float(shrink.min()) < 1.0
    assert float(shrink.min()) >= 0.55 - 1e-6


def test_chunks_of_rows_do_not_change_the_clipping(monkeypatch: pytest.MonkeyPatch) -> None:
    (weight,), hessian = weights(4, 10), accumulate(None, salient_inputs(4)).hessian
    arguments = (weight, hessian, scheme("w4a16", 32), torch.bfloat16, 10, 0.5)
    whole = search_clipping(*arguments)
    monkeypatch.setattr("moqe.methods.awq.CHUNK_ELEMENTS", 64 * 3)
    torch.testing.assert_close(search_clipping(*arguments), whole)


@pytest.mark.parametrize("symmetric", [True, False])
def test_scaled_and_clipped_beats_rounding(symmetric: bool) -> None:
    wanted = scheme("w4a16", 32, symmetric=symmetric)
    statistics, (weight,) = accumulate(None, salient_inputs(5)), weights(5, 24)
    notes: dict[str, float] = {}
    scale = Awq().smooth([weight], statistics, wanted, EXPERT, identity, notes)
    tensor = Awq().quantize(weight * scale, statistics.scaled_inputs(scale), wanted, EXPERT, torch.bfloat16, notes)
    ours = output_error(tensor.dequantize() / scale - weight, statistics.hessian)
    plain = round_to_grid(weight, *minmax_grid(weight, wanted, torch.bfloat16), wanted).dequantize()
    assert ours < 0.5 * output_error(plain - weight, statistics.hessian)
    assert 0 < notes["alpha"] < 1
    assert 0.5 < notes["kept_range"] <= 1


def test_clipping_can_be_left_out() -> None:
    (weight,), wanted = weights(6, 8), scheme("w4a16", 32)
    expert = EXPERT.model_copy(update={"awq": EXPERT.awq.model_copy(update={"clip": False})})
    tensor = Awq().quantize(weight, None, wanted, expert, torch.bfloat16, {})
    expected = round_to_grid(weight, *minmax_grid(weight, wanted, torch.bfloat16), wanted)
    assert torch.equal(tensor.codes, expected.codes)


def test_silent_inputs_do_no_harm() -> None:
    statistics, (weight,) = accumulate(None, torch.zeros(5, 64)), weights(7, 8)
    scale, alpha = search_scale([weight], statistics, scheme("w4a16", 32), 5, identity)
    assert alpha == 0.0
    torch.testing.assert_close(scale, torch.ones(64))


def test_other_schemes_are_refused_with_the_fix() -> None:
    assert "imatrix" in Awq().supports(scheme("q4_k"))
    assert "smoothquant" in Awq().supports(scheme("w8a8"))
    assert Awq().supports(scheme("w3a16")) == ""
