"""Modules built without values."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moqe.models.valueless import Valueless


def linear() -> nn.Module:
    return nn.Linear(8, 4)


def convolution() -> nn.Module:
    return nn.Conv2d(3, 4, 3)


def encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)


def embedding() -> nn.Module:
    return nn.Embedding(10, 4)


@pytest.mark.parametrize("make", [linear, convolution, encoder_layer, embedding])
def test_parameters_have_no_values_and_draw_none(make) -> None:
    state = torch.random.get_rng_state()
    with Valueless():
        module = make()
    assert all(parameter.is_meta and parameter._version == 0 for parameter in module.parameters())  # nothing filled
    assert torch.equal(torch.random.get_rng_state(), state)
    filled = make().state_dict()
    module.load_state_dict(filled, assign=True)
    assert all(torch.equal(found, filled[name]) for name, found in module.state_dict().items())
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_what_is_computed_has_its_values() -> None:
    real = torch.zeros(3)
    with Valueless():
        nn.init.ones_(real)
        real.mul_(2).add_(torch.arange(3.0))
        made = torch.full((2,), 7.0).fill_(5.0)
    assert real.tolist() == [2.0, 3.0, 4.0]
    assert made.tolist() == [5.0, 5.0]
