"""ONNX experts: what is written is read back exactly, equal layers give equal bytes, damage and misfits are errors."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from moqe.errors import CheckpointError, MissingExtra, ModelError, NumericalError, UnsupportedLayer
from moqe.formats.onnx_graph import export_float_graph
from moqe.formats.onnx_nodes import table_of, thresholds_of
from moqe.formats.onnx_reader import read_onnx_layers, read_onnx_metadata
from moqe.formats.onnx_writer import LAYERS_KEY, build_onnx_model, write_onnx_expert
from moqe.methods.vision.layer import (
    BlockFloat,
    InputQuantizer,
    QuantizedLayer,
    Thresholds,
    Uniform,
    WeightCodes,
    float32,
    signed_range,
)
from onnx_networks import IMAGE_SHAPE, codes, quantized_layers, small_graph, small_net, uniform, write

onnx: Any = pytest.importorskip("onnx")
KINDS = ("uniform", "thresholds", "block_float")


def same_tensor(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    return first.dtype == second.dtype and torch.equal(first, second)


def same_quantizer(first: InputQuantizer | None, second: InputQuantizer | None) -> bool:
    if isinstance(first, Thresholds) and isinstance(second, Thresholds):
        empty = torch.empty(0)
        return same_tensor(first.table, second.table) and replace(first, table=empty) == replace(second, table=empty)
    return first == second


def assert_same(found: tuple[QuantizedLayer, ...], expected: tuple[QuantizedLayer, ...]) -> None:
    assert [layer.name for layer in found] == [layer.name for layer in expected]
    for one, other in zip(found, expected, strict=True):
        assert same_tensor(one.weight.codes, other.weight.codes)
        assert same_tensor(one.weight.scale, other.weight.scale)
        assert (one.weight.block, one.weight.bits) == (other.weight.block, other.weight.bits)
        assert same_tensor(one.bias, other.bias)
        assert same_quantizer(one.input, other.input)
        assert one.output == other.output


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(kind: str, bits: int, tmp_path: Path) -> None:
    layers = quantized_layers(kind, bits)
    assert_same(read_onnx_layers(write(tmp_path / "expert.onnx", layers)), layers)


scales = st.floats(1e-3, 1e3).map(float32)


@st.composite
def quantizers(draw: st.DrawFn, axis: int) -> InputQuantizer:
    bits = draw(st.integers(1, 8))
    kind = draw(st.sampled_from(KINDS))
    if kind == "uniform":
        signed = draw(st.booleans())
        low = -128 if signed else 0
        return Uniform(draw(scales), draw(st.integers(low, low + 255)), bits, signed)
    if kind == "thresholds":
        rises = np.array(draw(st.lists(st.integers(0, 65536), max_size=(1 << bits) - 1)), np.int64)
        zero = draw(st.integers(0, (1 << bits) - 1))
        return Thresholds(table_of(np.sort(rises)), draw(scales), draw(st.integers(0, 65535)), draw(scales), bits, zero)
    return BlockFloat(draw(st.integers(2, 9)), draw(st.integers(1, 12)), draw(st.booleans()), axis)


@st.composite
def any_layers(draw: st.DrawFn) -> tuple[QuantizedLayer, ...]:
    random = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    layers = []
    names = [name for name, module in small_net().named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    for name in draw(st.lists(st.sampled_from(names), unique=True)):
        shape = small_net().get_submodule(name).weight.shape
        bits, block = draw(st.integers(2, 8)), draw(st.integers(0, 12))
        low, high = signed_range(bits)
        content = torch.randint(low, high + 1, shape, generator=random).to(torch.int8)
        scale_shape = (shape[0], -(-shape[1] // block), *shape[2:]) if block else shape[:1]
        weight = WeightCodes(content, torch.rand(scale_shape, generator=random) + 0.01, block, bits)
        bias = torch.randn(shape[0], generator=random) if draw(st.booleans()) else None
        reading = draw(st.none() | quantizers(1 if len(shape) == 4 else -1))
        output = Uniform(draw(scales), draw(st.integers(0, 255)), 8) if draw(st.booleans()) else None
        layers.append(QuantizedLayer(name, weight, bias, reading, output))
    return tuple(layers)


@settings(deadline=None, max_examples=30)
@given(layers=any_layers())
def test_any_layers_round_trip(layers: tuple[QuantizedLayer, ...], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = write(tmp_path_factory.mktemp("files") / "expert.onnx", layers)
    onnx.checker.check_model(str(path), full_check=True)
    assert_same(read_onnx_layers(path), layers)


@settings(deadline=None)
@given(rises=st.lists(st.integers(0, 65536), max_size=255))
def test_tables_and_thresholds_are_the_same_thing(rises: list[int]) -> None:
    table = table_of(np.array(sorted(rises), np.int64))
    assert table.shape == (65536,)
    assert int(table[-1]) == sum(rise < 65536 for rise in rises)
    assert torch.equal(table_of(thresholds_of(table)), table)


def test_equal_layers_give_equal_bytes_that_tell_nothing_else(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(400, 2)).eval().requires_grad_(False)
    layers = tuple(
        QuantizedLayer(name, codes(network.get_submodule(name).weight, 4), None, uniform(-1, 1, 4))
        for name in ("0", "2")
    )
    for name in ("first", "second"):
        write_onnx_expert(tmp_path / name, network, layers, IMAGE_SHAPE, {"method": "ptq"})
    content = (tmp_path / "first").read_bytes()
    assert content == (tmp_path / "second").read_bytes()
    assert Path(__file__).name.encode() not in content
    assert b"torch" not in content
    assert not list(tmp_path.glob("*.partial"))


def test_metadata_comes_back(tmp_path: Path) -> None:
    path = write(tmp_path / "expert.onnx", quantized_layers("uniform", 8), {"scheme": "w8a8", "labels": "Käse, wine"})
    assert read_onnx_metadata(path) == {"scheme": "w8a8", "labels": "Käse, wine"}


def test_full_precision_has_no_layers(tmp_path: Path) -> None:
    assert read_onnx_layers(write(tmp_path / "base.onnx", ())) == ()


def test_four_bit_codes_are_packed(tmp_path: Path) -> None:
    model = onnx.load(str(write(tmp_path / "expert.onnx", quantized_layers("uniform", 4))))
    kinds = {tensor.name: tensor for tensor in model.graph.initializer}
    assert kinds["stem.weight"].data_type == onnx.TensorProto.INT8  # 8 bits at both ends
    assert kinds["project.weight"].data_type == onnx.TensorProto.INT4
    assert len(kinds["project.weight"].raw_data) == 50
    assert not [name for name in kinds if name.startswith("float:")]  # no float weight is left behind


def test_layers_that_read_alike_share_their_quantizer(tmp_path: Path) -> None:
    layers = quantized_layers("uniform", 8)
    shared = write(tmp_path / "shared.onnx", layers)
    apart = tuple(
        replace(layer, input=replace(layer.input, scale=float32(layer.input.scale * 1.5)))
        if layer.name == "right" and isinstance(layer.input, Uniform)
        else layer
        for layer in layers
    )
    counts = [
        sum(node.op_type == "QuantizeLinear" for node in onnx.load(str(path)).graph.node)
        for path in (shared, write(tmp_path / "apart.onnx", apart))
    ]
    assert counts[1] == counts[0] + 1
    assert_same(read_onnx_layers(shared), layers)
    assert_same(read_onnx_layers(tmp_path / "apart.onnx"), apart)


@settings(deadline=None, max_examples=40)
@given(share=st.floats(0, 0.9999))
def test_a_truncated_file_is_an_error(share: float, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("cut")
    content = write(folder / "expert.onnx", quantized_layers("uniform", 8)).read_bytes()
    (folder / "expert.onnx").write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match=r"expert\.onnx"):
        read_onnx_layers(folder / "expert.onnx")


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_onnx_layers(tmp_path / "missing.onnx")
    (tmp_path / "text.onnx").write_text("not a model at all")
    with pytest.raises(CheckpointError, match="no ONNX file"):
        read_onnx_layers(tmp_path / "text.onnx")
    onnx.save(small_graph(), str(tmp_path / "foreign.onnx"))
    with pytest.raises(CheckpointError, match="MoQE has not written it"):
        read_onnx_layers(tmp_path / "foreign.onnx")


def edit(path: Path, name: str, values: np.ndarray[Any, Any] | None) -> None:
    """Replace or remove an initializer."""
    model = onnx.load(str(path))
    kept = [tensor for tensor in model.graph.initializer if tensor.name != name]
    assert len(kept) < len(model.graph.initializer)
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    if values is not None:
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    onnx.save(model, str(path))


@pytest.mark.parametrize(
    ("kind", "name", "values"),
    [
        ("uniform", "stem.weight", None),
        ("uniform", "stem.weight", np.zeros((10, 3, 3, 3), np.float32)),
        ("uniform", "stem.weight_scale", np.ones(9, np.float32)),
        ("uniform", "stem.weight_scale", np.full(10, np.nan, np.float32)),
        ("uniform", "stem.bias", np.zeros(9, np.float32)),
        ("uniform", "stem.input_scale", np.float32(0)),
        ("uniform", "stem.input_zero_point", np.int8(0)),
        ("uniform", "project.weight", np.full((10, 10, 1, 1), 8, np.int8)),
        ("thresholds", "project.input_thresholds", np.array([3, 65537])),
        ("thresholds", "project.input_thresholds", np.arange(16)),
    ],
)
def test_damage_is_found(kind: str, name: str, values: np.ndarray[Any, Any] | None, tmp_path: Path) -> None:
    path = write(tmp_path / "expert.onnx", quantized_layers(kind, 4))
    edit(path, name, values)
    with pytest.raises(CheckpointError, match=rf"damaged: .*{name}"):
        read_onnx_layers(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [("input", {"kind": "cubic", "name": "stem.input"}), ("block", -1), ("bits", "four"), ("bits", 99)],
)
def test_damaged_descriptions_are_found(key: str, value: object, tmp_path: Path) -> None:
    path = write(tmp_path / "expert.onnx", quantized_layers("uniform", 8))
    model = onnx.load(str(path))
    (entry,) = [entry for entry in model.metadata_props if entry.key == LAYERS_KEY]
    records = json.loads(entry.value)
    records[0][key] = value
    entry.value = json.dumps(records)
    onnx.save(model, str(path))
    with pytest.raises(CheckpointError, match="damaged"):
        read_onnx_layers(path)


def one_layer(name: str = "project", **changes: Any) -> tuple[QuantizedLayer, ...]:
    layer = next(layer for layer in quantized_layers("uniform", 8) if layer.name == "project")
    return (replace(layer, **{"name": name, **changes}),)


def test_layers_of_another_network() -> None:
    with pytest.raises(ModelError, match="no convolution or linear named 'elsewhere'"):
        build_onnx_model(small_graph(), small_net(), one_layer("elsewhere"), {})
    with pytest.raises(ModelError, match=r"stem: the weight has shape \(10, 3, 3, 3\)"):
        build_onnx_model(small_graph(), small_net(), one_layer("stem"), {})


def test_numbers_that_a_file_cannot_hold() -> None:
    with pytest.raises(NumericalError, match=r"project\.input: the scale 0\.1"):
        build_onnx_model(small_graph(), small_net(), one_layer(input=Uniform(0.1, 0, 8)), {})
    with pytest.raises(UnsupportedLayer, match="16 bits and ONNX experts hold 8"):
        build_onnx_model(small_graph(), small_net(), one_layer(input=Uniform(0.5, 0, 16)), {})


def test_biases_that_integer_kernels_cannot_hold() -> None:
    (layer,) = one_layer()
    assert layer.bias is not None
    tiny = replace(layer.weight, scale=torch.full((10,), 1e-20))
    with pytest.raises(NumericalError, match="project: a bias does not fit"):
        build_onnx_model(small_graph(), small_net(), one_layer(weight=tiny, bias=torch.ones(10)), {})


class Standardised(nn.Conv2d):
    """A convolution that does not multiply by its weight as it is."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


