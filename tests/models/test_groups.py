from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moqe.errors import ModelError
from moqe.models.decoder import Decoder
from moqe.models.discovery import find_groups
from moqe.models.groups import LinearGroup, changed_tensors, fold, reduce_scale

Saved = Callable[[str], Path]
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATED = ("mlp.gate_proj", "mlp.up_proj")


def groups_of(decoder: Decoder, index: int = 1) -> tuple[LinearGroup, ...]:
    probe = torch.randn(1, 16, 256, generator=torch.Generator().manual_seed(1))
    return find_groups(decoder.load_block(index), probe, decoder.block_inputs(probe)[index], f"block {index}")


def summary(groups: tuple[LinearGroup, ...]) -> list[tuple[tuple[str, ...], str | None, str]]:
    return [(group.names, group.source, group.kind) for group in groups]


def some_scale(group: LinearGroup, size: int) -> Tensor:
    return reduce_scale(group, torch.empty(size).uniform_(-2, 2, generator=torch.Generator().manual_seed(5)).exp())


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mistral"])
def test_groups_of_the_supported_families(saved: Saved, architecture: str) -> None:
    assert summary(groups_of(Decoder.open(str(saved(architecture))))) == [
        (ATTENTION, "input_layernorm", "norm"),
        (("self_attn.o_proj",), "self_attn.v_proj", "value"),
        (GATED, "post_attention_layernorm", "norm"),
        (("mlp.down_proj",), "mlp.up_proj", "linear"),
    ]


def test_norms_that_multiply_by_one_plus_weight_are_no_sources(saved: Saved) -> None:
    sources = {group.names: group.source for group in groups_of(Decoder.open(str(saved("gemma"))))}
    assert sources[ATTENTION] is None
    assert sources[GATED] is None
    assert sources[("mlp.down_proj",)] == "mlp.up_proj"


def test_layer_norms_with_biases_are_sources(saved: Saved) -> None:
    groups = groups_of(Decoder.open(str(saved("opt"))))
    assert summary(groups)[0] == (ATTENTION, "self_attn_layer_norm", "norm")
    assert changed_tensors(Decoder.open(str(saved("opt"))).load_block(0), groups[0])[-2:] == (
        "self_attn_layer_norm.weight",
        "self_attn_layer_norm.bias",
    )


def test_value_rows_follow_the_repeated_heads(saved: Saved) -> None:
    group = groups_of(Decoder.open(str(saved("qwen3"))))[1]  # 4 heads of 32 on 2 key-value heads
    first, second = range(32), range(32, 64)
    assert group.rows == (*first, *first, *second, *second)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mistral", "opt"])
