"""From loss tables to routers and a policy, and from those to outcomes: what a build does once per protocol."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moqe.evaluate.judge import CASCADE, DOMAIN, MIXTURE, PROBE, ROUTE, Tables
from moqe.evaluate.loss_table import Floats, LossTable
from moqe.evaluate.metrics import METRICS
from moqe.evaluate.outcome import Choice, Outcome, cascaded, routed
from moqe.evaluate.predictions import Predictions
from moqe.evaluate.probe import probed
from moqe.progress import Advance, Progress, ignore
from moqe.recipe import Policy
from moqe.recipe import Router as RouterOptions
from moqe.router import (
    Cascade,
    CascadeDecision,
    Features,
    FittedNovelty,
    FittedRouter,
    NoveltyRouter,
    Router,
    RoutingExamples,
    choose,
    fit_baselines,
    fit_guarded_cascade,
    fit_paper,
    fit_tuned,
)
from moqe.router.baselines import Constant
from moqe.router.cascade import FEWEST_UNSEEN

log = logging.getLogger("moqe")

UNGUARDED = "unguarded"  # the deployed router before its guard: what the routing curve is drawn from
SHOWN_BASELINES = ("constant", "linear", "knn", "logistic")
ROUTERS = (MIXTURE, UNGUARDED, "paper", "tuned", *SHOWN_BASELINES)
JUDGING_STEPS = len(ROUTERS)  # that `answer` tells of


@dataclass(frozen=True)
class RoutingData:
    """What routers are fitted to: samples of one split under one protocol.

    losses: of the metric that routers are trained on. judged: of the metric that the verdict judges. features: what a
    router sees. predictions: where samples have a true class; a policy that asks several experts is fitted to them.
    """

    losses: LossTable
    judged: LossTable
    features: Features
    predictions: Predictions | None = None

    @property
    def examples(self) -> RoutingExamples:
        """The same as routers take it: costs, lower is better."""
        judged = None if self.judged.metric == self.losses.metric else _costs(self.judged)
        told = METRICS[self.losses.metric].group == "domain"  # a class is what the expert is asked
        label = tuple(self.losses.domain.tolist()) if told else None
        return RoutingExamples(self.features, _costs(self.losses), tuple(self.losses.document.tolist()), judged, label)


@dataclass(frozen=True)
class FittedRouters:
    """The routers of one protocol by name (see ROUTERS), and how they were selected, as JSON values.

    `mixture` is the recipe's preset with its guard; `paper` has none, as in the paper; `tuned` has one. cascade: on top
    of `mixture`; None where there are no predictions or there is one expert only, and where too few samples are new to
    the router and nobody asked for a cascade.
    """

    routers: Mapping[str, Router]
    selection: Mapping[str, Any]
    cascade: CascadeDecision | None


def fit_routers(
    train: RoutingData,
    validation: RoutingData,
    options: RouterOptions,
    modality: str,
    seed: int,
    progress: Progress,
    fallback: int | None = None,
) -> FittedRouters:
    """Fit both presets, the baselines and the cascade.

    fallback: the number of the generalist among specialists. Guards fall back to it, and so do `tuned` and the
    baselines that look at a sample where it is novel. None: guards fall back to the best single expert of validation.

    With `policy: route` a cascade is only there to be compared with, and a warning says so where there are too few
    samples for one. Raises DataError when there are too few documents, or too few samples for `policy: cascade`;
    NumericalError when training diverges, RecipeError for a cascade of one expert.
    """
    examples, unseen = train.examples, validation.examples
    paper = fit_paper(options, examples, unseen, seed, modality, progress, fallback)
    tuned = fit_tuned(
        options, examples, unseen, seed, modality, progress, fallback, paper.unguarded, len(paper.history)
    )
    deployed = paper if options.preset == "paper" else tuned
    with progress.track("fit baselines", 1) as advance:
        baselines = fit_baselines(examples, unseen, seed)
        advance(1)
    routers = {MIXTURE: deployed.router, UNGUARDED: deployed.unguarded, "paper": paper.unguarded, "tuned": tuned.router}
    routers |= {name: _safe(baselines[name], tuned.novelty, fallback) for name in SHOWN_BASELINES}
    selection = {
        "deployed": options.preset,
        "experts": list(train.losses.experts),
        "generalist": None if fallback is None else train.losses.experts[fallback],
        "paper": paper.to_json(),
        "tuned": tuned.to_json(),
    }
    cascade = None
    wanted = examples.experts > 1 or options.policy == "cascade"  # of one expert: an error that says so
    if train.predictions is not None and validation.predictions is not None and wanted:
        with progress.track("fit the cascade", 1) as advance:
            cascade = _fit_cascade(train.predictions, validation.predictions, deployed, options, seed)
            advance(1)
    return FittedRouters(routers, selection, cascade)


def _safe(router: Router, novelty: FittedNovelty | None, fallback: int | None) -> Router:
    """A baseline that sends novel samples to the fallback; one that looks at no sample stays as it is."""
    if novelty is None or fallback is None or isinstance(router, Constant):
        return router
    return NoveltyRouter(router, fallback, novelty.novelty)


def _fit_cascade(
    train: Predictions, validation: Predictions, router: FittedRouter, options: RouterOptions, seed: int
) -> CascadeDecision | None:
    """A cascade on a router's choices, judged where the router had not seen the sample; see `fit_routers`."""
    found = len(router.unseen.rows)
    if options.policy == ROUTE and found < FEWEST_UNSEEN:
        log.warning(
            "no cascade to compare with: it needs %d images that are new to the router, and there are %d",
            FEWEST_UNSEEN,
            found,
        )
        return None
    probabilities = torch.from_numpy(np.concatenate([train.probabilities, validation.probabilities]))
    label = torch.from_numpy(np.concatenate([train.label, validation.label]))
    choice, known = torch.zeros_like(label), torch.zeros(len(label), dtype=torch.bool)
    choice[router.unseen.rows], known[router.unseen.rows] = router.unseen.choice, True
    return fit_guarded_cascade(choice, probabilities, label, options.max_cost, known, seed)


