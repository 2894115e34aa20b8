"""The reference runtime: an expert's exact arithmetic in float32, the judge of every loss.

Weights are dequantized to float32; linears of a8 schemes get their inputs quantized per token. What is faithful: codes,
scales, zero points, activation rounding. What differs from a serving engine: sums are float32, not integers or
bfloat16, so neither latency nor memory is ever reported from here.

All experts of a mixture run on one skeleton, the full-precision model. A runtime holds a copy of the skeleton's modules
that shares every tensor with it, except those the expert replaces by other values: embeddings and head are held once
however many experts are loaded. The skeleton is never changed, so runtimes may work in different threads.

Cost: 4 bytes per quantized weight while loaded; `release` gives them back.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from moqe.errors import CheckpointError, DataError, ModelError, NumericalError
from moqe.formats.expert_files import ExpertFiles
from moqe.formats.safetensors_folder import in_block
from moqe.models.activations import quantize_inputs
from moqe.progress import Advance, Progress, Silent, ignore

_LOGIT_ELEMENTS = 1 << 24  # logits held at once while scoring: 64 MiB of float32


class ReferenceRuntime:
    """Runs an expert, or the base model where `expert` is None, on a full-precision skeleton. Satisfies `Runtime`.

    model: a causal language model of transformers in float32, with its head after its last layer. name: the expert's,
    for errors. max_batch_tokens: tokens per forward pass; losses are made in the same batches every time. progress:
    shows the loading of the expert and the generation of text; whoever scores many windows shows that.
    Nothing is loaded before the first use, which raises CheckpointError when the expert does not fit the skeleton.
    """

    name = "reference"

    def __init__(
        self,
        model: nn.Module,
        expert: ExpertFiles | None = None,
        *,
        name: str = "base",
        max_batch_tokens: int = 2048,
        progress: Progress | None = None,
    ) -> None:
        self._skeleton, self._expert = model, expert
        self.expert_name, self.max_batch_tokens = name, max_batch_tokens
        self._progress = progress or Silent()
        self._loaded: _Parts | None = None
        self._lock = threading.Lock()

    def model(self) -> nn.Module:
        """The expert as a module of transformers, loaded on first use; for whoever wants to look inside."""
        model: nn.Module = self._parts().model
        return model

    def release(self) -> None:
        """Give the expert's own weights back; the next use loads them again."""
        with self._lock:
            self._loaded = None

    def score(self, tokens: Tensor) -> Tensor:
        """Loss of every next token: float32 nats, (n, window - 1) on the CPU, for int64 tokens, (n, window).

        Raises NumericalError, naming the expert, when a loss is not finite.
        """
        if tokens.ndim != 2 or tokens.shape[1] < 2:
            raise DataError(f"windows to score must be (n, window) with at least 2 tokens, not {tuple(tokens.shape)}")
        losses = [self._score_batch(part) for part in self._batches(tokens)]
        if not losses:
            return torch.empty(0, tokens.shape[1] - 1)
        result = torch.cat(losses)
        if not torch.isfinite(result).all():
            raise NumericalError(f"expert {self.expert_name}: a loss is not finite; build it again or remove it")
        return result

    @torch.no_grad()
    def _score_batch(self, tokens: Tensor) -> Tensor:
        parts = self._parts()
        hidden = parts.hidden(tokens[:, :-1])  # (b, window - 1, hidden)
        flat, targets = hidden.flatten(0, 1), tokens[:, 1:].to(hidden.device).flatten()
        rows = max(1, _LOGIT_ELEMENTS // parts.vocabulary)
        losses = [
            nn.functional.cross_entropy(parts.head(positions).float(), target, reduction="none")
            for positions, target in zip(torch.split(flat, rows), torch.split(targets, rows), strict=True)
        ]
        return torch.cat(losses).view(hidden.shape[:2]).cpu()

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """Logits at every position: float32, (n, window, vocabulary) on the CPU, for int64 tokens, (n, window)."""
        parts = self._parts()
        return torch.cat([parts.head(parts.hidden(part)).float().cpu() for part in self._batches(tokens)])

    def _batches(self, tokens: Tensor) -> Iterator[Tensor]:
        rows = max(1, self.max_batch_tokens // max(1, tokens.shape[1]))
        return (part for part in torch.split(tokens, rows) if len(part))

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        seed: int = 0,
        stop: Sequence[int] = (),
    ) -> list[int]:
        """Continue a prompt, (1, t), by at most `max_new_tokens`; greedy at temperature 0, else drawn with `seed`.

        A stop token ends the text and is not returned. Raises NumericalError when logits are not finite.
        """
        parts = self._parts()
        random = torch.Generator().manual_seed(seed)
        new: list[int] = []
        inputs, cache = tokens, None
        with self._progress.track("generate", max_new_tokens) as advance:
            while len(new) < max_new_tokens:
                output = parts.body(input_ids=inputs.to(parts.device), past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                logits = parts.head(output.last_hidden_state[:, -1]).float().cpu()[0]  # (vocabulary,)
                if not torch.isfinite(logits).all():
                    raise NumericalError(
                        f"expert {self.expert_name}: logits are not finite; build it again or remove it"
                    )
                if temperature > 0:
                    token = int(torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=random))
                else:
                    token = int(logits.argmax())
                if token in stop:
                    break
                new.append(token)
                inputs = torch.tensor([[token]])
                advance(1)
            advance(max_new_tokens - len(new))
        return new

    def _parts(self) -> _Parts:
        with self._lock:
            if self._loaded is None:
                model = share(self._skeleton)
                if self._expert is not None:
                    with self._progress.track(f"load {self.expert_name}", len(self._expert.names())) as advance:
                        install(model, self._expert, self.expert_name, advance)
                self._loaded = _Parts(model)
            return self._loaded


class _Parts:
    """A model as body and head, so that logits can be made for a few positions at a time."""

    def __init__(self, model: Any) -> None:
        self.model, self.body, self.head = model, model.base_model, model.get_output_embeddings()
        self.device = self.head.weight.device
        self.vocabulary = int(self.head.weight.shape[0])
        # Ids from the whole vocabulary: a padding id alone has a zero embedding and would show nothing.
        probe = torch.arange(self.vocabulary, device=self.device)[:: max(1, self.vocabulary // 8)][None]
        with torch.no_grad():
            direct, split = model(input_ids=probe).logits, self.head(self.hidden(probe))
        # Some architectures scale or cap their logits after the head; leaving that out would be silently wrong.
        if torch.isfinite(direct).all() and not torch.allclose(direct, split, rtol=1e-4, atol=1e-4):
            raise ModelError(f"{type(model).__name__} changes its logits after the head: it is not supported")

    def hidden(self, tokens: Tensor) -> Tensor:
        """Normalised hidden states, (n, t, hidden), of tokens, (n, t)."""
        states: Tensor = self.body(input_ids=tokens.to(self.device), use_cache=False).last_hidden_state
        return states


def share(model: nn.Module) -> nn.Module:
    """A copy of a model's modules that holds the very same parameters and buffers, in evaluation mode."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, memo).eval()


def install(model: nn.Module, expert: ExpertFiles, expert_name: str, advance: Advance = ignore) -> None:
    """Give a shared copy the expert's parameters and the quantization of its activations.

    The skeleton's blocks may lie on the meta device: the expert fills them. Parameters equal to the model's stay shared
    with it. `advance` is told of each of the expert's parameters. Raises CheckpointError when the expert has parameters
    the model lacks, other shapes, or too few to cover the decoder's blocks; NumericalError when a weight is not finite.
    """
    device = next(tensor.device for tensor in model.parameters() if not tensor.is_meta)
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = expert.names()
    lacking = sorted(name for name in set(parameters) - set(names) if in_block(name))
    unknown = sorted(name for name in set(names) - set(parameters) if not _is_redundant(name, expert))
    names = [name for name in names if name in parameters]
    if lacking or unknown:
        example = f"it lacks {lacking[0]}" if lacking else f"the base model has no {unknown[0]}"
        raise CheckpointError(f"expert {expert_name} does not belong to this base model: {example}")
    advance(len(expert.names()) - len(names))  # those that change nothing
    replaced: dict[int, nn.Parameter] = {}
    for name in names:
        advance(1)
        old = parameters[name]
        value = expert.load(name)
        weight = value if isinstance(value, Tensor) else value.dequantize()
        if weight.shape != old.shape:
            shapes = f"{name} is {tuple(weight.shape)} and should be {tuple(old.shape)}"
            raise CheckpointError(f"expert {expert_name} does not belong to this base model: {shapes}")
        if isinstance(value, Tensor) and not old.is_meta and _equal(old, weight):
            continue
        weight = weight.to(device, old.dtype)
        if not torch.isfinite(weight).all():
            raise NumericalError(f"expert {expert_name}: {name} is not finite; build it again or remove it")
        replaced[id(old)] = nn.Parameter(weight, requires_grad=False)
        _assign(modules, name, replaced[id(old)])
        bits = expert.activation_bits(name)
        if bits < 16:
            quantize_inputs(modules[name.rpartition(".")[0]], bits)
    # A tied tensor has several names and the expert gives it one: the others follow.
    for name in set(parameters) - set(names):
        if id(parameters[name]) in replaced:
            _assign(modules, name, replaced[id(parameters[name])])


def _is_redundant(name: str, expert: ExpertFiles) -> bool:
    """Whether a parameter the model lacks changes nothing: older tools store rotary tables and biases of zeros."""
    if name.endswith(".rotary_emb.inv_freq"):
        return True
    if not name.endswith(".bias"):
        return False
    bias = expert.load(name)
    return isinstance(bias, Tensor) and not bias.any()


def _assign(modules: dict[str, nn.Module], name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(modules[owner], leaf, parameter)


def _equal(parameter: Tensor, stored: Tensor) -> bool:
    """Whether a stored tensor has the parameter's values, compared in slices so that no large copy is made."""
    pairs = zip(torch.split(parameter.detach(), 4096), torch.split(stored, 4096), strict=True)
    return all(torch.equal(ours, theirs.to(ours.device, ours.dtype)) for ours, theirs in pairs)
