"""What a run is seen to do with its tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from moqe.errors import ModelError
from moqe.models.observation import observe


class Net(nn.Module):
    """A linear layer and whatever a function does around it."""

    def __init__(self, forward) -> None:
        super().__init__()
        self.linear, self._forward = nn.Linear(4, 4), forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


EXAMPLE = torch.ones(2, 4)


def functions(run) -> list[tuple[str, str]]:
    return [(operation.function, operation.module) for operation in run.operations]


def test_operations_and_the_modules_at_work():
    run = observe(Net(lambda m, x: functional.relu(m.linear(x) * 2)), EXAMPLE)
    assert functions(run) == [("linear", "linear"), ("mul", ""), ("relu", "")]
    assert [operation.weights for operation in run.operations] == [("linear.weight", "linear.bias"), (), ()]
    assert [operation.nonnegative for operation in run.operations][2]
    whole, linear = run.calls
    assert (whole.name, linear.name) == ("", "linear")
    assert whole.source == linear.source == run.operations[0].reads[0]
    assert linear.result == run.operations[0].makes[0] == run.operations[1].reads[0]
    assert whole.result == run.operations[2].makes[0]
    assert linear.input_shape == (2, 4)
    assert linear.input_nonnegative


def test_what_works_in_place_makes_another_tensor():
    run = observe(Net(lambda m, x: functional.relu(m.linear(x), inplace=True) + 1), EXAMPLE)
    made, read = run.operations[1].makes[0], run.operations[1].reads[0]
    assert made[0] == read[0]
    assert made != read
    assert [operation.function for operation in run.readers(read)] == ["relu"]
    assert [operation.function for operation in run.readers(made)] == ["add"]


def test_writing_into_a_tensor_reads_what_is_written():
    def forward(m: Net, x: Tensor) -> Tensor:
        y, z = m.linear(x), torch.zeros(2, 8)
        z[:, :4] = y
        return z

    run = observe(Net(forward), EXAMPLE)
    assert ("__setitem__", "") in functions(run)
    assert [operation.function for operation in run.readers(run.calls[1].result)] == ["__setitem__"]


def test_tensors_inside_lists_are_seen():
    run = observe(Net(lambda m, x: torch.cat([x, m.linear(x)], 1)), EXAMPLE)
    assert run.operations[1].reads == (run.calls[0].source, run.calls[1].result)


def test_asking_for_a_shape_is_no_operation():
    run = observe(Net(lambda m, x: x.reshape(x.shape[0], x.size(1))), EXAMPLE)
    assert functions(run) == [("reshape", "")]


def test_a_failure_is_explained_and_leaves_no_hooks():
    network = Net(lambda m, x: m.linear(x[:, :3]))
    with pytest.raises(ModelError, match=r"Net cannot run on images of shape \(2, 4\) \(mat1 and mat2"):
        observe(network, EXAMPLE)
    assert not network._forward_hooks
    assert not network.linear._forward_pre_hooks
