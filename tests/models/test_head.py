"""Architectures that change logits after the head are refused wherever body and head are run apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import WORDS
from tests.test_advise import write_documents
from transformers import GraniteConfig, GraniteForCausalLM

import moqe
from moqe.errors import ModelError
from moqe.models.head import refuse_changed_logits


@pytest.mark.parametrize("scaling", [1.0, 8.0])
def test_logits_that_are_scaled_after_the_head_are_refused(scaling: float) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = GraniteConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, logits_scaling=scaling)
    model = GraniteForCausalLM(config).eval()
    if scaling == 1.0:
        refuse_changed_logits(model)
    else:
        with pytest.raises(ModelError, match="GraniteForCausalLM changes its logits after the head"):
            refuse_changed_logits(model)


def test_advice_asks_before_it_measures(loud_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: Any) -> None:
        raise ModelError("it changes its logits")

    monkeypatch.setattr("moqe.methods.distill.student.refuse_changed_logits", refuse)
    write_documents(tmp_path / "code.jsonl", WORDS["code"], 24, "code")
    with pytest.raises(ModelError, match="it changes its logits"):
        moqe.advise(str(loud_base), [f"{tmp_path}/code.jsonl=code"], bits=[2], experts=[2], window=24, steps=2)
