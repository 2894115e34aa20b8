"""Checkpoints of others as experts: the model that is judged is the checkpoint, in every runtime, or it is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import moqe
from moqe.errors import CheckpointError
from moqe.formats import open_expert, same_computation
from moqe.formats.compressed_tensors import SHARED_TENSORS
from moqe.formats.gguf_export import write_gguf
from moqe.models.shared import open_shared
from moqe.runtimes.texts import TEXT_RUNTIMES

HEAD = "lm_head.weight"
TOKENS = torch.arange(96).view(2, 48) * 7 % 300 + 5


def checkpoint(base: Path, folder: Path, head: float | None = None, **config: Any) -> Path:
    """The base as somebody else may have saved it: with a head of its own, so many times the embedding, or a changed
    config."""
    from transformers import AutoModelForCausalLM

    shutil.copytree(base, folder)
    if head is not None:
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        assert model.config.tie_word_embeddings
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.detach() * head)
        model.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def losses(built: Path, runtime: str, expert: Path) -> torch.Tensor:
    """Of an expert on the parts that a built mixture's experts share."""
    shared = open_shared(built / "shared", built / "shared" / SHARED_TENSORS)
    return TEXT_RUNTIMES[runtime](shared.model, "cpu").open(open_expert(expert), "theirs").score(TOKENS)


def test_a_head_of_its_own_is_used_everywhere(built: Path, tiny_base: Path, tmp_path: Path) -> None:
    own = checkpoint(tiny_base, tmp_path / "own", head=0.5)
    expected = losses(built, "reference", own)
    assert (expected - losses(built, "reference", tiny_base)).abs().max() > 0.1
    assert torch.allclose(losses(built, "packed-float32", own), expected, atol=1e-4)
    written = write_gguf(tmp_path / "own.gguf", open_expert(own), built / "shared")
    assert not written.rounded
    file = open_expert(tmp_path / "own.gguf")
    assert HEAD in file.names()
    assert torch.allclose(losses(built, "reference", tmp_path / "own.gguf"), expected, atol=1e-5)


def test_a_head_that_is_the_embedding_is_kept_once(built: Path, tiny_base: Path, tmp_path: Path) -> None:
    same = checkpoint(tiny_base, tmp_path / "same", head=1.0)
    assert HEAD in open_expert(same).names()
    shared = open_shared(built / "shared", built / "shared" / SHARED_TENSORS)
    engine = TEXT_RUNTIMES["packed-float32"](shared.model, "cpu")
    runtimes: list[Any] = [engine.open(open_expert(path), "theirs") for path in (same, built / "experts" / "gptq")]
    for runtime in runtimes:
        runtime.score(TOKENS)
    heads = [runtime._parts().head for runtime in runtimes]
    assert heads[0] is heads[1]
    write_gguf(tmp_path / "same.gguf", open_expert(same), built / "shared")
    assert HEAD not in open_expert(tmp_path / "same.gguf").names()


@pytest.mark.parametrize(
    ("change", "said", "gguf_said"),
    [
        (
            {"rope_parameters": {"rope_theta": 777.0, "rope_type": "default"}},
            r"has rope_parameters.rope_theta 777.0 and the base",
            r"has qwen3.rope.freq_base 777.0",
        ),
        ({"rms_norm_eps": 0.01}, r"has rms_norm_eps 0.01", r"has qwen3.attention.layer_norm_rms_epsilon 0.009999"),
        ({"hidden_act": "gelu"}, r"has hidden_act gelu", None),
    ],
)
def test_another_computation_is_refused(
    change: dict[str, Any], said: str, gguf_said: str | None, tiny_base: Path, tmp_path: Path
) -> None:
    variant = checkpoint(tiny_base, tmp_path / "variant", **change)
    with pytest.raises(CheckpointError, match=said):
        same_computation(tiny_base, variant)
    if gguf_said:
        write_gguf(tmp_path / "variant.gguf", open_expert(variant), variant)
        with pytest.raises(CheckpointError, match=gguf_said):
            same_computation(tiny_base, tmp_path / "variant.gguf")


def test_a_build_refuses_it_and_takes_what_differs_in_nothing_that_counts(
    recipe_content: dict[str, Any], tiny_base: Path, built: Path, tmp_path: Path
) -> None:
    checkpoint(tiny_base, tmp_path / "variant", rms_norm_eps=0.01)
    recipe_content["experts"] = [{"name": "theirs", "checkpoint": str(tmp_path / "variant")}]
    with pytest.raises(CheckpointError, match=r"has rms_norm_eps 0\.01"):
        moqe.build(moqe.parse_recipe(recipe_content), tmp_path / "m")
    same_computation(
        tiny_base, checkpoint(tiny_base, tmp_path / "longer", max_position_embeddings=9999, dtype="float16")
    )
    for expert in (built / "experts").iterdir():
        same_computation(tiny_base, expert)
    (tmp_path / "stateless").mkdir()
    same_computation(tiny_base, tmp_path / "stateless")
    (tmp_path / "stateless" / "config.json").write_text("{}")
    same_computation(tiny_base, tmp_path / "stateless")
    (tmp_path / "stateless" / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(CheckpointError, match=r"config\.json is not a known config"):
        same_computation(tiny_base, tmp_path / "stateless")


def test_an_older_way_to_say_the_same_is_accepted(tiny_base: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig

    older = checkpoint(tiny_base, tmp_path / "older")
    content = json.loads((older / "config.json").read_text())
    theta = AutoConfig.from_pretrained(tiny_base).rope_parameters["rope_theta"]
    for key in ("rope_parameters", "layer_types", "head_dim"):
        content.pop(key, None)
    content |= {"rope_theta": theta, "rope_scaling": None, "head_dim": AutoConfig.from_pretrained(tiny_base).head_dim}
    (older / "config.json").write_text(json.dumps(content))
    same_computation(tiny_base, older)
    (older / "config.json").write_text(json.dumps(content | {"rope_theta": theta * 2}))
    with pytest.raises(CheckpointError, match=r"has rope_parameters\.rope_theta"):
        same_computation(tiny_base, older)