def test_folding_any_group_leaves_the_logits(saved: Saved, architecture: str) -> None:
    decoder = Decoder.open(str(saved(architecture)))
    model = decoder.full()
    tokens = torch.randint(0, 512, (2, 20), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        before = model(tokens).logits
        folded = 0
        for index, name in enumerate(decoder.block_names):
            block = model.get_submodule(name)
            for group in groups_of(decoder, index):
                if group.source is not None:
                    width = block.get_parameter(f"{group.key}.weight").shape[1]
                    fold(block, group, some_scale(group, width))
                    folded += 1
        after = model(tokens).logits
    assert folded >= 6
    assert float((after - before).norm() / before.norm()) < 1e-4
    assert not torch.equal(after, before)


def test_fold_changes_what_it_says_and_nothing_else(saved: Saved) -> None:
    decoder = Decoder.open(str(saved("qwen2")))
    for group in groups_of(decoder):
        block = decoder.load_block(1)
        before = {name: p.detach().clone() for name, p in block.named_parameters()}
        width = block.get_parameter(f"{group.key}.weight").shape[1]
        fold(block, group, some_scale(group, width))
        changed = {name for name, p in block.named_parameters() if not torch.equal(p, before[name])}
        assert changed == set(changed_tensors(block, group))
        decoder.release_block(1)


def test_finding_groups_leaves_the_block_as_it_was(saved: Saved) -> None:
    decoder = Decoder.open(str(saved("qwen2")))
    before = {name: p.detach().clone() for name, p in decoder.load_block(1).named_parameters()}
    decoder.release_block(1)
    groups_of(decoder)
    block = decoder._blocks[1]
    assert all(torch.equal(p, before[name]) for name, p in block.named_parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in block.modules())


def test_groups_do_not_depend_on_the_precision(saved: Saved) -> None:
    folder = str(saved("llama"))
    assert groups_of(Decoder.open(folder, dtype=torch.bfloat16)) == groups_of(Decoder.open(folder))


def test_zeros_have_the_same_groups_of_linears(saved: Saved) -> None:
    folder = str(saved("llama"))
    assert [g.names for g in groups_of(Decoder.dry(folder))] == [g.names for g in groups_of(Decoder.open(folder))]


def test_reduced_scale_is_the_geometric_mean_of_what_shares_a_row() -> None:
    group = LinearGroup(("o",), "v", "value", (0, 1, 0, 1))
    scale = reduce_scale(group, torch.tensor([1.0, 2.0, 4.0, 8.0]))
    torch.testing.assert_close(scale, torch.tensor([2.0, 4.0, 2.0, 4.0]))
    torch.testing.assert_close(reduce_scale(group, scale), scale)


def test_fold_refuses_what_cannot_be_folded() -> None:
    block = nn.ModuleDict({"o": nn.Linear(4, 4), "v": nn.Linear(4, 2)})
    with pytest.raises(ValueError, match="no source"):
        fold(block, LinearGroup(("o",)), torch.ones(4))
    with pytest.raises(ValueError, match="reduce_scale"):
        fold(block, LinearGroup(("o",), "v", "value", (0, 1, 0, 1)), torch.tensor([1.0, 1.0, 2.0, 1.0]))


class Norm(nn.Module):
    """A root mean square norm; `offset` 1 is Gemma's."""

    def __init__(self, size: int, offset: float = 0.0) -> None:
        super().__init__()
        self.weight, self.offset = nn.Parameter(torch.rand(size) + 0.5), offset

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (self.offset + self.weight)


class Block(nn.Module):
    """A block made of a function over its modules."""

    def __init__(self, modules: dict[str, nn.Module], run: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.run = run

    def forward(self, hidden: Tensor) -> tuple[Tensor]:
        return (self.run(self, hidden),)


def sources(block: nn.Module) -> dict[str, tuple[str | None, str]]:
    return {group.key: (group.source, group.kind) for group in find_groups(block, torch.randn(1, 16, 8), {})}


@pytest.mark.parametrize(("offset", "source"), [(0.0, "norm"), (1.0, None)])
def test_norm_with_an_offset(offset: float, source: str | None) -> None:
    block = Block({"norm": Norm(8, offset), "up": nn.Linear(8, 8)}, lambda self, x: x + self.up(self.norm(x)))
    assert sources(block)["up"][0] == source


def test_norm_that_also_feeds_the_residual() -> None:
    def run(self: Any, x: Tensor) -> Tensor:
        normed: Tensor = self.norm(x)
        return normed + self.up(normed)

    assert sources(Block({"norm": Norm(8), "up": nn.Linear(8, 8)}, run))["up"] == (None, "none")


def test_linear_under_a_nonlinearity_is_no_source_and_one_beside_it_is() -> None:
    def run(self: Any, x: Tensor) -> Tensor:
        return x + self.down(self.up(x) * torch.nn.functional.silu(self.gate(x)))  # the gate runs last here

    linears: dict[str, nn.Module] = {"gate": nn.Linear(8, 12), "up": nn.Linear(8, 12), "down": nn.Linear(12, 8)}
    assert sources(Block(linears, run))["down"] == ("up", "linear")
    assert sources(Block(linears, lambda self, x: x + self.down(torch.tanh(self.up(x * self.gate(x).mean()))))) == {
        "gate": (None, "none"),
        "up": (None, "none"),
        "down": (None, "none"),
    }


def test_permuted_channels_are_followed() -> None:
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    linears: dict[str, nn.Module] = {"up": nn.Linear(8, 12), "down": nn.Linear(12, 8)}
    block = Block(linears, lambda self, x: x + self.down(self.up(x)[..., order]))
    (_, group) = find_groups(block, torch.randn(1, 16, 8), {})
    assert group.rows == tuple(order.tolist())


def test_input_changed_in_place_between_two_linears_is_not_shared() -> None:
    def run(self: Any, x: Tensor) -> Tensor:
        y = x.clone()
        first: Tensor = self.a(y)
        return first + self.b(y.mul_(2))

    block = Block({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)}, run)
    assert [group.names for group in find_groups(block, torch.randn(1, 16, 8), {})] == [("a",), ("b",)]


@pytest.mark.parametrize(("times", "run"), [(0, lambda self, x: x), (2, lambda self, x: x + self.up(self.up(x)))])
def test_linears_must_run_once(times: int, run: Callable[[Any, Tensor], Tensor]) -> None:
    with pytest.raises(ModelError, match=rf"linear up of layer 7 runs {times} times"):
        find_groups(Block({"up": nn.Linear(8, 8)}, run), torch.randn(1, 16, 8), {}, "layer 7")
