"""What a router sees of an image."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from moqe.data.preprocessing import Preprocessing
from moqe.errors import ModelError
from moqe.models.image_features import FEATURES, backbone_features, pooling, stem_features
from moqe.models.image_shared import STEM, ImageShared, read_image_shared, write_image_shared
from moqe.runtimes.onnx import OnnxRuntime


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 4, 3, padding=1)
        self.head = nn.Linear(4, 5)
        self.unused = nn.Conv2d(3, 3, 1)
        self.runs = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.second(self.first(x).relu())
        self.runs += 1
        return self.head(hidden.mean((2, 3)))


def test_stem_is_the_pooled_first_stage_and_runs_nothing_after_it() -> None:
    network, pixels = Small().eval(), torch.randn(2, 3, 64, 64)
    found = stem_features(network, "first", pixels)
    assert network.runs == 0
    grid = 16  # 8 * 16 * 16 = 2048, so of 64 rows every second is looked at, and two are averaged
    assert found.shape == (2, FEATURES)
    by_hand = network.first(pixels).relu()[:, :, ::2, ::2].reshape(2, 8, grid, 2, grid, 2).mean((3, 5)).flatten(1)
    assert torch.allclose(found, by_hand, atol=1e-6)


@pytest.mark.parametrize(("side", "stride"), [(64, 1), (65, 2), (67, 2), (8, 1), (9, 3)])
def test_the_stem_in_the_folder_computes_only_what_is_looked_at(side: int, stride: int, tmp_path: Path) -> None:
    network, pixels = Small().eval(), torch.randn(2, 3, side, side)
    network.first = nn.Conv2d(3, 8, 3, stride=stride, padding=1)
    shared = ImageShared(("a", "b"), {"base": Preprocessing(None, (side, side), (0.5,) * 3, (0.5,) * 3)})
    write_image_shared(tmp_path, shared, network, "first", (3, side, side))
    assert read_image_shared(tmp_path) == shared
    found = OnnxRuntime(tmp_path / STEM).logits(pixels)
    assert torch.allclose(found, stem_features(network, "first", pixels), atol=1e-5)


def test_pooling_is_torchs() -> None:
    stage = torch.rand(2, 8, 28, 13)
    rows, columns = pooling(28, 5), pooling(13, 5)
    by_torch = nn.functional.adaptive_avg_pool2d(stage, 5)
    assert torch.allclose(rows @ stage @ columns.T, by_torch, atol=1e-6)


def test_the_grid_is_never_finer_than_the_map() -> None:
    assert stem_features(Small().eval(), "first", torch.randn(1, 3, 5, 7)).shape == (1, 8 * 5 * 5)


def test_backbone_is_the_input_of_the_head() -> None:
    network, pixels = Small().eval(), torch.randn(3, 3, 8, 8)
    found = backbone_features(network, "head", pixels)
    assert torch.equal(network.head(found), network(pixels))


def test_a_module_that_does_not_run() -> None:
    network = Small().eval()
    with pytest.raises(ModelError, match="does not run its module unused"):
        stem_features(network, "unused", torch.randn(1, 3, 8, 8))
    assert not network.unused._forward_hooks
