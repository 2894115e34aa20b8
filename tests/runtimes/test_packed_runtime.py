"""The packed runtime says what the reference runtime says."""

from __future__ import annotations

import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moqe.errors import CheckpointError, DataError, ModelError, MoqeError, NumericalError
from moqe.formats.compressed_tensors_files import CompressedTensorsFiles
from moqe.formats.safetensors_folder import SafetensorsFolder, save_tensors
from moqe.quantized import IntegerTensor, Quantized
from moqe.runtimes import scoring
from moqe.runtimes.packed import decoder
from moqe.runtimes.packed.block import compiled_step
from moqe.runtimes.packed.decoder import require_supported
from moqe.runtimes.packed.kernel import Choice
from moqe.runtimes.packed.linear import Together
from moqe.runtimes.packed.parts import PackedSkeleton
from moqe.runtimes.packed.runtime import PackedRuntime, held_bytes
from moqe.runtimes.reference import ReferenceRuntime
from moqe.runtimes.texts import TEXT_RUNTIMES
from moqe.schemes import Scheme, scheme
from split_experts import TOKENS, open_skeleton, random_codes, surroundings, write_experts

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
SCHEMES = [
    scheme("w4a16", group_size=64),
    scheme("w4a16", group_size=32, symmetric=False),
    scheme("w3a16"),
    scheme("w8a16"),
    scheme("w8a8"),
    scheme("w4a8", symmetric=False),
]


