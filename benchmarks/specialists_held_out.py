"""What a mixture loses on texts of a kind that its router has never seen, see `benchmarks.specialists`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from moqe.evaluate import LossTable, read_losses
from moqe.evaluate.routing import RoutingData
from moqe.router import NoveltyRouter, Router, RoutingExamples, choose
from moqe.router.domain_classifier import fit_domain_classifier
from moqe.router.features import TokenFeatures
from moqe.router.logistic import fit_logistic
from moqe.router.novelty import fit_novelty
from moqe.tasks import LanguageTask

GENERALIST, NOVELTY = "generalist", 0.99
ROUTERS: dict[str, Callable[[RoutingExamples, RoutingExamples], Router]] = {
    "classifier of domains": fit_domain_classifier,
    "logistic": fit_logistic,
}


def held_out_routing(task: LanguageTask, losses: Path, protocol: str, seed: int) -> dict[str, Any]:
    """For every domain: routers fitted without its windows and without its specialist, asked about its test windows.

    These are those of ROUTERS, which send what is novel to the generalist as every router of a mixture does.
    loss: nats of the mixture minus the generalist, per window. generalist: the share of windows sent there.
    """
    tables = {
        split: read_losses(losses, split, protocol, task.metric)
        for split in ("router_train", "router_validation", "test")
    }
    found = {}
    for domain in sorted(set(tables["test"].domain.tolist())):
        names = [name for name in tables["test"].experts if name != f"for-{domain}"]

        def those(split: str, inside: bool, domain: str = domain, names: list[str] = names) -> tuple[LossTable, Any]:
            rows = np.flatnonzero((tables[split].domain == domain) == inside)
            features = task.features(split, protocol)
            assert isinstance(features, TokenFeatures)
            part = TokenFeatures(features.tokens[rows], features.embedding, features.device)
            return tables[split].of(names).select(rows), part

        train, validation, (test, seen) = (
            those("router_train", False),
            those("router_validation", False),
            those("test", True),
        )
        generalist = names.index(GENERALIST)
        fitting, judging = (RoutingData(table, table, features).examples for table, features in (train, validation))
        novelty = fit_novelty(fitting, judging, task.recipe.router.novelty or NOVELTY)
        routers = {}
        for name, fit in ROUTERS.items():
            choice = choose(NoveltyRouter(fit(fitting, judging), generalist, novelty).predict(seen)).numpy()
            routers[name] = {
                "loss": (test.chosen(choice) - test.loss[:, generalist]).tolist(),
                "generalist": float((choice == generalist).mean()),
            }
        document = test.document.tolist()
        found[domain] = {"routers": routers, "count": test.count.tolist(), "document": document}
    return found
