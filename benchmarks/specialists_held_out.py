"""What a mixture loses on texts of a kind that its router has never seen, and wins with fewer tokens to choose by.

See `benchmarks.specialists`. Routers here are those of ROUTERS, which send what is novel to the generalist as every
router of a mixture does. What they lose or win is the loss of whom they choose minus the generalist's, nats per window.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moqe.evaluate import LossTable, read_losses
from moqe.evaluate.routing import RoutingData
from moqe.router import NoveltyRouter, Router, RoutingExamples, choose
from moqe.router.domain_classifier import fit_domain_classifier
from moqe.router.features import Features, TokenFeatures
from moqe.router.levels import lengths
from moqe.router.logistic import fit_logistic
from moqe.router.novelty import fit_novelty
from moqe.tasks import LanguageTask

GENERALIST, NOVELTY = "generalist", 0.99
CLASSIFIER = "classifier of domains"
ROUTERS: dict[str, Callable[[RoutingExamples, RoutingExamples], Router]] = {
    CLASSIFIER: fit_domain_classifier,
    "logistic": fit_logistic,
}
SPLITS = ("router_train", "router_validation", "test")


@dataclass(frozen=True)
class _Asked:
    """Routers, and the test windows they are asked about."""

    routers: Mapping[str, Router]
    test: LossTable
    seen: Features
    generalist: int

    def choices(self, name: str, tokens: int | None = None) -> dict[str, Any]:
        """What a router's choices cost, `loss` per window, and the share that the generalist gets.

        tokens: as many of each window does the router see; None: all that it was trained on.
        """
        seen = self.seen if tokens is None else self.seen.first(tokens)
        choice = choose(self.routers[name].predict(seen)).numpy()
        loss = self.test.chosen(choice) - self.test.loss[:, self.generalist]
        return {"loss": loss.tolist(), "generalist": float((choice == self.generalist).mean())}

    @property
    def windows(self) -> dict[str, Any]:
        """Tokens that count, and documents."""
        return {"count": self.test.count.tolist(), "document": self.test.document.tolist()}


def held_out_routing(task: LanguageTask, losses: Path, protocol: str) -> dict[str, Any]:
    """For every domain: routers fitted without its windows and without its specialist, asked about its test windows."""
    found = {}
    for domain in _domains(task, losses, protocol):
        asked = _asked(task, losses, protocol, domain)
        found[domain] = {"routers": {name: asked.choices(name) for name in asked.routers}, **asked.windows}
    return found


def shorter_prompts(task: LanguageTask, losses: Path, protocol: str) -> dict[str, Any]:
    """The classifier of domains, asked about test windows of which it sees fewer and fewer tokens.

    `known`: fitted to all domains. `unknown`, by domain: as in `held_out_routing`. Each by the number of tokens.
    """
    found: dict[str, Any] = {"unknown": {}}
    for domain in ("", *_domains(task, losses, protocol)):
        asked = _asked(task, losses, protocol, domain)
        entry = asked.windows | {
            "tokens": {str(tokens): asked.choices(CLASSIFIER, tokens) for tokens in lengths(asked.seen.length)}
        }
        if domain:
            found["unknown"][domain] = entry
        else:
            found["known"] = entry
    return found


def _domains(task: LanguageTask, losses: Path, protocol: str) -> list[str]:
    return sorted(set(read_losses(losses, "test", protocol, task.metric).domain.tolist()))


def _asked(task: LanguageTask, losses: Path, protocol: str, held_out: str) -> _Asked:
    """Routers fitted without the domain `held_out`, asked about its test windows; with all where it is empty."""
    fitting, judging, test = (_part(task, losses, protocol, split, held_out) for split in SPLITS)
    generalist = test[0].experts.index(GENERALIST)
    train, validation = (RoutingData(table, table, seen).examples for table, seen in (fitting, judging))
    novelty = fit_novelty(train, validation, task.recipe.router.novelty or NOVELTY)
    routers = {name: NoveltyRouter(fit(train, validation), generalist, novelty) for name, fit in ROUTERS.items()}
    return _Asked(routers, *test, generalist)


def _part(
    task: LanguageTask, losses: Path, protocol: str, split: str, held_out: str
) -> tuple[LossTable, TokenFeatures]:
    """Windows of a split without those of `held_out`, or of the test split those alone; without its specialist."""
    table, features = read_losses(losses, split, protocol, task.metric), task.features(split, protocol)
    assert isinstance(features, TokenFeatures)
    inside = (table.domain == held_out) == (split == SPLITS[-1])
    rows = np.flatnonzero(inside) if held_out else np.arange(len(table))
    names = [name for name in table.experts if name != f"for-{held_out}"]
    return table.of(names).select(rows), TokenFeatures(features.tokens[rows], features.embedding, features.device)