def tiny(architecture: str = "Qwen3", **options: Any) -> Any:
    import transformers

    settings: dict[str, Any] = {
        "vocab_size": 160,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.1,
        "tie_word_embeddings": False,
    }
    config = getattr(transformers, f"{architecture}Config")(**{**settings, **options})
    model = getattr(transformers, f"{architecture}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:  # norms and biases that could be mistaken for another
            torch.nn.init.uniform_(parameter, -0.5 if name.endswith("bias") else 0.5, 1.5)
    return model


class MemoryFiles:
    """An expert whose parameters are in memory: the base's, linears of the blocks as random codes."""

    format = "memory"

    def __init__(self, model: Any, target: Scheme = SCHEMES[0], kept: str = "nothing") -> None:
        self.parameters: dict[str, Quantized | Tensor] = {}
        for name, parameter in model.named_parameters():
            quantized = "layers" in name and parameter.ndim == 2 and kept not in name
            self.parameters[name] = random_codes(*parameter.shape, target) if quantized else parameter.detach().clone()

    def names(self) -> list[str]:
        return sorted(self.parameters)

    def load(self, name: str) -> Quantized | Tensor:
        return self.parameters[name]

    def activation_bits(self, name: str) -> int:
        value = self.parameters[name]
        return value.scheme.activation_bits if isinstance(value, IntegerTensor) else 16


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return tiny()


def packed(model: Any, files: Any = None, precision: torch.dtype = FLOAT32, forced: str = "", **options: Any) -> Any:
    return PackedRuntime(PackedSkeleton(model, precision, Choice(forced)), files, **options)


def divergence(expected: Tensor, found: Tensor) -> float:
    """Mean Kullback-Leibler divergence of next-token distributions from logits, nats."""
    ours, theirs = (torch.log_softmax(logits.double(), -1) for logits in (expected, found))
    return float((ours.exp() * (ours - theirs)).sum(-1).mean())


@pytest.mark.parametrize("target", SCHEMES, ids=lambda target: f"{target.name}-{target.symmetric}")
def test_results_are_the_reference_runtimes(model: Any, target: Scheme) -> None:
    files = MemoryFiles(model, target)
    reference, exact = ReferenceRuntime(model, files), packed(model, files)
    expected = reference.logits(TOKENS)
    # An input that lies between two codes may get either one, and the next layers see that.
    close = 1e-4 if target.activation_bits == 16 else 0.2
    torch.testing.assert_close(exact.logits(TOKENS), expected, rtol=0, atol=close)
    torch.testing.assert_close(exact.score(TOKENS), reference.score(TOKENS), rtol=0, atol=close)
    assert divergence(expected, exact.logits(TOKENS)) < (1e-8 if target.activation_bits == 16 else 1e-3)
    rough = packed(model, files, BFLOAT16)
    assert 1e-9 < divergence(expected, rough.logits(TOKENS)) < 1e-2
    assert (exact.name, rough.name) == ("packed-float32", "packed")


@pytest.mark.parametrize("architecture", ["Llama", "Qwen2", "Qwen3", "Mistral"])
@pytest.mark.parametrize("tied", [True, False])
def test_architectures_are_run_as_transformers_does(architecture: str, tied: bool) -> None:
    options: dict[str, Any] = {"tie_word_embeddings": tied}
    if architecture == "Llama":
        options |= {"attention_bias": True, "mlp_bias": True}
    if architecture == "Mistral":
        options |= {"sliding_window": None, "head_dim": 48}
    if architecture == "Qwen3":
        options |= {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}
    model = tiny(architecture, **options)
    with torch.no_grad():
        expected = model(TOKENS).logits
    torch.testing.assert_close(packed(model).logits(TOKENS), expected, rtol=1e-4, atol=1e-4)
    steps = packed(model).generate(TOKENS[:1, :5], 6)
    assert steps == ReferenceRuntime(model).generate(TOKENS[:1, :5], 6)


@pytest.mark.parametrize("forced", ["tiles", "bags", "digits", "digits as columns", "vectors", "unpacked"])
def test_kernels_agree_whichever_is_chosen(model: Any, forced: str) -> None:
    target = SCHEMES[3] if forced in ("digits", "digits as columns", "vectors") else SCHEMES[1]
    files = MemoryFiles(model, target)
    runtime = packed(model, files, FLOAT32 if forced == "bags" else BFLOAT16, forced)
    found = packed_steps(runtime, TOKENS[0])
    assert divergence(ReferenceRuntime(model, files).logits(TOKENS[:1])[0], found) < 1e-2


def packed_steps(runtime: PackedRuntime, tokens: Tensor) -> Tensor:
    """Logits at every position of one text, from the cache one token at a time."""
    parts = runtime._parts()
    cache = parts.decoder.cache(1, len(tokens))
    with torch.inference_mode():
        hidden = [parts.decoder.prefill(parts.embed(tokens[None, :1]), cache)[:, 0]]
        cache.set_lengths(torch.tensor([1]))
        hidden += [parts.decoder.step(parts.embed(token[None]), cache) for token in tokens[1:]]
        return parts.head(torch.cat(hidden)).float()


def test_steps_give_what_the_whole_text_gives(model: Any) -> None:
    runtime = packed(model, MemoryFiles(model))
    torch.testing.assert_close(packed_steps(runtime, TOKENS[0]), runtime.logits(TOKENS[:1])[0], rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
@pytest.mark.filterwarnings("default:.*torch.jit:DeprecationWarning")  # torch's own, where it loads its compiler
@pytest.mark.parametrize(
    ("target", "forced"),
    [(SCHEMES[1], "tiles"), (SCHEMES[4], "integers"), (SCHEMES[4], "integers as columns")],
    ids=["w4a16", "w8a8", "w8a8 as columns"],
)
def test_compiled_steps_give_what_others_give(
    model: Any, target: Scheme, forced: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, counted = compiled_step(), Counter[str]()

    def counting(*arguments: Any) -> None:
        counted["blocks"] += 1
        steps(*arguments)

    monkeypatch.setattr(decoder, "compiled_step", lambda: counting)
    files = MemoryFiles(model, target, kept="k_proj")
    plain = packed(model, files, BFLOAT16, forced)
    compiled = PackedRuntime(PackedSkeleton(model, BFLOAT16, Choice(forced), compiled=True), files)
    assert (plain.name, compiled.name) == ("packed", "packed-compiled")
    tokens = TOKENS[0, :12]
    assert divergence(packed_steps(plain, tokens), packed_steps(compiled, tokens)) < 1e-4
    assert counted["blocks"] == 2 * 11  # two blocks, eleven steps; the first token chose kernels
    compiled.generate_batch([TOKENS[0, :9], TOKENS[1, :3]], 4)  # of unequal lengths
    assert counted["blocks"] == 2 * (11 + 2)  # three steps, of which the first chooses


def test_compiling_without_a_compiler_is_refused(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(MoqeError, match=r"finds no no-such-compiler: install .* or use packed"):
        TEXT_RUNTIMES["packed-compiled"](model, "cpu")


def test_a_batch_of_unequal_prompts_is_continued_as_each_alone(model: Any) -> None:
    runtime = packed(model, MemoryFiles(model))
    prompts = [TOKENS[0, :9], TOKENS[1, :3], TOKENS[0, 4:17]]
    alone = [runtime.generate(prompt[None], 8) for prompt in prompts]
    assert runtime.generate_batch(prompts, 8) == alone
    stop = [alone[1][3]]
    expected = [new[: new.index(stop[0])] if stop[0] in new else new for new in alone]
    assert runtime.generate_batch(prompts, 8, stop=stop) == expected
    drawn = [runtime.generate(prompt[None], 8, temperature=1.5, seed=2) for prompt in prompts]
    assert runtime.generate_batch(prompts, 8, temperature=1.5, seed=2) == drawn
    assert drawn != alone
    assert runtime.generate_batch(prompts, 0) == [[], [], []]


def test_generation_is_the_reference_runtimes(model: Any) -> None:
    files = MemoryFiles(model)
    reference, runtime = ReferenceRuntime(model, files), packed(model, files)
    for options in ({}, {"temperature": 1.2, "seed": 5}):
        assert runtime.generate(TOKENS[:1, :7], 10, **options) == reference.generate(TOKENS[:1, :7], 10, **options)
    with pytest.raises(DataError, match="at least one token"):
        runtime.generate(TOKENS[:1, :0], 3)


def test_batches_and_chunks_do_not_change_losses(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    files = MemoryFiles(model)
    whole = packed(model, files).score(TOKENS)
    monkeypatch.setattr(scoring, "_LOGIT_ELEMENTS", 5 * 160)
    torch.testing.assert_close(packed(model, files, max_batch_tokens=1).score(TOKENS), whole, rtol=1e-4, atol=1e-5)
    assert packed(model, files).score(TOKENS[:0]).shape == (0, TOKENS.shape[1] - 1)
    with pytest.raises(DataError, match="at least 2 tokens"):
        packed(model, files).score(TOKENS[:, :1])


def test_kept_layers_run_beside_packed_ones(model: Any) -> None:
    files = MemoryFiles(model, kept="k_proj")
    runtime = packed(model, files)
    torch.testing.assert_close(
        runtime.logits(TOKENS), ReferenceRuntime(model, files).logits(TOKENS), rtol=1e-4, atol=1e-4
    )
    assert isinstance(runtime._parts().decoder.blocks[0].qkv, Together)


def test_codes_head_and_embedding_are_held_once(tmp_path: Path) -> None:
    base = surroundings(tmp_path / "base", "Qwen2")
    paths = write_experts(tmp_path / "experts", base, SCHEMES[1], 3)
    skeleton = open_skeleton(base, tmp_path / "experts" / "shared")
    for precision in (FLOAT32, BFLOAT16):
        around = PackedSkeleton(skeleton, precision)
        runtimes = [PackedRuntime(around, CompressedTensorsFiles(path), name=path.name) for path in paths]
        assert not around.codes._codes  # nothing is loaded before it is used
        one, two = (runtime._parts() for runtime in runtimes[:2])
        assert one.head is two.head
        assert one.embedding.data_ptr() == two.embedding.data_ptr() == skeleton.lm_head.weight.data_ptr()
        for ours, theirs in zip(one._linears, two._linears, strict=True):
            assert ours.kernels.tensors()[0] is theirs.kernels.tensors()[0]
            assert ours.kernels.tensors()[1] is not theirs.kernels.tensors()[1]
        sizes = [held_bytes(runtimes[:count]) for count in (1, 2, 3)]
        codes = sum(linear.kernels.tensors()[0].nbytes for linear in one._linears)
        assert sizes[1] - sizes[0] == sizes[2] - sizes[1] < sizes[0] - codes
        for path, runtime in zip(paths, runtimes, strict=True):
            expected = ReferenceRuntime(skeleton, CompressedTensorsFiles(path)).logits(TOKENS)
            assert divergence(expected, runtime.logits(TOKENS)) < (1e-8 if precision == FLOAT32 else 1e-2)
        del one, two, ours, theirs
        for runtime in runtimes:
            runtime.release()
        assert not around.codes._codes


def test_an_expert_with_other_embeddings_has_its_own(model: Any) -> None:
    files = MemoryFiles(model)
    files.parameters["lm_head.weight"] = model.lm_head.weight.detach() * 2
    files.parameters["model.embed_tokens.weight"] = model.model.embed_tokens.weight.detach() + 1
    runtime = packed(model, files)
    assert runtime._parts().head is not runtime._skeleton.head()
    expected = ReferenceRuntime(model, files).logits(TOKENS)
    torch.testing.assert_close(runtime.logits(TOKENS), expected, rtol=1e-4, atol=1e-4)
    plain = MemoryFiles(model)
    assert packed(model, plain)._parts().embedding.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_experts_work_in_threads(model: Any) -> None:
    skeleton = PackedSkeleton(model, BFLOAT16)
    files = [MemoryFiles(model, target) for target in SCHEMES[:3]]
    alone = [packed(model, file, BFLOAT16).score(TOKENS) for file in files]
    runtimes = [PackedRuntime(skeleton, file) for file in files]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda runtime: runtime.score(TOKENS), runtimes * 2))
    for index, losses in enumerate(together):
        torch.testing.assert_close(losses, alone[index % 3], rtol=0.05, atol=0.05)


def test_damage_is_named(tmp_path: Path, model: Any) -> None:
    files = MemoryFiles(model)
    del files.parameters["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(CheckpointError, match=r"mine does not belong.*lacks model\.layers\.1\.mlp\.up_proj"):
        packed(model, files, name="mine").score(TOKENS)
    files.parameters["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 128)
    with pytest.raises(CheckpointError, match=r"up_proj\.weight is \(3, 128\) and should be \(192, 128\)"):
        packed(model, files).score(TOKENS)
    files.parameters["model.layers.1.mlp.up_proj.weight"] = torch.full((192, 128), torch.nan)
    with pytest.raises(NumericalError, match=r"mine: model\.layers\.1\.mlp\.up_proj\.weight is not finite"):
        packed(model, files, name="mine").score(TOKENS)
    files.parameters["model.layers.1.mlp.up_proj.weight"] = torch.full((192, 128), 3e38)
    with pytest.raises(NumericalError, match="mine: a loss is not finite"):
        packed(model, files, name="mine").score(TOKENS)
    with pytest.raises(NumericalError, match="mine: logits are not finite"):
        packed(model, files, name="mine").generate(TOKENS[:1], 2)
    base = surroundings(tmp_path / "base")
    (path,) = write_experts(tmp_path / "experts", base, SCHEMES[0], 1)
    shard = path / "scales-00002-of-00003.safetensors"
    stored = SafetensorsFolder(path)
    tensors = {name: stored.tensor(name) for name in stored.names() if stored.path(name) == shard}
    scale = "model.layers.0.mlp.up_proj.weight_scale"
    save_tensors(shard, {**tensors, scale: torch.full_like(tensors[scale], torch.inf)})
    skeleton = open_skeleton(base, tmp_path / "experts" / "shared")
    with pytest.raises(NumericalError, match=r"up_proj\.weight is not finite"):
        packed(skeleton, CompressedTensorsFiles(path)).score(TOKENS)
    shard.unlink()
    with pytest.raises(CheckpointError):
        packed(skeleton, CompressedTensorsFiles(path)).score(TOKENS)


@pytest.mark.parametrize(
    ("architecture", "options", "problem"),
    [
        ("Gemma2", {"head_dim": 32}, "its architecture is gemma2"),
        ("Llama", {"hidden_act": "gelu"}, "its activation is gelu"),
        ("Mistral", {"sliding_window": 64}, "sliding windows"),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "sliding windows"),
        ("Llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "type dynamic"),
    ],
)
def test_what_it_does_not_run_is_refused(architecture: str, options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ModelError, match=f"{problem}.*Use the reference runtime"):
        require_supported(tiny(architecture, **options).config)
