from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moqe.errors import CheckpointError, NumericalError
from moqe.formats.compressed_tensors_files import CompressedTensorsFiles
from moqe.formats.safetensors_folder import SafetensorsFolder, save_tensors
from moqe.formats.shared_codes import SharedCodes
from moqe.runtimes.coded_linear import CodedLinear
from moqe.runtimes.reference import ReferenceRuntime
from moqe.schemes import Scheme, scheme
from split_experts import TOKENS, open_skeleton, surroundings, write_experts

SCHEMES = [
    scheme("w4a16", group_size=64),
    scheme("w4a16", group_size=32, symmetric=False),
    scheme("w3a16"),
    scheme("w8a16"),
    scheme("w8a8"),
    scheme("w4a8", symmetric=False),
]


def label(value: Any) -> str:
    return f"{value.name}-{value.symmetric}" if isinstance(value, Scheme) else str(value)


Make = Callable[..., tuple[Any, list[Path]]]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Makes a skeleton and experts that share codes."""

    def made(target: Scheme = SCHEMES[0], count: int = 2, architecture: str = "Qwen3") -> tuple[Any, list[Path]]:
        base = surroundings(tmp_path / "base", architecture)
        paths = write_experts(tmp_path / "experts", base, target, count)
        return open_skeleton(base, tmp_path / "experts" / "shared"), paths

    return made


def coded_linears(runtime: ReferenceRuntime) -> dict[str, CodedLinear]:
    return {name: module for name, module in runtime.model().named_modules() if isinstance(module, CodedLinear)}


@pytest.mark.parametrize("target", SCHEMES, ids=label)
def test_losses_are_the_reference_runtimes_bit_for_bit(make: Make, target: Scheme) -> None:
    skeleton, paths = make(target)
    codes = SharedCodes()
    losses = []
    for path in paths:
        plain = ReferenceRuntime(skeleton, CompressedTensorsFiles(path))
        coded = ReferenceRuntime(skeleton, CompressedTensorsFiles(path), codes=codes)
        assert torch.equal(coded.score(TOKENS), plain.score(TOKENS))
        assert torch.equal(coded.logits(TOKENS), plain.logits(TOKENS))
        assert coded.generate(TOKENS[:1, :5], 4) == plain.generate(TOKENS[:1, :5], 4)
        assert len(coded_linears(coded)) == 14
        losses.append(plain.score(TOKENS))
    assert not torch.equal(losses[0], losses[1])  # the scales are each expert's own


def test_biases_are_kept(make: Make) -> None:
    skeleton, paths = make(architecture="Qwen2")
    plain = ReferenceRuntime(skeleton, CompressedTensorsFiles(paths[0]))
    coded = ReferenceRuntime(skeleton, CompressedTensorsFiles(paths[0]), codes=SharedCodes())
    assert torch.equal(coded.logits(TOKENS), plain.logits(TOKENS))
    bias = coded_linears(coded)["model.layers.0.self_attn.q_proj"].bias
    assert bias is not None
    assert bias.any()


@pytest.mark.parametrize("target", [SCHEMES[1], SCHEMES[4]], ids=label)
def test_experts_have_their_codes_in_common_and_their_scales_apart(make: Make, target: Scheme) -> None:
    skeleton, paths = make(target)
    codes = SharedCodes()
    runtimes = [ReferenceRuntime(skeleton, CompressedTensorsFiles(path), codes=codes) for path in paths]
    assert not codes._open  # nothing is loaded before it is used
    one, other = (coded_linears(runtime) for runtime in runtimes)
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].packed.codes is other[name].packed.codes
        assert one[name].packed.zero_point is other[name].packed.zero_point
        assert one[name].packed.scale.data_ptr() != other[name].packed.scale.data_ptr()
    before = runtimes[1].score(TOKENS)
    del one, other
    runtimes[0].release()
    assert torch.equal(runtimes[1].score(TOKENS), before)
    runtimes[1].release()
    assert not codes._open
    assert torch.equal(runtimes[1].score(TOKENS), before)


def test_scales_in_a_common_file_are_held_once_too(make: Make) -> None:
    skeleton, paths = make()
    scales = "scales-00002-of-00003.safetensors"
    (paths[1] / scales).unlink()
    os.link(paths[0] / scales, paths[1] / scales)
    codes = SharedCodes()
    runtimes = [ReferenceRuntime(skeleton, CompressedTensorsFiles(path), codes=codes) for path in paths]
    one, other = (coded_linears(runtime) for runtime in runtimes)
    for name in one:
        assert (one[name].packed.scale is other[name].packed.scale) == name.startswith("model.layers.0.")


def test_a_coded_linear_is_read_like_a_linear(make: Make) -> None:
    skeleton, paths = make()
    runtime = ReferenceRuntime(skeleton, CompressedTensorsFiles(paths[0]), codes=SharedCodes())
    linear = coded_linears(runtime)["model.layers.1.mlp.up_proj"]
    stored = CompressedTensorsFiles(paths[0]).load("model.layers.1.mlp.up_proj.weight")
    assert not isinstance(stored, Tensor)
    assert torch.equal(linear.weight, stored.dequantize())
    assert (linear.out_features, linear.in_features) == linear.weight.shape
    assert "w4a16" in repr(linear)
    assert not list(linear.parameters())


def test_damage_is_named(make: Make) -> None:
    skeleton, paths = make()
    shard = paths[1] / "scales-00002-of-00003.safetensors"
    names = SafetensorsFolder(paths[1])
    tensors = {name: names.tensor(name) for name in names.names() if names.path(name) == shard}
    scale = "model.layers.0.mlp.up_proj.weight_scale"

    def run(changed: Tensor) -> None:
        save_tensors(shard, {**tensors, scale: changed})
        ReferenceRuntime(skeleton, CompressedTensorsFiles(paths[1]), name="mine", codes=SharedCodes()).score(TOKENS)

    with pytest.raises(NumericalError, match=r"mine.*up_proj\.weight"):
        run(torch.full_like(tensors[scale], torch.inf))
    with pytest.raises(CheckpointError, match=r"scales-00002.*up_proj\.weight is damaged"):
        run(tensors[scale][:, :1].repeat(1, 3))
    with pytest.raises(CheckpointError, match=r"scales-00002.*up_proj\.weight is damaged"):
        run(tensors[scale][:4])


def test_an_expert_whose_codes_cannot_be_kept_is_refused(make: Make) -> None:
    class Elsewhere:
        format = "gguf"

        def __init__(self, files: CompressedTensorsFiles) -> None:
            self.names, self.load, self.activation_bits = files.names, files.load, files.activation_bits

    skeleton, paths = make()
    runtime = ReferenceRuntime(skeleton, Elsewhere(CompressedTensorsFiles(paths[0])), codes=SharedCodes())
    with pytest.raises(CheckpointError, match="a gguf expert's codes cannot be shared"):
        runtime.score(TOKENS)
