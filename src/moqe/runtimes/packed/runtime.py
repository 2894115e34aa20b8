"""The packed runtime: weights stay in a few bits in memory, products run on integer and low-bit kernels.

What is faithful: codes, scales and zero points are the expert's, inputs of a8 schemes are rounded as in the reference
runtime, and everything between linears is float32. What differs is stated by the runtime's name, because each gives
other numbers:

    packed-float32   products are as accurate as float32's: sums in another order
    packed           inputs and results of most products are rounded to bfloat16, and so are scales and shifts of 4-bit
                     weights and the head's weight: what most servers do, and faster
    packed-compiled  the same, and what lies between products while decoding is compiled by torch.compile, which needs
                     a C++ compiler and some seconds

Memory: see `held_bytes`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from moqe.errors import DataError, NumericalError
from moqe.formats.expert_files import ExpertFiles
from moqe.progress import Progress, Silent
from moqe.runtimes.packed.parts import PackedParts, PackedSkeleton
from moqe.runtimes.scoring import batches, check_windows, finite_losses, token_losses

PRECISIONS: dict[str, torch.dtype] = {"packed": torch.bfloat16, "packed-float32": torch.float32}
"""The precision of each runtime's name."""

COMPILED = "packed-compiled"
"""`packed` with compiled steps."""


class PackedRuntime:
    """Runs an expert, or the base model where `expert` is None, in packed form. Satisfies `Runtime`.

    skeleton: what experts share; its precision decides about `name`. expert_name: for errors. max_batch_tokens: tokens
    per forward pass of `score` and `logits`. Nothing is loaded before the first use, which raises CheckpointError when
    the expert does not fit the skeleton.
    """

    def __init__(
        self,
        skeleton: PackedSkeleton,
        expert: ExpertFiles | None = None,
        *,
        name: str = "base",
        max_batch_tokens: int = 2048,
        progress: Progress | None = None,
    ) -> None:
        names = {dtype: runtime for runtime, dtype in PRECISIONS.items()}
        self.name = COMPILED if skeleton.compiled else names[skeleton.precision]
        self._skeleton, self._expert = skeleton, expert
        self.expert_name, self.max_batch_tokens = name, max_batch_tokens
        self._progress = progress or Silent()
        self._loaded: PackedParts | None = None
        self._lock = threading.Lock()

    def release(self) -> None:
        """Give the expert's own weights back; the next use loads them again."""
        with self._lock:
            self._loaded = None

    @torch.inference_mode()
    def score(self, tokens: Tensor) -> Tensor:
        """Loss of every next token: float32 nats, (n, window - 1) on the CPU, for int64 tokens, (n, window).

        Raises DataError for windows of fewer than two tokens, NumericalError when a loss is not finite.
        """
        check_windows(tokens)
        losses = [self._losses(part) for part in batches(tokens, self.max_batch_tokens)]
        return finite_losses(torch.cat([torch.empty(0, tokens.shape[1] - 1), *losses]), self.expert_name)

    def _losses(self, tokens: Tensor) -> Tensor:
        parts = self._parts()
        tokens = tokens.to(self._skeleton.device)
        hidden = parts.decoder.prefill(parts.embed(tokens[:, :-1]))  # (b, window - 1, hidden)
        losses = token_losses(hidden.flatten(0, 1), tokens[:, 1:].flatten(), parts.head, parts.vocabulary)
        return losses.view(hidden.shape[:2]).cpu()

    @torch.inference_mode()
    def logits(self, tokens: Tensor) -> Tensor:
        """Logits at every position: float32, (n, window, vocabulary) on the CPU, for int64 tokens, (n, window)."""
        parts = self._parts()
        found = []
        for part in batches(tokens, self.max_batch_tokens):
            hidden = parts.decoder.prefill(parts.embed(part.to(self._skeleton.device)))
            logits = parts.head(hidden.flatten(0, 1)).to("cpu", torch.float32)
            found.append(logits.view(*part.shape, -1))
        return torch.cat(found)

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
        return self.generate_batch([tokens[0]], max_new_tokens, temperature=temperature, seed=seed, stop=stop)[0]

    @torch.inference_mode()
    def generate_batch(
        self,
        prompts: Sequence[Tensor],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        seed: int = 0,
        stop: Sequence[int] = (),
    ) -> list[list[int]]:
        """Continue several prompts of any lengths, int64 (t,) each, together; each as `generate` would alone.

        Every prompt draws with `seed` by itself. Raises DataError for a prompt without tokens, NumericalError when
        logits are not finite.
        """
        if not prompts or any(len(prompt) == 0 for prompt in prompts):
            raise DataError("there is nothing to continue: give at least one token")
        new: list[list[int]] = [[] for _ in prompts]
        if max_new_tokens < 1:
            return new
        parts, device = self._parts(), self._skeleton.device
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        padded = nn.utils.rnn.pad_sequence(list(prompts), batch_first=True).to(device)
        cache = parts.decoder.cache(len(prompts), padded.shape[1] + max_new_tokens)
        hidden = parts.decoder.prefill(parts.embed(padded), cache)
        hidden = hidden[torch.arange(len(prompts), device=device), lengths - 1]  # (b, hidden)
        cache.set_lengths(lengths)
        random = [torch.Generator().manual_seed(seed) for _ in prompts]
        running = set(range(len(prompts)))
        with self._progress.track("generate", max_new_tokens) as advance:
            for made in range(max_new_tokens):
                logits = parts.head(hidden).to("cpu", torch.float32)  # (b, vocabulary)
                if not torch.isfinite(torch.stack(torch.aminmax(logits))).all():  # sooner than all of them
                    raise NumericalError(
                        f"expert {self.expert_name}: logits are not finite; build it again or remove it"
                    )
                chosen = [_choose(row, temperature, source) for row, source in zip(logits, random, strict=True)]
                for row in sorted(running):
                    if chosen[row] in stop:
                        running.discard(row)
                    else:
                        new[row].append(chosen[row])
                if not running or made + 1 == max_new_tokens:
                    advance(max_new_tokens - made)
                    break
                hidden = parts.decoder.step(parts.embed(torch.tensor(chosen, device=device)), cache)
                advance(1)
        return new

    def tensors(self) -> list[Tensor]:
        """What is held in memory for this expert, what it shares with others included; loads it."""
        return self._parts().tensors()

    def _parts(self) -> PackedParts:
        with self._lock:
            if self._loaded is None:
                names = [] if self._expert is None else self._expert.names()
                with (
                    torch.inference_mode(),
                    self._progress.track(f"load {self.expert_name}", len(names)) as advance,
                ):
                    self._loaded = PackedParts(self._skeleton, self._expert, self.expert_name, advance)
            return self._loaded


def held_bytes(runtimes: Iterable[PackedRuntime]) -> int:
    """Bytes of the tensors that runtimes hold, those that several hold once; loads their experts.

    For experts of the same shapes this is around + n * own where they share nothing, and around + codes + n * scales
    where they share codes.
    """
    held = {tensor.untyped_storage().data_ptr(): tensor for runtime in runtimes for tensor in runtime.tensors()}
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())


def _choose(logits: Tensor, temperature: float, random: torch.Generator) -> int:
    """The likeliest token, or one that is drawn. logits: (vocabulary,)."""
    if temperature > 0:
        return int(torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=random))
    return int(logits.argmax())
