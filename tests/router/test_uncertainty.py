import math

import pytest
import torch

from moqe.errors import NumericalError
from moqe.router.router import choose, realised_losses
from moqe.router.uncertainty import clustered_mean


def test_one_sample_per_document_is_the_usual_standard_error():
    values = torch.randn(30, generator=torch.Generator().manual_seed(0))
    mean = clustered_mean(values, [str(i) for i in range(30)])
    assert mean.value == pytest.approx(float(values.mean()))
    assert mean.standard_error == pytest.approx(float(values.std()) / math.sqrt(30), rel=1e-6)
    assert mean.documents == 30


def test_copies_inside_a_document_carry_no_information():
    values = torch.randn(10, generator=torch.Generator().manual_seed(1))
    once = clustered_mean(values, [str(i) for i in range(10)])
    copied = clustered_mean(values.repeat_interleave(5), [str(i // 5) for i in range(50)])
    assert copied.standard_error == pytest.approx(once.standard_error)


def test_by_hand():
    # documents {0, 2}, {4}: mean 2; sums of deviations -2 and 2; se^2 = 2 / 1 * 8 / 9
    assert clustered_mean(torch.tensor([0.0, 2.0, 4.0]), ["a", "a", "b"]).standard_error == pytest.approx(4 / 3)


def test_deviations_that_cancel_inside_documents_leave_no_uncertainty():
    assert clustered_mean(torch.tensor([0.0, 4.0, 1.0, 3.0]), ["a", "a", "b", "b"]).standard_error == 0.0


def test_one_document_says_nothing_about_others():
    assert clustered_mean(torch.tensor([1.0, 2.0]), ["a", "a"]).standard_error == math.inf


def test_choose_takes_the_first_of_the_lowest_and_refuses_what_is_not_a_number():
    costs = torch.tensor([[2.0, 1.0, 1.0], [-1.0, -1.0, -1.0], [3.0, 2.0, -torch.inf]])
    assert choose(costs).tolist() == [1, 0, 2]
    assert realised_losses(costs[:2], choose(costs[:2])).tolist() == [1.0, -1.0]
    with pytest.raises(NumericalError, match="not a number"):
        choose(torch.tensor([[1.0, torch.nan]]))
