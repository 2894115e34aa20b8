"""Experts that come about in other ways: adopted checkpoints, sequential calibration, one domain, substitutions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import moqe
from moqe.errors import UnsupportedLayer
from moqe.folder import MixtureFolder
from moqe.formats import CompressedTensorsWriter, open_expert
from moqe.methods.block import BlockResult
from moqe.models.calibration import CalibratedBlock
from moqe.progress import Silent
from moqe.quantized import IntegerTensor
from moqe.recipe import Expert, parse_recipe
from moqe.runtimes.reference import install, share
from moqe.store import read_json
from moqe.tasks import LanguageTask
from moqe.tasks.expert_maker import ExpertMaker

Content = dict[str, Any]
LAST = "model.layers.1.mlp.down_proj.weight"


def make(content: Content, experts: list[Content], folder: Path) -> MixtureFolder:
    """Make experts only: no losses, no routers."""
    content["experts"] = experts
    LanguageTask(parse_recipe(content), folder).make_experts(Silent())
    return MixtureFolder(folder)


def weights(place: MixtureFolder, expert: str, name: str = LAST) -> torch.Tensor:
    loaded = open_expert(place.expert(expert)).load(name)
    return loaded if isinstance(loaded, torch.Tensor) else loaded.dequantize()


def gptq(name: str, **options: Any) -> Content:
    return {"name": name, "method": "gptq", "scheme": "w4a16", "group_size": 64} | options


def test_existing_checkpoints_become_experts(recipe_content: Content, built: Path, tmp_path: Path) -> None:
    theirs = [
        {"name": "folder", "checkpoint": str(built / "experts" / "gptq")},
        {"name": "file", "checkpoint": str(built / "experts" / "kq")},
    ]
    recipe_content["experts"] = [*theirs, recipe_content["experts"][1]]
    result = moqe.build(parse_recipe(recipe_content), tmp_path / "m")
    found = result.verdict.headline.experts
    original = read_json(built / "verdict.json")["protocols"]["prefix-16"]["experts"]
    assert found["folder"] == pytest.approx(original["gptq"], abs=1e-9)
    assert found["file"] == pytest.approx(original["kq"], abs=1e-9)
    assert moqe.load(tmp_path / "m").generate("one two", expert="file", max_new_tokens=2).expert == "file"


def test_a_sequential_expert_sees_its_own_prefix_and_resumes(recipe_content: Content, tmp_path: Path) -> None:
    experts = [gptq("plain"), gptq("own", sequential=True)]
    place = make(recipe_content, experts, tmp_path / "a")
    first = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(weights(place, "plain", first), weights(place, "own", first))  # same inputs so far
    assert not torch.equal(weights(place, "plain"), weights(place, "own"))

    other = MixtureFolder(tmp_path / "b")
    with pytest.raises(KeyboardInterrupt):
        interrupted(recipe_content, experts, other.path)
    make(recipe_content, experts, other.path)
    assert torch.equal(weights(place, "own"), weights(other, "own"))


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8"])
def test_a_sequential_prefix_runs_as_the_expert_does(
    scheme: str, recipe_content: Content, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the second block was calibrated on is what the finished expert's first block makes of the same windows."""
    seen: list[torch.Tensor] = []
    observed = ExpertMaker._quantize

    def keep(self: ExpertMaker, expert: Expert, block: CalibratedBlock) -> BlockResult:
        if block.index == 1:
            parts = block.statistics["self_attn.q_proj"].values()
            seen.append(torch.stack([part.absmax for part in parts]).amax(0))
        return observed(self, expert, block)

    monkeypatch.setattr(ExpertMaker, "_quantize", keep)
    expert = {"name": "own", "method": "gptq", "scheme": scheme, "sequential": True}
    recipe_content["experts"] = [expert | ({"group_size": 64} if scheme == "w4a8" else {})]
    task = LanguageTask(parse_recipe(recipe_content), tmp_path)
    task.make_experts(Silent())

    model: Any = share(task.decoder.full())
    install(model, open_expert(MixtureFolder(tmp_path).expert("own")), "own")
    inputs: list[torch.Tensor] = []
    second = model.model.layers[1].self_attn.q_proj
    second.register_forward_pre_hook(lambda _, given: inputs.append(given[0]), prepend=True)  # before it is rounded
    with torch.no_grad():
        model(task.splits()["calibration"].tokens)
    torch.testing.assert_close(seen[0], inputs[0].flatten(0, 1).abs().amax(0), rtol=1e-3, atol=1e-3)
    assert not task.decoder._blocks[0].self_attn.q_proj._forward_pre_hooks  # the base model's block is itself again


