from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moqe.errors import ModelError, NumericalError
from moqe.models.weights import CheckpointWeights, ZeroWeights, read_config, resolve_base


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4)}, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_file({"a": torch.arange(6.0).view(2, 3)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": torch.ones(4)}, tmp_path / "model-00002-of-00002.safetensors")
    places = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return tmp_path


def test_reads_one_file(folder: Path) -> None:
    weights = CheckpointWeights(folder)
    assert weights.names() == ["a", "b"]
    assert torch.equal(weights.load("a", (2, 3)), torch.arange(6.0).view(2, 3))


def test_reads_shards(sharded: Path) -> None:
    weights = CheckpointWeights(sharded)
    assert weights.names() == ["a", "b"]
    assert torch.equal(weights.load("b", (4,)), torch.ones(4))


def test_unknown_name_suggests_one(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"no parameter 'aa'.*'a'"):
        CheckpointWeights(folder).load("aa", (2, 3))


def test_wrong_shape(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"a in .* has shape \(2, 3\)"):
        CheckpointWeights(folder).load("a", (3, 2))


def test_truncated_file_is_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be read"):
        CheckpointWeights(folder)


def test_garbage_file_is_named(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be read"):
        CheckpointWeights(folder)


def test_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model-00002-of-00002\.safetensors"):
        CheckpointWeights(sharded)


def test_shard_without_what_the_index_promises(sharded: Path) -> None:
    save_file({"c": torch.ones(4)}, sharded / "model-00002-of-00002.safetensors")
    with pytest.raises(ModelError, match="lacks b"):
        CheckpointWeights(sharded)


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_broken_index(sharded: Path, content: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelError, match=r"index\.json"):
        CheckpointWeights(sharded)


def test_folder_without_safetensors(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="save_pretrained"):
        CheckpointWeights(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_names_the_tensor(tmp_path: Path, value: float) -> None:
    save_file({"layer.weight": torch.tensor([1.0, value])}, tmp_path / "model.safetensors")
    with pytest.raises(NumericalError, match=r"layer\.weight"):
        CheckpointWeights(tmp_path).load("layer.weight", (2,))


def test_zero_weights_have_the_shape_asked_for() -> None:
    assert torch.equal(ZeroWeights().load("anything", (2, 3)), torch.zeros(2, 3))


def test_quantized_base_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(ModelError, match=r"already quantized .*awq.*checkpoint:"):
        read_config(tmp_path)


@pytest.mark.parametrize("content", ["{", "", "[]"])
def test_damaged_config(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"config\.json"):
        read_config(tmp_path)


def test_base_is_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        resolve_base(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert resolve_base(str(tmp_path)) == tmp_path


def test_base_that_cannot_be_anything(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not a folder, a hub id"):
        resolve_base(str(tmp_path / "missing"))


def test_hub_id_goes_through_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append(name)
        assert "*.safetensors" in allow_patterns
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve_base("someone/some-model") == tmp_path
    assert asked == ["someone/some-model"]


def test_hub_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="hf download someone/some-model"):
        resolve_base("someone/some-model")


def test_bundled_name_goes_to_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("moqe.models.weights.bundled_model", {"tiny": tmp_path}.__getitem__)
    assert resolve_base("bundled:tiny") == tmp_path
