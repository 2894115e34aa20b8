"""A mixture from its folder: route a text, score it, continue it.

    mixture = moqe.load("out/quickstart")
    mixture.route("def main():").expert
    mixture.generate("The quick brown").text

Opening reads the manifest and the router. An expert's weights are read when it is first used, and its files are then
compared with the digests in the manifest; embeddings and norms that experts share are in memory once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moqe.data.protocols import visible_tokens
from moqe.errors import CheckpointError, MoqeError, did_you_mean
from moqe.evaluate.verdict import read_verdict
from moqe.folder import MixtureFolder
from moqe.formats import open_expert
from moqe.formats.compressed_tensors import SHARED_TENSORS
from moqe.models.shared import SharedParts, open_shared
from moqe.progress import Progress, Silent
from moqe.recipe import Recipe, load_recipe
from moqe.router import TokenFeatures, load_router
from moqe.router.router import Router
from moqe.runtimes.reference import ReferenceRuntime
from moqe.store import digest_files, disk_bytes, read_json, reading

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Decision:
    """Where the router sends an input, and why.

    costs: the predicted cost of every expert, lower is better, in `unit`: `nats` are predicted losses per token
    (relative to the experts' mean), `logit` are negative logits, whose differences only rank.
    """

    expert: str
    costs: Mapping[str, float]
    unit: str
    protocol: str
    reason: str


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


class Mixture:
    """A loaded mixture; `progress` shows files being verified.

    Raises CheckpointError when the folder is half-built, damaged or no mixture.
    """

    def __init__(self, folder: Path | str, device: str = "cpu", progress: Progress | None = None) -> None:
        self.folder = MixtureFolder(Path(folder))
        self.manifest = read_manifest(self.folder)
        self._progress = progress or Silent()
        _verify_files(_within(self.folder.shared, self.manifest["shared"]), self._progress)
        self.recipe: Recipe = load_recipe(self.folder.recipe)
        self.device = device
        self.experts: tuple[str, ...] = tuple(self.manifest["experts"])
        self.protocol: str = self.manifest["protocols"][0]
        self._shared: SharedParts = open_shared(self.folder.shared, self.folder.shared / SHARED_TENSORS, device)
        self._routers: dict[str, Router] = {}
        self._runtimes: dict[str, ReferenceRuntime] = {}

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that all experts share."""
        return self._shared.tokenizer

    def route(self, text: str | Tensor, protocol: str | None = None) -> Decision:
        """Choose an expert for a text, or for token ids, int64 (tokens,).

        protocol: what the router may see, by default what the mixture was deployed for; `prefix-k` looks at the first
        k tokens, `whole` at as many as a window of the recipe had in training.
        Raises MoqeError for an empty text or a protocol the mixture has no router for.
        """
        name = protocol or self.protocol
        if name not in self.manifest["protocols"]:
            raise MoqeError(f"no router for protocol {name!r}; {did_you_mean(name, self.manifest['protocols'])}")
        ids = self._ids(text)
        seen = ids[: visible_tokens(name) or min(self.recipe.data.window, self.recipe.router.max_tokens)]
        router = self._router(name)
        costs = router.predict(TokenFeatures(seen[None], self._shared.embedding, self.device))[0]
        if len(costs) != len(self.experts):
            raise CheckpointError(
                f"{self.folder.router(name)} routes among {len(costs)} experts, and the mixture has "
                f"{len(self.experts)}: build or copy it again"
            )
        choice = int(costs.argmin())
        return Decision(
            self.experts[choice],
            {expert: float(cost) for expert, cost in zip(self.experts, costs, strict=True)},
            router.unit,
            name,
            f"lowest predicted cost of {len(self.experts)} by {router.name}, seeing {len(seen)} tokens",
        )

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

    def runtime(self, expert: str) -> ReferenceRuntime:
        """The runtime of one expert, loaded and verified on first use. Raises MoqeError on an unknown name."""
        if expert not in self.experts:
            raise MoqeError(f"no expert {expert!r} in {self.folder.path}; {did_you_mean(expert, self.experts)}")
        if expert not in self._runtimes:
            expected = _within(self.folder.expert(expert), self.manifest["experts"][expert]["files"])
            _verify_files(expected, self._progress)
            files = open_expert(self.folder.expert(expert))
            self._runtimes[expert] = ReferenceRuntime(self._shared.model, files, name=expert)
        return self._runtimes[expert]

    def _router(self, protocol: str) -> Router:
        if protocol not in self._routers:
            self._routers[protocol] = load_router(self.folder.router(protocol) / "mixture")
        return self._routers[protocol]

    def _choose(self, ids: Tensor, expert: str | None) -> tuple[str, str]:
        if expert is not None:
            return expert, "pinned"
        decision = self.route(ids)
        return decision.expert, decision.reason

    def _ids(self, text: str | Tensor) -> Tensor:
        ids = torch.tensor(self.tokenizer(text)["input_ids"], dtype=torch.int64) if isinstance(text, str) else text
        if ids.numel() == 0:
            raise MoqeError("the text is empty: give at least one token to route on")
        return ids


def load(folder: Path | str, device: str = "cpu", progress: Progress | None = None) -> Mixture:
    """Open a mixture's folder; see `Mixture`."""
    return Mixture(folder, device, progress)


def read_manifest(folder: MixtureFolder) -> dict[str, Any]:
    """The manifest of a complete mixture. Raises CheckpointError when there is none."""
    if not folder.manifest.exists():
        state = "is half-built: run the same `moqe build` again" if folder.recipe.exists() else "holds no mixture"
        raise CheckpointError(f"{folder.path} {state}")
    manifest: dict[str, Any] = read_json(folder.manifest)
    with reading(folder.manifest):
        if manifest["format_version"] != FORMAT_VERSION:
            raise CheckpointError(
                f"{folder.manifest} has format {manifest['format_version']}, and this version of MoQE reads "
                f"{FORMAT_VERSION}: build again"
            )
        _check_manifest(manifest)
    if load_recipe(folder.recipe).hash != manifest["recipe"]:
        raise CheckpointError(f"{folder.recipe} is not the recipe the mixture was built from: bring it back")
    return manifest


def _check_manifest(manifest: Mapping[str, Any]) -> None:
    """Raise KeyError, TypeError or ValueError unless everything that is read of a manifest is there."""
    tables = [manifest["identity"], manifest["shared"], *(entry["files"] for entry in manifest["experts"].values())]
    texts = [manifest["recipe"], *manifest["protocols"], *(text for table in tables for text in table.values())]
    wrong = [text for text in texts if not isinstance(text, str)]
    if wrong:
        raise TypeError(f"{wrong[0]!r} is not text")
    if not manifest["protocols"] or not manifest["experts"]:
        raise ValueError("it names no protocol or no expert")


def verify_mixture(folder: MixtureFolder, manifest: Mapping[str, Any], progress: Progress | None = None) -> None:
    """Compare shared files and all experts' files with their digests. Raises CheckpointError naming what is damaged."""
    expected = _within(folder.shared, manifest["shared"])
    for expert, entry in manifest["experts"].items():
        expected |= _within(folder.expert(expert), entry["files"])
    _verify_files(expected, progress or Silent())


def _within(place: Path, files: Mapping[str, str]) -> dict[Path, str]:
    return {place / name: digest for name, digest in files.items()}


def _verify_files(expected: Mapping[Path, str], progress: Progress) -> None:
    for path in expected:
        if not path.exists():
            raise CheckpointError(f"{path} is missing: build again, or copy the folder again")
    found = digest_files(list(expected), "verify files", progress)
    for (path, digest), actual in zip(expected.items(), found, strict=True):
        if actual != digest:
            raise CheckpointError(f"{path} is damaged (its digest is not the manifest's): build or copy it again")


def _certificate(path: Path) -> dict[str, Any]:
    with reading(path):
        return dict(read_json(path).items())


def inspect(folder: Path | str, verify: bool = False, progress: Progress | None = None) -> dict[str, Any]:
    """What a mixture is made of: recipe, experts with certificates and bytes, protocols, verdict.

    verify: also compare shared files and every expert's with their digests.
    Raises CheckpointError when the folder is half-built, damaged or no mixture.
    """
    place = MixtureFolder(Path(folder))
    manifest = read_manifest(place)
    if verify:
        verify_mixture(place, manifest, progress)
    return {
        "folder": str(place.path),
        "manifest": manifest,
        "recipe": load_recipe(place.recipe).model_dump(mode="json", exclude_defaults=True),
        "certificates": {name: _certificate(place.certificate(name)) for name in manifest["experts"]},
        "bytes": {
            "folder": disk_bytes(place.path),
            "shared": disk_bytes(place.shared),
            "experts": {name: disk_bytes(place.expert(name)) for name in manifest["experts"]},
        },
        "verdict": asdict(read_verdict(place.verdict)) if place.verdict.exists() else None,
        "verified": verify,
    }
