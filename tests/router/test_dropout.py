import pytest
import torch
from torch.nn import functional

from moqe.router.dropout import attention, dropout


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_elements_are_dropped_at_the_rate_and_the_mean_is_kept(rate):
    torch.manual_seed(0)
    x = torch.rand(403, 1001) + 0.5
    y = dropout(x, rate, True)
    kept = y != 0
    error = (rate * (1 - rate) / x.numel()) ** 0.5
    assert abs(float(kept.float().mean()) - (1 - rate)) < 4 * error
    torch.testing.assert_close(y[kept], x[kept] / (1 - rate), rtol=1e-4, atol=0.0)


def test_every_lane_of_the_random_bits_drops_and_neighbours_are_independent():
    torch.manual_seed(1)
    zero = (dropout(torch.ones(100_000, 4), 0.3, True) == 0).float()  # four elements share 64 bits
    torch.testing.assert_close(zero.mean(0), torch.full((4,), 0.3), rtol=0.0, atol=0.01)
    torch.testing.assert_close(zero.T @ zero / len(zero), 0.09 + 0.21 * torch.eye(4), rtol=0.0, atol=0.01)


def test_the_gradient_is_that_of_the_mask():
    torch.manual_seed(2)
    x = torch.randn(3, 5, requires_grad=True)
    y = dropout(x, 0.4, True)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient * x, y)


def test_nothing_happens_outside_training_or_at_rate_zero():
    x = torch.randn(7)
    assert dropout(x, 0.5, False) is x
    assert dropout(x, 0.0, True) is x


def test_the_callers_seed_decides():
    x = torch.ones(1001)
    masks = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        masks.append(dropout(x, 0.5, True))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_types_and_shapes_are_kept(dtype):
    x = torch.ones(3, 1, 7, dtype=dtype)
    y = dropout(x, 0.2, True)
    assert (y.dtype, y.shape) == (dtype, x.shape)


def test_attention_is_torchs_where_almost_nothing_is_dropped():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 6, 8).unbind(0)
    expected = functional.scaled_dot_product_attention(query, key, value)
    assert torch.equal(attention(query, key, value, 0.5, False), expected)
    torch.testing.assert_close(attention(query, key, value, 2**-16, True), expected, rtol=1e-3, atol=1e-4)


def test_attention_weights_are_dropped_and_not_whole_tokens():
    torch.manual_seed(0)
    query, key = torch.zeros(2, 1, 1, 64, 4).unbind(0)  # every weight is 1 / 64
    value = torch.eye(64).view(1, 1, 64, 64)  # so that the output is the weights
    weights = attention(query, key, value, 0.25, True)[0, 0]
    dropped = (weights == 0).float()
    assert 0.1 < float(dropped.mean(0).min()) < float(dropped.mean(0).max()) < 0.5
    torch.testing.assert_close(weights[weights > 0], torch.full_like(weights[weights > 0], 1 / 48))
