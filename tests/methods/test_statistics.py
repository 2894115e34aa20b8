"""Second moments: batches add up to what all tokens at once give, whatever strips H is computed in."""

import pytest
import torch

from moqe.methods.statistics import accumulate


@pytest.mark.parametrize("columns", [1, 31, 192, 193, 500, 1700])  # one strip, a narrow last one, more than eight
def test_batches_add_up_and_h_is_symmetric(columns: int):
    inputs = torch.randn(96, columns, generator=torch.Generator().manual_seed(columns))
    total = None
    for part in inputs.split([50, 1, 45]):
        total = accumulate(total, part)
    assert total is not None
    expected = inputs.double().T @ inputs.double()
    torch.testing.assert_close(total.hessian.double(), expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(total.hessian, total.hessian.T)
    assert torch.equal(total.absmax, inputs.abs().amax(0))
    torch.testing.assert_close(total.abssum, inputs.abs().sum(0))
    assert total.tokens == 96
