"""Recipes: each parses, its experts exist; the paper's for language run dry on a model of that kind and size."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import LlamaConfig, PreTrainedConfig, Qwen3Config

import moqe
from moqe.methods import check

FOLDER = Path(__file__).parents[1] / "recipes"
RECIPES = sorted((FOLDER / "language").glob("*.yaml"))
BUNDLED = sorted(FOLDER.glob("*.yaml"))


def qwen3(hidden: int, intermediate: int, layers: int, heads: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    )


CONFIGS: dict[str, PreTrainedConfig] = {
    "Qwen/Qwen3-0.6B": qwen3(1024, 3072, 28, 16),
    "Qwen/Qwen3-1.7B": qwen3(2048, 6144, 28, 16),
    "Qwen/Qwen3-4B": qwen3(2560, 9728, 36, 32),
    "meta-llama/Llama-3.2-3B": LlamaConfig(
        vocab_size=128256,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    ),
}
PARAMETERS = {"Qwen/Qwen3-0.6B": 0.596e9, "Qwen/Qwen3-1.7B": 1.72e9, "Qwen/Qwen3-4B": 4.02e9}


@pytest.mark.parametrize("path", BUNDLED, ids=lambda path: path.stem)
def test_recipes_of_the_bundled_model_run_dry(path: Path) -> None:
    recipe = moqe.load_recipe(path)
    assert set(moqe.plan(recipe).estimate.expert_bytes) == {expert.name for expert in recipe.experts} != set()


def test_all_tables_are_there() -> None:
    names = {path.stem for path in RECIPES}
    models = ("qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "llama-3.2-3b")
    assert names == {f"{model}-{bits}-{n}" for model in models for bits in ("int8", "int4") for n in (4, 5)}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_whole(path: Path) -> None:
    recipe = moqe.load_recipe(path)
    schemes = [check(expert) for expert in recipe.experts]
    assert len(recipe.experts) == int(path.stem[-1])
    assert {scheme.weight_bits for scheme in schemes} == {8 if "int8" in path.stem else 4}
    assert recipe.router.preset == "paper"
    assert recipe.base in CONFIGS


@pytest.mark.parametrize("base", CONFIGS)
def test_dry_run_on_a_config_of_that_size(base: str, tmp_path: Path) -> None:
    CONFIGS[base].architectures = ["Qwen3ForCausalLM" if "Qwen" in base else "LlamaForCausalLM"]
    CONFIGS[base].save_pretrained(tmp_path)
    for path in RECIPES:
        recipe = moqe.load_recipe(path)
        if recipe.base != base:
            continue
        found = moqe.plan(recipe.model_copy(update={"base": str(tmp_path)})).estimate
        if base in PARAMETERS:
            assert found.parameters == pytest.approx(PARAMETERS[base], rel=0.01)
        assert set(found.expert_bytes) == {expert.name for expert in recipe.experts}
        assert found.ram_bytes < 24 * 2**30  # what the design promises for the largest of them
