"""A block for one expert: folded, rounded, recorded; and what happens to layers a method cannot do."""

from __future__ import annotations

import copy
import json
import logging

import pytest
import torch
from torch import Tensor, nn

from moqe.errors import NumericalError, UnsupportedLayer
from moqe.methods import check
from moqe.methods.block import BlockResult, quantize_block, split_rows
from moqe.methods.grids import searched_grid
from moqe.methods.output_error import output_error
from moqe.methods.rtn import rtn
from moqe.methods.statistics import InputStatistics, accumulate, combine
from moqe.models.groups import LinearGroup
from moqe.quantized import BlockTensor, IntegerTensor
from moqe.recipe import Expert
from moqe.schemes import scheme

WIDTH, INNER = 64, 128


class Block(nn.Module):
    """A gated MLP after attention over one token, with repeated value heads: what a Llama block is to smoothing."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.v_proj = nn.Linear(WIDTH, WIDTH // 2)  # 2 heads of 16, each used twice
        self.k_proj = nn.Linear(WIDTH, 32, bias=False)
        self.o_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.mlp_norm = nn.RMSNorm(WIDTH)
        self.gate = nn.Linear(WIDTH, INNER, bias=False)
        self.up = nn.Linear(WIDTH, INNER, bias=False)
        self.down = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        normed = self.norm(hidden)
        value = self.v_proj(normed).view(-1, 2, 16).repeat_interleave(2, 1).flatten(1)
        hidden = hidden + self.o_proj(value) * self.k_proj(normed).mean(-1, keepdim=True).sigmoid()
        normed = self.mlp_norm(hidden)
        return hidden + self.down(torch.relu(self.gate(normed)) * self.up(normed))


GROUPS = (
    LinearGroup(("k_proj", "v_proj"), "norm", "norm"),
    LinearGroup(("o_proj",), "v_proj", "value", tuple((i // 32) * 16 + i % 16 for i in range(WIDTH))),
    LinearGroup(("gate", "up"), "mlp_norm", "norm"),
    LinearGroup(("down",), "up", "linear"),
)
Statistics = dict[str, dict[str, InputStatistics]]


def setting(seed: int = 0) -> tuple[Block, Statistics, Tensor]:
    """A block, its statistics in two domains, and the calibration inputs."""
    torch.manual_seed(seed)
    block = Block()
    with torch.no_grad():
        block.norm.weight.copy_(torch.randn(WIDTH).exp())
        block.mlp_norm.weight.copy_(torch.randn(WIDTH).exp())
    hidden = torch.randn(400, WIDTH) * torch.randn(WIDTH).exp()
    statistics: Statistics = {}
    for domain, part in (("code", hidden[:150]), ("prose", hidden[150:])):
        handles = []
        for group in GROUPS:
            into = statistics.setdefault(group.key, {})

            def record(
                module: nn.Module, arguments: tuple[Tensor], into: dict[str, InputStatistics] = into, name: str = domain
            ) -> None:
                into[name] = accumulate(None, arguments[0].detach())

            handles.append(block.get_submodule(group.key).register_forward_pre_hook(record))
        block(part)
        for handle in handles:
            handle.remove()
    return block, statistics, hidden


def quantize(expert: Expert, block: Block, statistics: Statistics, dtype: torch.dtype = torch.bfloat16) -> BlockResult:
    return quantize_block(block, GROUPS, statistics, expert, check(expert), "model.layers.3", torch.bfloat16, dtype)


def loaded(block: Block, result: BlockResult) -> Block:
    """The block with the expert's parameters."""
    other = copy.deepcopy(block)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            stored = result.tensors[f"model.layers.3.{name}"]
            parameter.copy_(stored if isinstance(stored, Tensor) else stored.dequantize())
    return other


def expert(method: str, wanted: str = "w4a16", **options: object) -> Expert:
    size = {} if wanted.startswith(("q", "w8")) else {"group_size": 32}
    return Expert.model_validate({"name": "x", "method": method, "scheme": wanted, **size, **options})