class Twice(nn.Module):
    """A convolution that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.again(x)).mean((2, 3))


@pytest.mark.parametrize(
    ("network", "name", "message"),
    [
        (nn.Sequential(Standardised(3, 4, 3), nn.Flatten()), "0", "0 does not multiply by its own weight"),
        (Twice(), "again", "again multiplies 2 times"),
    ],
)
def test_layers_that_are_more_than_a_product(network: nn.Module, name: str, message: str, tmp_path: Path) -> None:
    network = network.eval().requires_grad_(False)
    layer = QuantizedLayer(name, codes(network.get_submodule(name).weight, 8), None, None)
    with pytest.raises(UnsupportedLayer, match=message):
        write_onnx_expert(tmp_path / "expert.onnx", network, [layer], IMAGE_SHAPE)
    assert not list(tmp_path.iterdir())


class OneBatch(nn.Module):
    """A network that cannot do without knowing its batch size."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sum() if x.shape[0] == 2 else x.mean()


def test_networks_that_cannot_be_exported() -> None:
    with pytest.raises(ModelError, match="OneBatch cannot be exported to ONNX"):
        export_float_graph(OneBatch(), IMAGE_SHAPE)


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_says_what_to_install(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=rf"needs {package}, .*pip install '\.\[vision\]'"):
        export_float_graph(small_net(), IMAGE_SHAPE)
