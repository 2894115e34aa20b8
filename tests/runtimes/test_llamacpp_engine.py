"""Whole mixtures in llama.cpp: experts written as GGUF on the way, the base beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import moqe
from moqe.errors import ModelError
from moqe.evaluate import read_losses
from moqe.folder import MixtureFolder
from moqe.formats.gguf_files import GgufFiles
from moqe.models.skeleton import build_skeleton
from moqe.runtimes.llamacpp import LlamaCppRuntime
from moqe.runtimes.llamacpp_engine import LlamaCppEngine


def test_a_mixture_answers_in_llama_cpp(built: Path) -> None:
    exact, mixture = moqe.load(built), moqe.load(built, runtime="llama.cpp")
    text = "the old river walked slowly into one green morning plus two houses"
    for name in mixture.experts:
        assert mixture.score(text, expert=name).nats == pytest.approx(exact.score(text, expert=name).nats, rel=0.01)
    assert mixture.generate("one two", max_new_tokens=4).token_ids
    assert isinstance(mixture.runtime("gptq"), LlamaCppRuntime)
    assert mixture.runtime("kq").path == built / "experts" / "kq"  # a GGUF file is not written again


def test_the_base_is_written_as_it_is_stored(tiny_base: Path) -> None:
    from transformers import AutoModelForCausalLM

    engine = LlamaCppEngine(build_skeleton(tiny_base, torch.float32))
    runtime = engine.open(None, "base")
    assert isinstance(runtime, LlamaCppRuntime)
    written = GgufFiles(runtime.path)
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        assert torch.equal(written.load(name).float(), parameter), name
    tokens = torch.arange(16)[None] * 17 % 300
    with torch.no_grad():
        torch.testing.assert_close(runtime.logits(tokens), model(tokens).logits, atol=0.3, rtol=0)


def test_a_loss_table_by_llama_cpp(recipe_content: dict[str, Any], tmp_path: Path) -> None:
    experts = [expert for expert in recipe_content["experts"] if expert["name"] in ("gptq", "kq")]
    recipe = recipe_content | {"runtime": "llama.cpp", "experts": experts, "router": {"preset": "tuned", "epochs": 1}}
    recipe["data"] |= {"router_samples": 12, "test_samples": 6}
    moqe.build(moqe.parse_recipe(recipe), tmp_path / "m")
    table = read_losses(MixtureFolder(tmp_path / "m").losses, "test", "whole", "nats_per_token")
    assert (table.runtime, table.experts) == ("llama.cpp", ("gptq", "kq"))


def test_other_devices_are_refused(tiny_base: Path) -> None:
    with pytest.raises(ModelError, match="cuda was asked for"):
        LlamaCppEngine(build_skeleton(tiny_base, torch.float32), "cuda")
