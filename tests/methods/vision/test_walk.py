"""From block to block: an output is carried on only where it is the next input, untouched."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from small_classifier import SIDE, Setting
from torch import Tensor, nn

from moqe.methods.vision.walk import followers, inputs_of, outputs_of

Between = Callable[[nn.Module, Tensor], Tensor]


class Pair(nn.Module):
    """Two convolutions and what is done between them."""

    def __init__(self, between: Between) -> None:
        super().__init__()
        self.between = between
        self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.between(self, x)


def a_chain(net: nn.Module, x: Tensor) -> Tensor:
    return net.second(net.first(x))


def with_a_function(net: nn.Module, x: Tensor) -> Tensor:
    return net.second(net.first(x).relu())


def written_to(net: nn.Module, x: Tensor) -> Tensor:
    return net.second(net.first(x).relu_())


def on_branches(net: nn.Module, x: Tensor) -> Tensor:
    return net.first(x) + net.second(x)


def written_to_later(net: nn.Module, x: Tensor) -> Tensor:
    middle = net.first(x)
    result = net.second(middle)
    return result + middle.relu_()


@pytest.mark.parametrize(
    ("between", "follows"),
    [(a_chain, True), (with_a_function, False), (written_to, False), (on_branches, False), (written_to_later, True)],
)
def test_who_follows(between: Between, follows: bool) -> None:
    network = Pair(between).requires_grad_(False)
    x = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    assert followers(network, ("first", "second"), x) == ({"second"} if follows else set())


def test_blocks_of_a_residual_network_follow_each_other(setting: Setting) -> None:
    pixels = setting.images.pixels[:2]
    assert followers(setting.network, setting.blocks, pixels) == {"depthwise", "widen"}
    for last, block in (("plain", "depthwise"), ("depthwise", "widen")):
        before, expected = (inputs_of(setting.network, name, setting.images) for name in (last, block))
        assert torch.equal(outputs_of(setting.network.get_submodule(last), before), expected)


def test_inputs_are_found_without_running_what_lies_behind(setting: Setting) -> None:
    ran = []
    handle = setting.network.get_submodule("linear").register_forward_hook(lambda *_: ran.append(1))
    found = inputs_of(setting.network, "widen", setting.images)
    handle.remove()
    assert found.shape == (len(setting.images), 8, SIDE, SIDE)
    assert ran == []
