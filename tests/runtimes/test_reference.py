from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moqe.errors import CheckpointError, DataError, ModelError, NumericalError
from moqe.models.activations import quantize_activations
from moqe.quantized import IntegerTensor, Quantized
from moqe.runtimes import scoring
from moqe.runtimes.reference import ReferenceRuntime
from moqe.schemes import Scheme

TOKENS = torch.arange(5 * 16).view(5, 16) * 13 % 512


def tiny(architecture: str = "Qwen3", tied: bool = True, **options: Any) -> Any:
    import transformers

    settings = {
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": tied,
        "initializer_range": 0.08,
    }
    config = getattr(transformers, f"{architecture}Config")(**settings, **options)
    return getattr(transformers, f"{architecture}ForCausalLM")(config).eval()


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return tiny()


class MemoryFiles:
    """An expert whose parameters are in memory: the base's, linears of the blocks rounded to `bits`."""

    format = "memory"

    def __init__(self, model: Any, bits: int = 4, activation_bits: int = 16) -> None:
        self.parameters: dict[str, Quantized | Tensor] = {}
        self.bits_of_inputs = activation_bits
        scheme = Scheme("memory", bits, activation_bits)
        for name, parameter in model.named_parameters():
            weight = parameter.detach().clone()
            if "layers" in name and weight.ndim == 2:
                scale = weight.abs().amax(1, keepdim=True) / scheme.levels[1]
                self.parameters[name] = IntegerTensor((weight / scale).round().to(torch.int8), scale, None, scheme)
            else:
                self.parameters[name] = weight

    def names(self) -> list[str]:
        return sorted(self.parameters)

    def load(self, name: str) -> Quantized | Tensor:
        return self.parameters[name]

    def activation_bits(self, name: str) -> int:
        return self.bits_of_inputs if isinstance(self.parameters[name], IntegerTensor) else 16


def straightforward(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        logits = model(tokens).logits
    chosen = torch.log_softmax(logits[:, :-1].double(), -1).gather(-1, tokens[:, 1:, None])
    return -chosen[..., 0].float()


def test_scores_are_the_negative_log_likelihoods(model: Any) -> None:
    losses = ReferenceRuntime(model).score(TOKENS)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, straightforward(model, TOKENS), rtol=1e-5, atol=1e-5)
    assert ReferenceRuntime(model).score(TOKENS[:0]).shape == (0, 15)


def test_batches_and_chunks_do_not_change_losses(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ReferenceRuntime(model).score(TOKENS)
    one_by_one = ReferenceRuntime(model, max_batch_tokens=1)
    torch.testing.assert_close(one_by_one.score(TOKENS), whole, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(scoring, "_LOGIT_ELEMENTS", 7 * 512)
    torch.testing.assert_close(ReferenceRuntime(model).score(TOKENS), whole, rtol=1e-5, atol=1e-5)
    assert torch.equal(one_by_one.score(TOKENS), one_by_one.score(TOKENS))


def test_an_expert_is_run_with_its_own_weights(model: Any) -> None:
    files = MemoryFiles(model)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    runtime = ReferenceRuntime(model, files)
    dequantized = tiny()
    dequantized.load_state_dict(
        {name: value if isinstance(value, Tensor) else value.dequantize() for name, value in files.parameters.items()},
        strict=False,
    )
    dequantized.tie_weights()
    torch.testing.assert_close(runtime.score(TOKENS), straightforward(dequantized, TOKENS), rtol=1e-5, atol=1e-5)
    assert (runtime.score(TOKENS) - ReferenceRuntime(model).score(TOKENS)).abs().max() > 1e-2
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_embeddings_and_unchanged_tensors_are_shared(model: Any) -> None:
    runtime = ReferenceRuntime(model, MemoryFiles(model))
    body = runtime._parts().body
    assert body.embed_tokens.weight is model.model.embed_tokens.weight
    assert body.layers[0].input_layernorm.weight is model.model.layers[0].input_layernorm.weight
    assert body.layers[0].mlp.up_proj.weight is not model.model.layers[0].mlp.up_proj.weight
    runtime.release()
    assert runtime._loaded is None
    assert runtime.score(TOKENS[:1]).shape == (1, 15)


def test_a_changed_tied_embedding_changes_the_head_too(model: Any) -> None:
    files = MemoryFiles(model)
    files.parameters["model.embed_tokens.weight"] = model.model.embed_tokens.weight.detach() * 2
    parts = ReferenceRuntime(model, files)._parts()
    assert parts.head.weight is parts.body.embed_tokens.weight
    assert parts.head.weight is not model.lm_head.weight


def test_experts_work_in_threads(model: Any) -> None:
    runtimes = [ReferenceRuntime(model, MemoryFiles(model, bits)) for bits in (3, 4, 5, 8)]
    alone = [runtime.score(TOKENS) for runtime in runtimes]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda runtime: runtime.score(TOKENS), runtimes * 3))
    assert all(torch.equal(losses, alone[index % 4]) for index, losses in enumerate(together))


@pytest.mark.parametrize("bits", [4, 8])
def test_activations_are_rounded_as_compressed_tensors_does(bits: int) -> None:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    inputs = torch.randn(3, 7, 64) * torch.logspace(-6, 6, 7)[:, None]
    inputs[1, 2] = 0
    inputs[0, 0, 3] = -inputs[0, 0].abs().max() * 2
    arguments = QuantizationArgs(num_bits=bits, strategy="token", dynamic=True, symmetric=True)
    scale, zero = compute_dynamic_scales_and_zp(inputs, arguments, torch.nn.Linear(64, 1))
    assert torch.equal(quantize_activations(inputs, bits), fake_quantize(inputs, scale, zero, arguments))