@dataclass(frozen=True)
class Answers:
    """What routers and policies do with some samples: outcomes by name.

    predicted: the deployed router's predicted costs before its guard, (n, experts).
    """

    outcomes: Mapping[str, Outcome]
    predicted: Floats


def answer(
    tables: Tables,
    features: Features,
    routers: Mapping[str, Router],
    *,
    predictions: Predictions | None = None,
    cascade: Cascade | None = None,
    whole: LossTable | None = None,
    labelled: Choice | None = None,
    policy: Policy = "route",
    runs_first: int | None = None,
    advance: Advance = ignore,
) -> Answers:
    """Let routers, which have the names of ROUTERS, and the policies choose.

    tables: per metric, of the samples that `features` show. predictions, cascade: of the same samples, and what to do
    with them. whole: the judged metric of the same samples under `whole`, where a probe can be made. labelled: the
    expert of each sample's domain. `policy` says which of the policies is the mixture's. runs_first: the expert whose
    features routers see, if any. advance: told of JUDGING_STEPS steps.
    """
    costs, outcomes, policies = {}, {}, {}
    for name, router in routers.items():
        costs[name] = router.predict(features).cpu()
        if name != UNGUARDED:
            choice = choose(costs[name]).numpy().astype(np.int64)
            outcomes[name] = routed(tables, choice, None if isinstance(router, Constant) else runs_first)
        advance(1)
    if cascade is not None and predictions is not None:
        looks = cascade.always_first is None and not isinstance(routers[MIXTURE], Constant)
        answers = cascade.answer(choose(costs[MIXTURE]), torch.from_numpy(predictions.probabilities))
        policies[CASCADE] = cascaded(tables, predictions, answers, runs_first if looks else None)
    if whole is not None:
        policies[PROBE] = probed(tables, whole, whole.metric)
    if policies:
        outcomes |= {ROUTE: outcomes[MIXTURE], **policies}
        outcomes[MIXTURE] = outcomes[policy]
    if labelled is not None:
        outcomes[DOMAIN] = routed(tables, labelled)
    return Answers(outcomes, costs[UNGUARDED].double().numpy())


def _costs(table: LossTable) -> Tensor:
    return torch.from_numpy(METRICS[table.metric].cost(table.mean))