def interrupted(content: Content, experts: list[Content], folder: Path) -> None:
    """Make experts until the first block of the sequential one is written."""
    write = CompressedTensorsWriter.write

    def stop_after_first(self: CompressedTensorsWriter, block: int, tensors: Any) -> None:
        write(self, block, tensors)
        if self.folder.name == "own" and block == 0:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CompressedTensorsWriter, "write", stop_after_first)
        make(content, experts, folder)


def test_calibration_weights_choose_domains(recipe_content: Content, tmp_path: Path) -> None:
    only = {"code": 1.0, "prose": 0.0, "numbers": 0.0}
    place = make(recipe_content, [gptq("all"), gptq("coder", calibration=only)], tmp_path)
    tokens = [read_json(place.certificate(name))["layers"][0]["seen"] for name in ("all", "coder")]
    assert tokens[1] == pytest.approx(tokens[0] / 3)
    assert not torch.equal(weights(place, "all"), weights(place, "coder"))


def test_a_layer_that_cannot_be_done_stops_or_is_certified(recipe_content: Content, tmp_path: Path) -> None:
    nothing = {"code": 0.0, "prose": 0.0, "numbers": 0.0}
    with pytest.raises(UnsupportedLayer, match=r"layers\.0\.self_attn\.q_proj.*on_unsupported"):
        make(recipe_content, [gptq("e", calibration=nothing)], tmp_path / "stop")
    keep = make(recipe_content, [gptq("e", calibration=nothing, on_unsupported="keep"), gptq("f")], tmp_path / "keep")
    certificate = read_json(keep.certificate("e"))
    assert certificate["substituted_share"] == 1.0
    assert {layer["method_used"] for layer in certificate["layers"]} == {"keep"}
    assert not isinstance(open_expert(keep.expert("e")).load(LAST), IntegerTensor)


def test_block_fallback_is_listed(recipe_content: Content, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(recipe_content["base"], base)
    config = json.loads((base / "config.json").read_text())
    config["intermediate_size"] = 96  # three blocks of 32, no super-block
    (base / "config.json").write_text(json.dumps(config))
    stored = load_file(base / "model.safetensors")
    for name, tensor in stored.items():
        if "gate_proj" in name or "up_proj" in name:
            stored[name] = tensor[:96].clone()
        elif "down_proj" in name:
            stored[name] = tensor[:, :96].clone()
    save_file(stored, base / "model.safetensors", metadata={"format": "pt"})
    recipe_content["base"] = str(base)
    expert = {"name": "k", "method": "kquants", "scheme": "q4_k"}
    with pytest.raises(UnsupportedLayer, match=r"down_proj.*block_fallback"):
        make(recipe_content, [expert], tmp_path / "stop")
    place = make(recipe_content, [expert | {"block_fallback": "q4_0"}], tmp_path / "m")
    layers = {layer["name"]: layer for layer in read_json(place.certificate("k"))["layers"]}
    assert layers[LAST]["scheme_used"] == "q4_0"
    assert "q4_0" in layers[LAST]["substituted"]
    assert layers["model.layers.1.mlp.up_proj.weight"]["scheme_used"] == "q4_k"