def test_inputs_of_a8_linears_are_rounded(model: Any) -> None:
    files = MemoryFiles(model, bits=8, activation_bits=8)
    runtime = ReferenceRuntime(model, files)
    plain = ReferenceRuntime(model, MemoryFiles(model, bits=8))
    difference = (runtime.score(TOKENS) - plain.score(TOKENS)).abs().max()
    assert 1e-4 < difference < 1
    before: list[Tensor] = []
    after: list[Tensor] = []
    linear = runtime._parts().body.layers[0].mlp.up_proj
    linear.register_forward_pre_hook(lambda module, inputs: before.append(inputs[0]), prepend=True)
    linear.register_forward_pre_hook(lambda module, inputs: after.append(inputs[0]))
    runtime.score(TOKENS[:1])
    assert torch.equal(quantize_activations(before[0], 8), after[0])
    assert not torch.equal(before[0], after[0])
    assert not ReferenceRuntime(model)._parts().body.layers[0].mlp.up_proj._forward_pre_hooks


@pytest.mark.parametrize("architecture", ["Llama", "Qwen2", "Mistral"])
def test_logits_of_other_architectures(architecture: str) -> None:
    model = tiny(architecture, tied=False)
    runtime = ReferenceRuntime(model, max_batch_tokens=20)
    with torch.no_grad():
        torch.testing.assert_close(runtime.logits(TOKENS), model(TOKENS).logits, rtol=1e-4, atol=1e-4)


def test_generation_is_greedy_or_seeded_and_stops(model: Any) -> None:
    runtime = ReferenceRuntime(model, MemoryFiles(model))
    prompt = TOKENS[:1, :8]
    new = runtime.generate(prompt, 6)
    tokens = prompt
    for token in new:
        assert int(runtime.logits(tokens)[0, -1].argmax()) == token
        tokens = torch.cat([tokens, torch.tensor([[token]])], 1)
    assert len(new) == 6
    first_of = new.index(new[2])
    assert runtime.generate(prompt, 6, stop=[new[2]]) == new[:first_of]
    drawn = runtime.generate(prompt, 12, temperature=1.5, seed=3)
    assert drawn == runtime.generate(prompt, 12, temperature=1.5, seed=3)
    assert drawn != runtime.generate(prompt, 12, temperature=1.5, seed=4)


def test_an_expert_of_another_model_is_refused(model: Any) -> None:
    files = MemoryFiles(model)
    name = "model.layers.1.mlp.up_proj.weight"
    weight = files.parameters.pop(name)
    with pytest.raises(CheckpointError, match=rf"theirs .*lacks {name}"):
        ReferenceRuntime(model, files, name="theirs").score(TOKENS)
    files.parameters[name] = torch.zeros(8, 8)
    with pytest.raises(CheckpointError, match=rf"{name} is \(8, 8\) and should be \(384, 256\)"):
        ReferenceRuntime(model, files).score(TOKENS)
    files.parameters[name] = weight
    files.parameters["model.layers.2.mlp.up_proj.weight"] = weight
    with pytest.raises(CheckpointError, match=r"has no model\.layers\.2"):
        ReferenceRuntime(model, files).score(TOKENS)


def test_numbers_that_are_not_finite_are_errors_with_the_experts_name(model: Any) -> None:
    files = MemoryFiles(model)
    files.parameters["model.layers.0.input_layernorm.weight"] = torch.full((256,), math.nan)
    with pytest.raises(NumericalError, match=r"mine.*input_layernorm"):
        ReferenceRuntime(model, files, name="mine").score(TOKENS)
    files.parameters["model.layers.0.input_layernorm.weight"] = torch.full((256,), 3e38)
    with pytest.raises(NumericalError, match="mine"):
        ReferenceRuntime(model, files, name="mine").score(TOKENS)
    with pytest.raises(NumericalError, match="mine"):
        ReferenceRuntime(model, files, name="mine").generate(TOKENS[:1], 2)


def test_windows_that_cannot_be_scored_are_refused(model: Any) -> None:
    with pytest.raises(DataError, match=r"\(5, 1\)"):
        ReferenceRuntime(model).score(TOKENS[:, :1])


def test_a_head_with_something_after_it_is_refused() -> None:
    model = tiny("Gemma2", head_dim=64, final_logit_softcapping=1.0)
    with pytest.raises(ModelError, match="Gemma2ForCausalLM"):
        ReferenceRuntime(model).score(TOKENS)


def test_products_in_bfloat16_are_those_of_logits_and_losses_alike(model: Any) -> None:
    rounded, exact = ReferenceRuntime(model, products=torch.bfloat16), ReferenceRuntime(model)
    assert (rounded.name, exact.name) == ("bfloat16", "reference")
    logits = rounded.logits(TOKENS)
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, exact.logits(TOKENS))
    torch.testing.assert_close(logits, exact.logits(TOKENS), rtol=0.1, atol=0.1)
    losses = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten(), reduction="none")
    torch.testing.assert_close(losses.view(len(TOKENS), -1), rounded.score(TOKENS), rtol=0.02, atol=0.02)
    assert len(rounded.generate(TOKENS[:1, :4], 3)) == 3
