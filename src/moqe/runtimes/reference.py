"""The reference runtime: an expert's exact arithmetic in float32, the judge of every loss.

Weights are dequantized to float32; linears of a8 schemes get their inputs quantized per token. What is faithful: codes,
scales, zero points, activation rounding. What differs from a serving engine: sums are float32, not integers or
bfloat16, so neither latency nor memory is ever reported from here.

All experts of a mixture run on one skeleton, the full-precision model. A runtime holds a copy of the skeleton's modules
that shares every tensor with it, except those the expert replaces by other values: embeddings and head are held once
however many experts are loaded. The skeleton is never changed, so runtimes may work in different threads.

Cost: 4 bytes per quantized weight while loaded; `release` gives them back. With `codes`, the bytes of the expert's
scales, and those of its codes once for all experts that share them; every linear then makes its weight at every call.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moqe.errors import NumericalError
from moqe.formats.expert_files import ExpertFiles, PackedFiles
from moqe.formats.shared_codes import Lease, SharedCodes
from moqe.models.device import mixed_precision
from moqe.models.head import refuse_changed_logits
from moqe.models.shared import share
from moqe.progress import Progress, Silent
from moqe.runtimes.installation import install
from moqe.runtimes.scoring import batches, check_windows, finite_losses, token_losses


class ReferenceRuntime:
    """Runs an expert, or the base model where `expert` is None, on a full-precision skeleton. Satisfies `Runtime`.

    model: a causal language model of transformers in float32, with its head after its last layer. name: the expert's,
    for errors. max_batch_tokens: tokens per forward pass; losses are made in the same batches every time. progress:
    shows the loading of the expert and the generation of text; whoever scores many windows shows that. codes: keep
    linears as codes and scales, the codes in common with other runtimes on the same `SharedCodes`, whose device must be
    the model's; losses are the same bit for bit. None dequantizes them once, which is faster where there is memory.
    products: the type of products, apart from sums and norms, and the runtime's name unless it is float32; bfloat16 is
    what most servers use, and several times faster than float32 where the processor has instructions for it.
    Nothing is loaded before the first use, which raises CheckpointError when the expert does not fit the skeleton.
    """

    def __init__(
        self,
        model: nn.Module,
        expert: ExpertFiles | None = None,
        *,
        name: str = "base",
        max_batch_tokens: int = 2048,
        progress: Progress | None = None,
        codes: SharedCodes | None = None,
        products: torch.dtype = torch.float32,
    ) -> None:
        self.name = "reference" if products == torch.float32 else str(products).removeprefix("torch.")
        self._skeleton, self._expert, self._codes = model, expert, codes
        self._products = products
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
        check_windows(tokens)
        losses = [self._score_batch(part) for part in batches(tokens, self.max_batch_tokens)]
        return finite_losses(torch.cat([torch.empty(0, tokens.shape[1] - 1), *losses]), self.expert_name)

    @torch.no_grad()
    def _score_batch(self, tokens: Tensor) -> Tensor:
        parts = self._parts()
        with mixed_precision(self._products, parts.device):
            hidden = parts.hidden(tokens[:, :-1])  # (b, window - 1, hidden)
            targets = tokens[:, 1:].to(hidden.device).flatten()
            losses = token_losses(hidden.flatten(0, 1), targets, parts.head, parts.vocabulary)
        return losses.view(hidden.shape[:2]).cpu()

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """Logits at every position: float32, (n, window, vocabulary) on the CPU, for int64 tokens, (n, window)."""
        parts = self._parts()
        seen = batches(tokens, self.max_batch_tokens)
        with mixed_precision(self._products, parts.device):
            return torch.cat([parts.head(parts.hidden(part)).float().cpu() for part in seen])

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
        tracked = self._progress.track("generate", max_new_tokens)
        with tracked as advance, mixed_precision(self._products, parts.device):
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
                lease = self._codes.lease() if self._codes is not None else None
                if self._expert is not None:
                    with self._progress.track(f"load {self.expert_name}", len(self._expert.names())) as advance:
                        install(model, self._expert, self.expert_name, advance, lease)
                if lease is not None and isinstance(self._expert, PackedFiles):
                    self._expert.close()  # what was read besides the codes is copied or compared by now
                self._loaded = _Parts(model, lease)
            return self._loaded


class _Parts:
    """A model as body and head, so that logits can be made for a few positions at a time; and what holds its codes."""

    def __init__(self, model: Any, lease: Lease | None = None) -> None:
        self.lease = lease
        self.model, self.body, self.head = model, model.base_model, model.get_output_embeddings()
        self.device = self.head.weight.device
        self.vocabulary = int(self.head.weight.shape[0])
        refuse_changed_logits(model)

    def hidden(self, tokens: Tensor) -> Tensor:
        """Normalised hidden states, (n, t, hidden), of tokens, (n, t)."""
        states: Tensor = self.body(input_ids=tokens.to(self.device), use_cache=False).last_hidden_state
        return states
