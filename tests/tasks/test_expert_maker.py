"""What a recipe says about an expert's numbers reaches its files: the width of scales, the precision of statistics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moqe.errors import RecipeError
from moqe.folder import CERTIFICATE
from moqe.formats import open_expert
from moqe.methods import check
from moqe.methods.block import quantize_block
from moqe.models.device import product_dtype
from moqe.progress import Silent
from moqe.quantized import IntegerTensor
from moqe.recipe import Expert, Recipe, parse_recipe
from moqe.store import read_json
from moqe.tasks import LanguageTask

RTN = {"method": "rtn", "scheme": "w4a16", "group_size": 64}
GPTQ = {"name": "gptq", "method": "gptq", "scheme": "w4a16", "group_size": 64}


def make(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Make the experts and open them, by name."""
    LanguageTask(recipe, folder).make_experts(Silent())
    return {expert.name: open_expert(folder / "experts" / expert.name) for expert in recipe.experts}


@pytest.fixture
def content(tiny_base: Path, texts: Path) -> dict[str, Any]:
    from tests.conftest import recipe_for

    return recipe_for(tiny_base, texts)


def test_scales_of_32_bits_are_stored_as_they_are(content: dict[str, Any], tiny_base: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    family = [
        {"name": "narrow", **RTN},
        {"name": "wide", **RTN, "scale_bits": 32},
        {"name": "trained", "codes_of": "wide", "distill": {"steps": 1, "evaluate_every": 1}},
    ]
    experts = make(parse_recipe(content | {"experts": family}), tmp_path / "m")
    name = "model.layers.0.mlp.down_proj.weight"
    with safe_open(tiny_base / "model.safetensors", "pt") as file:
        weight = file.get_tensor(name).float()
    by_hand = weight.view(len(weight), -1, 64).abs().amax(-1) / 7.5
    tensors = {expert: files.load(name) for expert, files in experts.items()}
    assert all(isinstance(tensor, IntegerTensor) for tensor in tensors.values())
    assert tensors["narrow"].scale.dtype == torch.bfloat16
    assert tensors["wide"].scale.dtype == tensors["trained"].scale.dtype == torch.float32
    torch.testing.assert_close(tensors["wide"].scale, by_hand, rtol=1e-6, atol=0)
    assert torch.equal(tensors["trained"].codes, tensors["wide"].codes)
    bits = {
        expert: read_json(tmp_path / "m" / "experts" / expert / CERTIFICATE)["bits_per_weight"] for expert in experts
    }
    assert bits == {"narrow": 4.25, "wide": 4.5, "trained": 4.5}


def test_scale_bits_are_refused_where_blocks_have_their_own() -> None:
    with pytest.raises(RecipeError, match="fixed block layout"):
        check(Expert(name="x", method="kquants", scheme="q4_0", scale_bits=32))


def test_scale_bits_and_the_precision_of_statistics_are_for_texts(content: dict[str, Any]) -> None:
    images = {"base": "timm:x", "task": "image-classification", "data": content["data"]}
    images["data"] = {key: value for key, value in content["data"].items() if key != "window"}
    expert = {"name": "a", "method": "ptq", "scheme": "w8a8"}
    with pytest.raises(RecipeError, match="scale_bits has no effect where task is image-classification"):
        parse_recipe(images | {"experts": [expert | {"scale_bits": 32}]})
    images["data"] |= {"calibration_precision": "bfloat16"}
    with pytest.raises(RecipeError, match="calibration_precision has no effect where task is image-classification"):
        parse_recipe(images | {"experts": [expert]})


def test_options_that_came_later_change_no_hash_while_they_are_not_used(content: dict[str, Any]) -> None:
    plain = parse_recipe(content | {"experts": [{"name": "a", **RTN}]})
    assert "scale_bits" not in str(plain.model_dump())
    assert "calibration_precision" not in str(plain.model_dump())
    stated = content | {"data": content["data"] | {"calibration_precision": "float32"}}
    assert parse_recipe(stated | {"experts": [{"name": "a", **RTN}]}).hash == plain.hash
    wide = parse_recipe(content | {"experts": [{"name": "a", **RTN, "scale_bits": 32}]})
    rounded = content | {"data": content["data"] | {"calibration_precision": "bfloat16"}}
    assert len({plain.hash, wide.hash, parse_recipe(rounded | {"experts": [{"name": "a", **RTN}]}).hash}) == 3


def test_statistics_in_bfloat16_make_nearly_the_same_expert(content: dict[str, Any], tmp_path: Path) -> None:
    found = {}
    for precision in ("float32", "bfloat16"):
        data = content["data"] | {"calibration_precision": precision}
        recipe = parse_recipe(content | {"data": data, "experts": [GPTQ]})
        found[precision] = make(recipe, tmp_path / precision)["gptq"]
    codes = {
        precision: torch.cat([files.load(name).codes.flatten() for name in files.names() if "proj" in name])
        for precision, files in found.items()
    }
    same = float((codes["float32"] == codes["bfloat16"]).float().mean())
    assert same > 0.9
    if product_dtype("cpu", "auto") == torch.bfloat16:
        assert same < 1.0  # the option reached the statistics


def test_experts_that_would_get_the_same_codes_are_quantized_once(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moqe.tasks import expert_maker

    made: list[str] = []

    def watched(*args: Any, **options: Any) -> Any:
        made.append(args[3].name)
        return quantize_block(*args, **options)

    monkeypatch.setattr(expert_maker, "quantize_block", watched)
    family = [
        {"name": "twin", **RTN, "distill": {"steps": 1, "evaluate_every": 1}},
        {"name": "rtn", **RTN},
        {"name": "wide", **RTN, "scale_bits": 32},
        {**GPTQ, "calibration": {"prose": 2.0}},
        {**GPTQ, "name": "even"},
    ]
    experts = make(parse_recipe(content | {"experts": family}), tmp_path / "m")
    blocks = len(made) // 4
    assert made == ["twin", "wide", "gptq", "even"] * blocks
    name = "model.layers.0.mlp.down_proj.weight"
    twin, rtn = experts["twin"].load(name), experts["rtn"].load(name)
    assert isinstance(twin, IntegerTensor)
    assert isinstance(rtn, IntegerTensor)
    assert torch.equal(twin.codes, rtn.codes)
    certificates = [read_json(tmp_path / "m" / "experts" / n / CERTIFICATE) for n in ("twin", "rtn")]
    assert certificates[0]["layers"] == certificates[1]["layers"]
    assert [certificate["expert"] for certificate in certificates] == ["twin", "rtn"]