@pytest.mark.parametrize(
    ("method", "wanted"),
    [("rtn", "w4a16"), ("gptq", "w3a16"), ("awq", "w4a16"), ("smoothquant", "w8a8"), ("smoothquant", "w4a8")],
)
def test_every_parameter_is_there_and_the_block_is_untouched(method: str, wanted: str) -> None:
    block, statistics, _ = setting()
    before = copy.deepcopy(block.state_dict())
    result = quantize(expert(method, wanted), block, statistics)
    assert set(result.tensors) == {f"model.layers.3.{name}" for name, _ in block.named_parameters()}
    assert [record.name for record in result.layers] == [
        f"model.layers.3.{name}.weight" for group in GROUPS for name in group.names
    ]
    for record in result.layers:
        tensor = result.tensors[record.name]
        assert isinstance(tensor, IntegerTensor)
        assert tensor.scale.dtype is torch.bfloat16
        assert record.method_used == method
        assert record.seen == 400
        assert not record.substituted
    for name in ("norm.weight", "v_proj.bias", "mlp_norm.weight"):
        tensor = result.tensors[f"model.layers.3.{name}"]
        assert isinstance(tensor, Tensor)
        assert tensor.dtype is torch.bfloat16
    assert all(torch.equal(before[name], value) for name, value in block.state_dict().items())


@pytest.mark.parametrize(("method", "wanted"), [("gptq", "w4a16"), ("awq", "w4a16"), ("gptq", "w3a16")])
def test_a_calibrated_method_beats_rounding_in_every_layer_and_at_the_output(method: str, wanted: str) -> None:
    block, statistics, hidden = setting(1)
    ours = quantize(expert(method, wanted), block, statistics)
    plain = quantize(expert("rtn", wanted), block, statistics)
    for record in ours.layers:
        assert record.error is not None
        assert record.baseline_error is not None
        assert record.error < record.baseline_error
    assert [r.baseline_error for r in ours.layers] == [r.error for r in plain.layers]
    exact = block(hidden).detach()
    distance = [float((loaded(block, result)(hidden).detach() - exact).square().sum()) for result in (ours, plain)]
    assert distance[0] < distance[1]


@pytest.mark.parametrize("method", ["awq", "smoothquant"])
def test_folding_is_exact_but_for_rounding(method: str) -> None:
    """With 8 bits everywhere what is left is small, though norms are stored in bfloat16."""
    block, statistics, hidden = setting(2)
    wanted = "w8a16" if method == "awq" else "w8a8"
    exact = block(hidden).detach()
    result = quantize(expert(method, wanted), block, statistics)
    norm = result.tensors["model.layers.3.norm.weight"]
    assert isinstance(norm, Tensor)
    assert not torch.allclose(norm.float(), block.norm.weight, rtol=0.05)
    error = (loaded(block, result)(hidden).detach() - exact).norm() / (exact - hidden).norm()
    assert float(error) < 0.01


def test_error_is_measured_in_the_base_models_coordinates() -> None:
    block, statistics, _ = setting(3)
    result = quantize(expert("smoothquant", "w8a8"), block, statistics)
    by_name = {record.name.split(".")[3]: record for record in result.layers}
    stored = result.tensors["model.layers.3.norm.weight"]
    assert isinstance(stored, Tensor)
    norm_scale = block.norm.weight.detach() / stored.float()  # what was folded, though the norm is rounded to bfloat16
    tensor = result.tensors["model.layers.3.k_proj.weight"]
    assert isinstance(tensor, IntegerTensor)
    weight = block.k_proj.weight.detach()
    hessian = sum(part.hessian for part in statistics["k_proj"].values())
    expected = output_error(tensor.dequantize() / norm_scale - weight, hessian) / output_error(weight, hessian)
    assert by_name["k_proj"].error == pytest.approx(expected, rel=1e-3)
    # up is scaled on both sides: columns by its own scale, rows by the one of down
    for name in ("up", "v_proj", "down"):
        error = by_name[name].error
        assert error is not None
        assert 0 < error < 1e-3


def test_the_method_sees_the_inputs_as_they_are_after_smoothing() -> None:
    block, statistics, _ = setting(14)
    chosen = expert("smoothquant", "w4a8")
    result = quantize(chosen, block, statistics, torch.float32)
    norm = result.tensors["model.layers.3.norm.weight"]
    tensor = result.tensors["model.layers.3.k_proj.weight"]
    assert isinstance(norm, Tensor)
    assert isinstance(tensor, IntegerTensor)
    scale = block.norm.weight.detach() / norm
    importance = combine(statistics["k_proj"]).importance / scale.square()
    expected = searched_grid(block.k_proj.weight.detach() * scale, check(chosen), torch.bfloat16, importance)[0]
    assert float((tensor.scale == expected).float().mean()) > 0.95


