import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moqe.methods.ggml_search import (
    Blocks,
    reciprocal,
    search_scale,
    search_scale_and_minimum,
    to_half,
    to_half_scale,
    tree_sum,
)


def heavy_tailed(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).exp()


def test_tree_sum_adds_and_does_not_depend_on_neighbours():
    values = heavy_tailed((32, 3, 101), seed=0)
    whole = tree_sum(values)
    assert torch.allclose(whole, values.sum(0), atol=1e-4)
    assert torch.equal(tree_sum(values[:, :, 40:47]), whole[:, 40:47])


def test_to_half_saturates():
    assert to_half(torch.tensor([1e-12, 0.0, 1e9, -1e9])).tolist() == [0.0, 0.0, 65504.0, -65504.0]


def test_scales_that_are_not_zero_stay_so():
    assert to_half_scale(torch.tensor([1e-12, -1e-12, 0.0, 1e9])).tolist() == [2**-24, -(2**-24), 0.0, 65504.0]


def test_reciprocal_of_nothing_is_nothing():
    assert reciprocal(torch.tensor([4.0, 0.0, -1e-35])).tolist() == [0.25, 0.0, 0.0]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), weighted=st.booleans())
def test_scale_beats_every_scale_it_was_offered(seed, weighted):
    x = heavy_tailed((16, 4, 5), seed)
    blocks = Blocks(x, heavy_tailed((16, 4, 5), seed + 1).abs() + 0.01 if weighted else None, -4, 3)
    found = blocks.error(search_scale(blocks, (0.6, 0.8, 1.0), stored=False), None)
    cover = torch.maximum(x.amax(0) / 3, -x.amin(0) / 4)
    for span in (0.6, 0.8, 1.0):
        assert (found <= blocks.error(cover * span, None) * (1 + 1e-6)).all()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), weighted=st.booleans())
def test_scale_and_minimum_beat_the_extremes(seed, weighted):
    x = heavy_tailed((32, 4, 5), seed) + 3.0
    blocks = Blocks(x, heavy_tailed((32, 4, 5), seed + 1).abs() + 0.01 if weighted else None, 0, 15)
    low, high = x.amin(0), x.amax(0)
    found = blocks.error(*search_scale_and_minimum(blocks, ((0.8, 0.5), (1.0, 0.5)), stored=True))
    # Rounding the pair to float16 costs a little.
    assert (found <= blocks.error((high - low) / 15, -low) * 1.02).all()


def test_stored_scales_are_float16s_numbers():
    blocks = Blocks(heavy_tailed((32, 1, 50), seed=3), None, -8, 7)
    scale = search_scale(blocks, (0.7, 0.9, 1.0), stored=True)
    assert torch.equal(scale, scale.to(torch.float16).to(torch.float32))


def test_minimum_of_a_super_block_is_never_negative():
    blocks = Blocks(heavy_tailed((32, 8, 50), seed=4) + 1.0, None, 0, 15)
    scale, minimum = search_scale_and_minimum(blocks, ((0.7, 0.0), (0.7, 1.0), (1.0, 0.5)), stored=False)
    assert float(minimum.min()) == 0.0
    assert float(scale.min()) > 0.0
    assert (blocks.error(scale, minimum) < 0.1 * blocks.x.square().sum(0)).all()


@pytest.mark.parametrize("value", [0.37, -0.37])
@pytest.mark.parametrize("stored", [False, True])
def test_equal_weights_are_reached(value, stored):
    blocks = Blocks(torch.full((32, 2, 3), value), None, 0, 15)
    error = blocks.error(*search_scale_and_minimum(blocks, ((0.7, 0.0), (1.0, 0.5)), stored))
    assert error.max() < 32 * (value * 0.001) ** 2


@pytest.mark.parametrize("offset", [0.0, 1000.0, -1000.0])
def test_large_common_offset_costs_no_precision(offset):
    x = heavy_tailed((32, 1, 20), seed=5)
    spans = ((0.8, 0.0), (0.8, 1.0), (1.0, 0.5))
    plain, raised = Blocks(x, None, 0, 15), Blocks(x + offset, None, 0, 15)
    expected = plain.error(*search_scale_and_minimum(plain, spans, stored=True)).sum()
    found = raised.error(*search_scale_and_minimum(raised, spans, stored=True)).sum()
    assert found <= expected + 32 * 20 * 0.25**2  # half of float16's step at 1000, in the minimum
