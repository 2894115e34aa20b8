"""A loaded mixture: what all tasks have in common. A task's own verbs are in its subclass."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from moqe.errors import CheckpointError, MoqeError, did_you_mean
from moqe.folder import MixtureFolder
from moqe.mixture.manifest import read_manifest, verify_files, verifying, within
from moqe.progress import Progress, Silent
from moqe.recipe import Recipe, load_recipe
from moqe.router import Features, load_router, novelty_of
from moqe.router.router import Router
from moqe.router.saved import read_router
from moqe.store import FileIdentity


@dataclass(frozen=True)
class Decision:
    """Where the router sends an input, and why.

    costs: the predicted cost of every expert, lower is better, in `unit`: `nats` are predicted losses per token
    (relative to the experts' mean), `logit` are negative logits, whose differences only rank. Of a probe they are
    measured: nats per token of what was scored.
    """

    expert: str
    costs: Mapping[str, float]
    unit: str
    protocol: str
    reason: str


class Mixture:
    """A loaded mixture; `progress` shows files being verified, `runtime` names what runs experts.

    Opening reads the manifest and what all experts share. An expert's weights are read when it is first used, and its
    files are then compared with the digests in the manifest. What `runtime` may be is up to the task.
    Raises CheckpointError when the folder is half-built, damaged or no mixture.
    """

    def __init__(
        self,
        folder: Path | str,
        device: str = "cpu",
        progress: Progress | None = None,
        runtime: str | None = None,
    ) -> None:
        self.folder = MixtureFolder(Path(folder))
        self.manifest = read_manifest(self.folder)
        self._progress = progress or Silent()
        self.recipe: Recipe = load_recipe(self.folder.recipe)
        self.device = device
        self.experts: tuple[str, ...] = tuple(self.manifest["experts"])
        self.protocol: str = self.manifest["protocols"][0]
        self._routers: dict[str, Router] = {}
        self._digests: dict[FileIdentity, str] = {}  # of files read so far: experts have names of those they share
        with ThreadPoolExecutor(1) as beside:
            # The deployed router's files; that they are damaged is told when the router is first asked.
            self._read = {self.protocol: beside.submit(read_router, self.folder.router(self.protocol) / "mixture")}
            with verifying(within(self.folder.shared, self.manifest["shared"]), self._progress, self._digests):
                self._read_shared()

    def _read_shared(self) -> None:
        """Read what all experts share."""
        raise NotImplementedError

    def route(self, sample: Any, protocol: str | None = None) -> Decision:
        """Choose an expert for an input."""
        raise NotImplementedError

    def score(self, text: Any, expert: str | None = None) -> Any:
        """Loss of a text; language mixtures only. Raises MoqeError for others."""
        self._lacks("score")

    def generate(
        self,
        text: Any,
        expert: str | None = None,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Any:
        """Continue a text; language mixtures only. Raises MoqeError for others."""
        self._lacks("generate")

    def classify(self, image: Any, expert: str | None = None) -> Any:
        """Name what an image shows; image mixtures only. Raises MoqeError for others."""
        self._lacks("classify")

    def _lacks(self, verb: str) -> NoReturn:
        raise MoqeError(f"{self.folder.path} is a mixture for {self.manifest['task']}: it has no {verb}")

    def _decide(self, features: Features, protocol: str | None, seen: str) -> Decision:
        """The router's decision on the one sample that `features` show; `seen` says of what, for people."""
        name = protocol or self.protocol
        router = self._router(name)
        costs = router.predict(features)[0]
        if len(costs) != len(self.experts):
            raise CheckpointError(
                f"{self.folder.router(name)} routes among {len(costs)} experts, and the mixture has "
                f"{len(self.experts)}: copy the mixture again"
            )
        chosen = int(costs.argmin())
        reason = f"lowest predicted cost of {len(self.experts)} by {router.name}, seeing {seen}"
        wary = novelty_of(router)
        if wary is not None and bool(wary.novelty.novel(features)[0]):
            reason = f"unlike anything that {router.name} was trained on, seeing {seen}"
        elif wary is not None and wary.novelty.kinds is not None and chosen == wary.fallback:
            reason = (
                f"no expert that both {router.name} and the classifier of domains expect to do better, seeing {seen}"
            )
        return Decision(
            self.experts[chosen],
            {expert: float(cost) for expert, cost in zip(self.experts, costs, strict=True)},
            router.unit,
            name,
            reason,
        )

    def _router(self, protocol: str) -> Router:
        """The deployed router for a protocol. Raises MoqeError where there is none, CheckpointError for damage."""
        if protocol not in self.manifest["protocols"]:
            raise MoqeError(
                f"no router for protocol {protocol!r}; {did_you_mean(protocol, self.manifest['protocols'])}"
            )
        if protocol not in self._routers:
            read = self._read.pop(protocol, None)
            stored = None if read is None else read.result()
            self._routers[protocol] = self._open_router(self.folder.router(protocol) / "mixture", stored)
        return self._routers[protocol]

    def _open_router(self, folder: Path, stored: tuple[Any, bytes] | None = None) -> Router:
        return load_router(folder, stored)

    def _verified(self, expert: str) -> Path:
        """The folder of an expert, its files compared with their digests. Raises MoqeError on an unknown name."""
        if expert not in self.experts:
            raise MoqeError(f"no expert {expert!r} in {self.folder.path}; {did_you_mean(expert, self.experts)}")
        folder = self.folder.expert(expert)
        verify_files(within(folder, self.manifest["experts"][expert]["files"]), self._progress, self._digests)
        return folder