def test_stacked_rows_are_what_single_linears_would_give() -> None:
    block, statistics, _ = setting(4)
    whole = quantize(expert("gptq"), block, statistics)
    alone = quantize_block(
        block,
        [LinearGroup((name,)) for group in GROUPS for name in group.names],
        {name: statistics[group.key] for group in GROUPS for name in group.names},
        expert("gptq"),
        check(expert("gptq")),
        "model.layers.3",
        torch.bfloat16,
        torch.bfloat16,
    )
    for record in whole.layers:
        one, other = whole.tensors[record.name], alone.tensors[record.name]
        assert isinstance(one, IntegerTensor)
        assert isinstance(other, IntegerTensor)
        assert torch.equal(one.scale, other.scale)
        assert float((one.codes != other.codes).float().mean()) < 0.01  # sums in another order may tip a tie


def test_domain_weights_reach_the_method() -> None:
    block, statistics, _ = setting(5)
    only = quantize(expert("gptq", calibration={"prose": 0.0}), block, statistics)
    direct = quantize(expert("gptq"), block, {key: {"code": parts["code"]} for key, parts in statistics.items()})
    assert only.layers[0].seen == 150
    assert [r.error for r in only.layers] == [r.error for r in direct.layers]


def test_equal_runs_give_equal_bytes() -> None:
    block, statistics, _ = setting(6)
    records = [json.dumps([r.to_json() for r in quantize(expert("awq"), block, statistics).layers]) for _ in range(2)]
    assert records[0] == records[1]


def test_non_dividing_group_is_an_error_with_the_fix_rounded_or_kept(caplog: pytest.LogCaptureFixture) -> None:
    block, statistics, _ = setting(7)
    with pytest.raises(UnsupportedLayer, match=r"'x', layer model\.layers\.3\.k_proj: rows of 64 .* group_size to 64"):
        quantize(expert("gptq", group_size=128), block, statistics)
    with caplog.at_level(logging.WARNING, "moqe"):
        rounded = quantize(expert("gptq", group_size=128, on_unsupported="rtn"), block, statistics)
    assert "rtn instead" in caplog.text
    by_name = {record.name.split(".")[3]: record for record in rounded.layers}
    assert (by_name["k_proj"].method_used, by_name["k_proj"].group_size) == ("rtn", 64)
    assert "rows of 64" in by_name["k_proj"].substituted
    assert (by_name["down"].method_used, by_name["down"].group_size) == ("gptq", 128)
    assert by_name["down"].substituted == ""
    stored = rounded.tensors["model.layers.3.k_proj.weight"]
    assert isinstance(stored, IntegerTensor)
    expected = rtn(block.k_proj.weight.detach(), scheme("w4a16", 64), torch.bfloat16)
    assert torch.equal(stored.codes, expected.codes)

    kept = quantize(expert("gptq", group_size=128, on_unsupported="keep"), block, statistics)
    by_name = {record.name.split(".")[3]: record for record in kept.layers}
    assert (by_name["up"].method_used, by_name["up"].bits_per_weight) == ("keep", 16.0)
    stored = kept.tensors["model.layers.3.up.weight"]
    assert isinstance(stored, Tensor)
    assert torch.equal(stored, block.up.weight.detach().bfloat16())


@pytest.mark.parametrize("damage", ["nan", "no tokens", "no statistics"])
@pytest.mark.parametrize("method", ["gptq", "awq", "smoothquant"])
def test_statistics_a_method_cannot_use(damage: str, method: str) -> None:
    block, statistics, _ = setting(8)
    code = statistics["down"]["code"]
    if damage == "nan":
        bad = code.hessian.clone()
        bad[3, 4] = float("nan")
        statistics["down"]["code"] = InputStatistics(bad, code.absmax, code.abssum, code.tokens)
    elif damage == "no tokens":
        empty = InputStatistics(code.hessian * 0, code.absmax * 0, code.abssum * 0, 0.0)
        statistics["down"] = {"code": empty}
    else:
        del statistics["down"]
    wanted = "w8a8" if method == "smoothquant" else "w4a16"
    message = "not finite" if damage == "nan" else "no calibration token"
    with pytest.raises(UnsupportedLayer, match=rf"layer model\.layers\.3\.down: .*{message}.*on_unsupported"):
        quantize(expert(method, wanted), block, statistics)
    result = quantize(expert(method, wanted, on_unsupported="rtn"), block, statistics)
    assert [r.method_used for r in result.layers] == [method] * 5 + ["rtn"]
    assert result.layers[-1].error is None
    assert message in result.layers[-1].substituted
    rounded = quantize(expert("rtn", wanted), block, statistics)  # needs no statistics
    assert rounded.layers[-1].error is None


