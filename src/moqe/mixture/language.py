"""A language mixture from its folder: route a text, score it, continue it.

    mixture = moqe.load("out/quickstart")
    mixture.route("def main():").expert
    mixture.generate("The quick brown").text

Embeddings that experts share are in memory once, and so are integer codes: experts with common files of codes keep them
packed, and only their scales apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moqe.data.protocols import visible_tokens
from moqe.data.windows import encode
from moqe.errors import MoqeError, did_you_mean
from moqe.formats import open_expert
from moqe.formats.compressed_tensors import SHARED_TENSORS
from moqe.formats.compressed_tensors_files import CompressedTensorsFiles
from moqe.formats.shared_codes import in_common
from moqe.mixture.mixture import Decision, Mixture
from moqe.models.shared import SharedParts, open_shared
from moqe.progress import Progress
from moqe.router import TokenFeatures
from moqe.runtimes.runtime import Runtime
from moqe.runtimes.texts import TEXT_RUNTIMES


@dataclass(frozen=True)
class Score:
    """Loss of a text: nats over `tokens` predicted tokens by `expert`, and the perplexity they amount to."""

    nats: float
    tokens: int
    perplexity: float
    expert: str
    reason: str


@dataclass(frozen=True)
class Generation:
    """A continuation: its text, its token ids, the expert that wrote it and the reason for the choice."""

    text: str
    token_ids: list[int]
    expert: str
    reason: str


class LanguageMixture(Mixture):
    """A mixture of language models; see `Mixture` for opening one.

    runtime: what runs the experts, one of `TEXT_RUNTIMES`; by default the reference. Raises MoqeError for another name,
    ModelError for a model that the runtime cannot run.
    """

    def __init__(
        self,
        folder: Path | str,
        device: str = "cpu",
        progress: Progress | None = None,
        runtime: str | None = None,
    ) -> None:
        engine = runtime or "reference"
        if engine not in TEXT_RUNTIMES:
            raise MoqeError(f"no runtime {engine!r} for texts; {did_you_mean(engine, TEXT_RUNTIMES)}")
        super().__init__(folder, device, progress)
        self._runtimes: dict[str, Runtime] = {}
        self._engine = TEXT_RUNTIMES[engine](self._shared.model, device)

    def _read_shared(self) -> None:
        shared = self.folder.shared
        self._shared: SharedParts = open_shared(shared, shared / SHARED_TENSORS, self.device)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that all experts share."""
        return self._shared.tokenizer

    def route(self, sample: str | Tensor, protocol: str | None = None) -> Decision:
        """Choose an expert for a text, or for token ids, int64 (tokens,).

        protocol: what the router may see, by default what the mixture was deployed for; `prefix-k` looks at the first
        k tokens, `whole` at as many as a window of the recipe had in training. With `policy: probe` every expert scores
        the first k tokens under the deployed protocol, which loads all of them; a text of one token, on which there is
        nothing to score, goes where the router says.
        Raises MoqeError for an empty text or a protocol the mixture has no router for.
        """
        ids, name = self._ids(sample), protocol or self.protocol
        if self.recipe.router.policy == "probe" and name == self.protocol and len(ids) > 1:
            return self._probe(ids[: visible_tokens(name)])
        most = min(self.recipe.data.window, self.recipe.router.max_tokens)
        seen = ids[: visible_tokens(name) or most] if name in self.manifest["protocols"] else ids
        features = TokenFeatures(seen[None], self._shared.embedding, self.device)
        k = visible_tokens(name) or 0
        few = f" of the {k} it was trained on" if len(seen) < k else ""
        return self._decide(features, protocol, f"{len(seen)} tokens{few}")

    def score(self, text: str | Tensor, expert: str | None = None) -> Score:
        """Loss of a text under the routed expert, or under `expert`; every token after the first one counts.

        Raises MoqeError for fewer than two tokens or an unknown expert.
        """
        ids = self._ids(text)
        if len(ids) < 2:
            raise MoqeError("a text needs at least two tokens to be scored")
        name, reason = self._choose(ids, expert)
        nats = self.runtime(name).score(ids[None]).double()
        mean = float(nats.mean())
        return Score(float(nats.sum()), int(nats.numel()), float(torch.tensor(mean).exp()), name, reason)

    def generate(
        self,
        text: str | Tensor,
        expert: str | None = None,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Generation:
        """Continue a text with the routed expert, or with `expert`; temperature 0 takes the most probable token.

        Raises MoqeError for an empty text or an unknown expert.
        """
        ids = self._ids(text)
        name, reason = self._choose(ids, expert)
        new = self.runtime(name).generate(
            ids[None], max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, stop=self._shared.stop_tokens
        )
        return Generation(self.tokenizer.decode(new, skip_special_tokens=True), new, name, reason)

    def runtime(self, expert: str) -> Runtime:
        """The runtime of one expert, loaded and verified on first use. Raises MoqeError on an unknown name."""
        if expert not in self._runtimes:
            files = open_expert(self._verified(expert))
            others = [self.folder.expert(other) for other in self.experts if other != expert]
            shares = isinstance(files, CompressedTensorsFiles) and in_common(files.code_files(), others)
            self._runtimes[expert] = self._engine.open(files, expert, self._progress, shares)
        return self._runtimes[expert]

    def use(self, expert: str, runtime: Runtime) -> None:
        """Let `runtime` run an expert from now on, such as its GGUF file in llama.cpp or a server that holds it.

        Nothing is verified: that it is this expert is the caller's word. Raises MoqeError on an unknown name.
        """
        if expert not in self.experts:
            raise MoqeError(f"no expert {expert!r} in {self.folder.path}; {did_you_mean(expert, self.experts)}")
        self._runtimes[expert] = runtime

    def _probe(self, seen: Tensor) -> Decision:
        """The expert with the lowest loss on the given first tokens, int64 (k,), the first of equals."""
        costs = {name: float(self.runtime(name).score(seen[None]).double().mean()) for name in self.experts}
        expert = min(costs, key=lambda name: costs[name])
        return Decision(
            expert, costs, "nats", self.protocol, f"lowest loss of {len(costs)} on the first {len(seen)} tokens"
        )

    def _choose(self, ids: Tensor, expert: str | None) -> tuple[str, str]:
        if expert is not None:
            return expert, "pinned"
        decision = self.route(ids)
        return decision.expert, decision.reason

    def _ids(self, text: str | Tensor) -> Tensor:
        ids = encode(text, self.tokenizer) if isinstance(text, str) else text
        if ids.numel() == 0:
            raise MoqeError("the text is empty: give at least one token to route on")
        return ids
