from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import moqe.bundled
from moqe.bundled import bundled_model
from moqe.data.bundled import bundled_documents
from moqe.data.windows import begin_token, pack_windows
from moqe.errors import ModelError, RecipeError
from moqe.store import disk_bytes, read_json


@pytest.fixture(scope="module")
def folder():
    return bundled_model("tiny-qwen3")


def test_it_fits_in_the_wheel(folder):
    assert disk_bytes(folder) <= 8 * 2**20


def test_plain_transformers_loads_it_and_it_predicts_held_out_text(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert model.config.model_type == "qwen3"
    documents = list(bundled_documents("bundled:python-topics/test"))
    samples = pack_windows(documents, tokenizer, 256, max_samples=8)
    with torch.inference_mode():
        logits = model.float()(samples.tokens).logits[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, samples.tokens[:, 1:].flatten())
    assert loss < 3.8  # an untrained model has ln 4096 = 8.3


def test_the_tokenizer_is_lossless_and_splits_like_qwen2(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "def main():\n    return x1234  # don't — 東京 🙂\n\n\tend  "
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert begin_token(tokenizer) == []
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|endoftext|>", 4095)
    digits = [tokenizer.decode([i]) for i in tokenizer("1234")["input_ids"]]
    assert digits == ["1", "2", "3", "4"]


def test_held_out_numbers_are_stated(folder):
    report = read_json(folder / "training.json")
    assert set(report["held_out"]) == {"code", "docstrings", "reference", "all"}
    assert 0 < report["held_out"]["all"]["bits_per_byte"] < 2


def test_an_unknown_name():
    with pytest.raises(RecipeError, match="unknown bundled model 'tiny-qwen'; did you mean 'tiny-qwen3'"):
        bundled_model("tiny-qwen")


def test_a_damaged_file_is_found(tmp_path, monkeypatch, folder):
    copy = tmp_path / "tiny-qwen3"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(moqe.bundled, "__file__", str(tmp_path / "__init__.py"))
    assert bundled_model("tiny-qwen3") == copy
    with (copy / "model.safetensors").open("r+b") as handle:
        handle.truncate(1000)
    with pytest.raises(ModelError, match=r"model\.safetensors is missing or damaged"):
        bundled_model("tiny-qwen3")