def test_weights_that_are_not_finite_name_their_layer_whatever_the_recipe_allows() -> None:
    block, statistics, _ = setting(9)
    with torch.no_grad():
        block.up.weight[3, 3] = float("inf")
    for method in ("rtn", "gptq"):
        for allowed in ("error", "rtn"):
            with pytest.raises(NumericalError, match=r"layer model\.layers\.3\.gate: weights are not finite"):
                quantize(expert(method, on_unsupported=allowed), block, statistics)


def test_a_matrix_that_cannot_be_factorised_is_kept_where_the_recipe_allows() -> None:
    block, statistics, _ = setting(10)
    broken = torch.eye(WIDTH)
    broken[0, 1] = broken[1, 0] = 1e6
    ones = torch.ones(WIDTH)
    statistics["o_proj"] = {"code": InputStatistics(broken, ones, ones, 10.0)}
    with pytest.raises(NumericalError, match=r"layer model\.layers\.3\.o_proj: H cannot be factorised"):
        quantize(expert("gptq"), block, statistics)
    result = quantize(expert("gptq", on_unsupported="keep"), block, statistics)
    assert [r.method_used for r in result.layers] == ["gptq", "gptq", "keep", "gptq", "gptq", "gptq"]


def test_a_linear_that_no_group_names_is_not_forgotten() -> None:
    block, statistics, _ = setting(11)
    block.add_module("expert", nn.Linear(WIDTH, 8, bias=False))
    with pytest.raises(UnsupportedLayer, match=r"layer model\.layers\.3\.expert: no calibration token"):
        quantize(expert("gptq"), block, statistics)
    result = quantize(expert("rtn"), block, statistics)
    assert isinstance(result.tensors["model.layers.3.expert.weight"], IntegerTensor)


def test_block_schemes_fall_back_only_where_the_recipe_says_so() -> None:
    block, statistics, _ = setting(12)
    with pytest.raises(UnsupportedLayer, match=r"rows of 64 .* q4_k's blocks of 256: set block_fallback"):
        quantize(expert("imatrix", "q4_k"), block, statistics)
    with pytest.raises(UnsupportedLayer, match="rtn cannot help"):
        quantize(expert("imatrix", "q4_k", on_unsupported="rtn"), block, statistics)
    result = quantize(expert("imatrix", "q4_k", block_fallback="q4_0"), block, statistics)
    for record in result.layers:
        assert isinstance(result.tensors[record.name], BlockTensor)
        assert (record.scheme_asked, record.scheme_used) == ("q4_k", "q4_0")
        assert record.method_used == "imatrix"
        assert "as block_fallback says" in record.substituted
        assert record.error is not None
        assert record.baseline_error is not None  # of kquants
        assert record.error < 1.05 * record.baseline_error


def test_split_rows_gives_back_the_parts() -> None:
    weight = torch.randn(12, 64, generator=torch.Generator().manual_seed(13))
    wanted = scheme("w3a16", 32)
    parts = split_rows(rtn(weight, wanted, torch.bfloat16), [5, 7])
    for part, rows in zip(parts, weight.split([5, 7]), strict=True):
        assert torch.equal(part.dequantize(), rtn(rows, wanted, torch.bfloat16).dequantize())
    tensor = BlockTensor(torch.arange(8, dtype=torch.uint8).view(4, 2), {"d": torch.ones(4, 1)}, scheme=scheme("q8_0"))
    pieces = split_rows(tensor, [1, 3])
    assert [tuple(piece.codes.shape) for piece in pieces] == [(1, 2), (3, 2)]
    assert isinstance(pieces[1], BlockTensor)
    assert pieces[1].fields["d"].shape == (3, 1)
