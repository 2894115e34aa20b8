"""llama.cpp as a runtime, on the bundled model with plainly rounded 4-bit weights."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from moqe.bundled import bundled_model
from moqe.data.bundled import bundled_documents
from moqe.errors import CheckpointError, DataError, MissingExtra
from moqe.formats import CompressedTensorsWriter, open_expert
from moqe.formats.gguf_export import write_gguf
from moqe.quantized import IntegerTensor, Quantized
from moqe.runtimes.llamacpp import LlamaCppRuntime
from moqe.runtimes.reference import ReferenceRuntime
from moqe.schemes import scheme

FOUR_BITS = scheme("w4a16", 32)


def rounded(weight: Tensor) -> IntegerTensor:
    groups = weight.float().view(len(weight), -1, 32)
    scale = (groups.abs().amax(-1) / 7).bfloat16()
    codes = (groups / scale.float()[..., None]).round().clamp(-8, 7)
    return IntegerTensor(codes.to(torch.int8).view_as(weight), scale, None, FOUR_BITS)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> ReferenceRuntime:
    """The expert in the reference runtime."""
    base, folder = bundled_model("tiny-qwen3"), tmp_path_factory.mktemp("expert")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    blocks = model.config.num_hidden_layers
    writer = CompressedTensorsWriter(folder / "e", base, folder / "shared", FOUR_BITS, blocks)
    weights = load_file(base / "model.safetensors")
    for index in range(blocks):
        mine: dict[str, Quantized | Tensor] = {
            name: rounded(value) if value.dim() > 1 else value
            for name, value in weights.items()
            if f"layers.{index}." in name
        }
        writer.write(index, mine)
    writer.finish()
    return ReferenceRuntime(model, open_expert(folder / "e"))


@pytest.fixture(scope="module")
def file(reference: ReferenceRuntime, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same expert as a GGUF file."""
    path = tmp_path_factory.mktemp("gguf") / "expert.gguf"
    assert reference._expert is not None
    assert not write_gguf(path, reference._expert, bundled_model("tiny-qwen3")).rounded
    return path


@pytest.fixture(scope="module")
def llama(file: Path) -> Iterator[LlamaCppRuntime]:
    runtime = LlamaCppRuntime(file, threads=1, context_tokens=256)
    yield runtime
    runtime.release()


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    """Twelve windows of text the model has not seen, (12, 96)."""
    tokenizer = AutoTokenizer.from_pretrained(bundled_model("tiny-qwen3"))
    documents = itertools.islice(bundled_documents("bundled:python-topics/test"), 12)
    return torch.tensor([tokenizer(document.text)["input_ids"][:96] for document in documents])


def test_perplexity_is_the_references(llama: LlamaCppRuntime, reference: ReferenceRuntime, tokens: Tensor) -> None:
    ours, theirs = reference.score(tokens), llama.score(tokens)
    assert theirs.shape == ours.shape
    assert float((theirs.mean() - ours.mean()).exp()) == pytest.approx(1, abs=0.005)
    assert float((theirs - ours).abs().mean()) < 0.05


def test_losses_are_those_of_the_logits(llama: LlamaCppRuntime, tokens: Tensor) -> None:
    part = tokens[:2]
    logits = llama.logits(part)
    assert logits.shape == (*part.shape, len(llama._head))
    expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), part[:, 1:].flatten(), reduction="none")
    torch.testing.assert_close(llama.score(part).flatten(), expected, atol=1e-4, rtol=0)


def test_logits_are_llama_cpps_own(llama: LlamaCppRuntime, tokens: Tensor) -> None:
    """What the engine says of the tokens it generates is what the head makes of its hidden states."""
    prompt = tokens[0, :50]
    assert llama.generate(prompt[None], 1)  # starts the engine
    assert llama._generating is not None
    body = {"prompt": prompt.tolist(), "n_predict": 6, "temperature": 0, "n_probs": 1, "return_tokens": True}
    answer = llama._generating.post("completion", body | {"samplers": ["temperature"], "cache_prompt": False})
    steps = answer["completion_probabilities"]
    ids = torch.tensor([step["id"] for step in steps])
    logits = llama.logits(torch.cat([prompt, ids])[None])[0, len(prompt) - 1 : -1].log_softmax(-1)
    ours = logits.gather(1, ids[:, None])[:, 0]
    torch.testing.assert_close(ours, torch.tensor([step["logprob"] for step in steps]), atol=0.1, rtol=0)


def test_generation(llama: LlamaCppRuntime, tokens: Tensor) -> None:
    prompt = tokens[3:4, :40]
    text = llama.generate(prompt, 12)
    assert len(text) == 12
    assert llama.generate(prompt, 12) == text
    assert llama.generate(prompt, 12, stop=[text[5]]) == text[: text.index(text[5])]
    logits = llama.logits(torch.cat([prompt[0], torch.tensor(text)])[None])[0, 39:-1]
    behind = logits.max(-1).values - logits.gather(1, torch.tensor(text)[:, None])[:, 0]
    assert float(behind.max()) < 0.1  # greedy, but for near ties
    drawn = llama.generate(prompt, 12, temperature=1.5, seed=3)
    assert drawn != text
    assert llama.generate(prompt, 12, temperature=1.5, seed=3) == drawn
    assert llama.generate(prompt, 12, temperature=1.5, seed=4) != drawn


def test_draws_come_from_all_tokens(llama: LlamaCppRuntime, tokens: Tensor) -> None:
    """Without llama.cpp's own filters, which would keep a hot draw among the likeliest tokens."""
    prompt = tokens[:1, :20]
    ranks = llama.logits(prompt)[0, -1].argsort(descending=True).argsort()
    drawn = [llama.generate(prompt, 1, temperature=20.0, seed=seed) for seed in range(8)]
    assert max(int(ranks[token]) for (token,) in drawn) > 40


def test_released_engines_start_again(file: Path, tokens: Tensor) -> None:
    runtime = LlamaCppRuntime(file, threads=1, context_tokens=128)
    before = runtime.score(tokens[:1])
    runtime.release()
    assert runtime._scoring is None
    torch.testing.assert_close(runtime.score(tokens[:1]), before, rtol=0, atol=0)


def test_inputs_that_do_not_fit_are_refused(llama: LlamaCppRuntime) -> None:
    with pytest.raises(DataError, match="300 tokens do not fit the context of 256"):
        llama.score(torch.ones(1, 301, dtype=torch.int64))
    with pytest.raises(DataError, match="do not fit"):
        llama.generate(torch.ones(1, 250, dtype=torch.int64), 10)
    with pytest.raises(DataError, match="at least 2 tokens"):
        llama.score(torch.ones(1, 1, dtype=torch.int64))


def test_a_damaged_file_is_named(file: Path, tmp_path: Path, tokens: Tensor) -> None:
    whole = file.read_bytes()
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(whole.replace(b"qwen3.block_count", b"qwen3.block_coun_"))
    with pytest.raises(CheckpointError, match=r"damaged\.gguf cannot be loaded by llama\.cpp"):
        LlamaCppRuntime(damaged).score(tokens)


def test_without_the_package_the_extra_is_named(file: Path, tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(MissingExtra, match=r"pip install '\.\[gguf\]'"):
        LlamaCppRuntime(file).score(tokens)
