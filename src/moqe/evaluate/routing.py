"""From loss tables to routers, and from routers to a verdict: what a build does once per protocol."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moqe.evaluate.judge import MIXTURE, Tables, judge
from moqe.evaluate.loss_table import Floats, LossTable
from moqe.evaluate.metrics import METRICS
from moqe.evaluate.outcome import Outcome, routed
from moqe.evaluate.verdict import ProtocolVerdict
from moqe.progress import Advance, Progress, ignore
from moqe.recipe import Router as RouterOptions
from moqe.router import Features, Router, RoutingExamples, choose, fit_baselines, fit_paper, fit_tuned

UNGUARDED = "unguarded"  # the deployed router before its guard: what the routing curve is drawn from
SHOWN_BASELINES = ("constant", "linear", "knn")
ROUTERS = (MIXTURE, UNGUARDED, "paper", "tuned", *SHOWN_BASELINES)
JUDGING_STEPS = len(ROUTERS) + 1  # that `judge_routers` tells of: every router's predictions, and the resampling


@dataclass(frozen=True)
class FittedRouters:
    """The routers of one protocol by name (see ROUTERS), and how they were selected, as JSON values.

    `mixture` is the recipe's preset with its guard; `paper` has none, as in the paper; `tuned` has one.
    """

    routers: Mapping[str, Router]
    selection: Mapping[str, Any]


def fit_routers(
    train: tuple[LossTable, Features],
    validation: tuple[LossTable, Features],
    options: RouterOptions,
    modality: str,
    seed: int,
    progress: Progress,
) -> FittedRouters:
    """Fit both presets and the baselines.

    train, validation: losses on the router's documents, and what the router sees of them.
    Raises DataError when there are too few documents, NumericalError when training diverges.
    """
    examples = _examples(*train)
    unseen = _examples(*validation)
    paper = fit_paper(options, examples, unseen, seed, modality, progress)
    tuned = fit_tuned(options, examples, unseen, seed, modality, progress)
    deployed = paper if options.preset == "paper" else tuned
    with progress.track("fit baselines", 1) as advance:
        baselines = fit_baselines(examples, unseen, seed)
        advance(1)
    routers = {MIXTURE: deployed.router, UNGUARDED: deployed.unguarded, "paper": paper.unguarded, "tuned": tuned.router}
    routers |= {name: baselines[name] for name in SHOWN_BASELINES}
    selection = {
        "deployed": options.preset,
        "experts": list(train[0].experts),
        "paper": paper.to_json(),
        "tuned": tuned.to_json(),
    }
    return FittedRouters(routers, selection)


@dataclass(frozen=True)
class Answers:
    """What routers and policies do with some samples: outcomes by name.

    predicted: the deployed router's predicted costs before its guard, (n, experts).
    """

    outcomes: Mapping[str, Outcome]
    predicted: Floats


def answer(tables: Tables, features: Features, routers: Mapping[str, Router], advance: Advance = ignore) -> Answers:
    """Let routers, which have the names of ROUTERS, choose.

    tables: per metric, of the samples that `features` show. advance: told of every router.
    """
    costs = {}
    for name, router in routers.items():
        costs[name] = router.predict(features).cpu()
        advance(1)
    choices = {name: choose(cost).numpy().astype(np.int64) for name, cost in costs.items() if name != UNGUARDED}
    outcomes = {name: routed(tables, choice) for name, choice in choices.items()}
    return Answers(outcomes, costs[UNGUARDED].double().numpy())


def judge_routers(
    test: Tables,
    validation: LossTable,
    features: Features,
    routers: Mapping[str, Router],
    seed: int,
    bootstrap_samples: int,
    advance: Advance = ignore,
) -> ProtocolVerdict:
    """Judge the routers of one protocol on the test samples; see `judge` for the tables and `answer` for the rest.

    advance: told of JUDGING_STEPS steps.
    """
    answers = answer(test, features, routers, advance)
    verdict = judge(test, validation, answers.outcomes, seed, bootstrap_samples, predicted=answers.predicted)
    advance(1)
    return verdict


def _examples(table: LossTable, features: Features) -> RoutingExamples:
    losses = METRICS[table.metric].cost(table.mean)
    return RoutingExamples(features, torch.from_numpy(losses), tuple(table.document.tolist()))
