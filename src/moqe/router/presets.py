"""The two ways to get a router from a recipe: the paper's, and what measures best.

`paper`: the paper's network, objective, balance and optimizer (Adam 5e-5 with cosine decay; text: batch 8 x
accumulation 6, weight decay 0.01; image: 48 x 2 and none). The number of epochs is not in the paper; 10 is what the
authors' published training command uses for text. `tuned`: linear, knn, logistic, a classifier of domains where there
are several, and a small network with each of the three objectives are cross-validated by document over training and
validation data; the best of those whose gain clears the bar of `moqe.router.selection` is refitted, else the router is
constant. The paper's router is compared with it on the validation documents, because training it once more for every
fold would cost more than everything else together.
Values a recipe sets replace the preset's; under `tuned` they apply to the networks, and a set objective leaves only the
network with that one.

The paper's text network is trained with products in bfloat16 where the processor has them.

Compute is capped: without `router.epochs` in the recipe the number of epochs is lowered, with a warning, until training
is estimated at no more than `MAX_MULTIPLICATIONS`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moqe.progress import Advance, Progress, Silent
from moqe.recipe import Router as RouterOptions
from moqe.router.baselines import Random, Uniform, fit_constant
from moqe.router.domain_classifier import DomainClassifier, fit_domain_classifier
from moqe.router.examples import RoutingExamples
from moqe.router.fitted import FittedNovelty, FittedRouter, UnseenChoices
from moqe.router.guard import apply_guard, decide, guard, guarded_choice
from moqe.router.image_network import ImageNetwork
from moqe.router.knn import Knn, fit_knn
from moqe.router.linear import Linear, fit_linear
from moqe.router.logistic import Logistic, fit_logistic
from moqe.router.mlp_network import MlpNetwork
from moqe.router.novelty import NoveltyRouter, fit_novelty, refused_unseen, settle
from moqe.router.objectives import OBJECTIVES
from moqe.router.router import Router, choose
from moqe.router.selection import Candidate, Fit, better, folds_by_document, judge, predict_unseen
from moqe.router.text_network import RoutingNetwork, TextNetwork
from moqe.router.training import Epoch, TrainingOptions, train_network

logger = logging.getLogger("moqe")
SILENT = Silent()

FOLDS = 4
MAX_MULTIPLICATIONS = 2e13  # 3 x parameters x vectors x epochs: about four minutes on two cores


@dataclass(frozen=True)
class Preset:
    """A network, built from the recipe's options, the features' dimension and the number of experts, and its training.

    segment: features of one sample that the network averages into one vector, which is what it pays for.
    """

    network: Callable[[RouterOptions, int, int], RoutingNetwork]
    training: TrainingOptions
    segment: int = 1


def _paper_text(options: RouterOptions, dimension: int, experts: int) -> RoutingNetwork:
    return TextNetwork(
        dimension,
        experts,
        layers=2 if options.layers is None else options.layers,
        heads=4 if options.heads is None else options.heads,
        dropout=0.1 if options.dropout is None else options.dropout,
        max_tokens=options.max_tokens,
    )


TUNED_SEGMENT = 8


def _tuned_text(options: RouterOptions, dimension: int, experts: int) -> RoutingNetwork:
    return TextNetwork(
        dimension,
        experts,
        layers=1 if options.layers is None else options.layers,
        heads=4 if options.heads is None else options.heads,
        dropout=0.1 if options.dropout is None else options.dropout,
        max_tokens=options.max_tokens,
        width=64,
        segment=TUNED_SEGMENT,
    )


def _paper_image(options: RouterOptions, dimension: int, experts: int) -> RoutingNetwork:
    return ImageNetwork(dimension, experts)


def _tuned_image(options: RouterOptions, dimension: int, experts: int) -> RoutingNetwork:
    return MlpNetwork(dimension, experts)


PAPER: dict[str, Preset] = {
    "text": Preset(
        _paper_text,
        TrainingOptions("cross_entropy", 10, 8, 6, 5e-5, 0.01, balance=None, precision="auto"),
    ),
    "image": Preset(
        _paper_image,
        TrainingOptions("cross_entropy", 10, 48, 2, 5e-5, 0.0, balance=None),
    ),
}
TUNED: dict[str, Preset] = {
    "text": Preset(
        _tuned_text,
        TrainingOptions("expected_loss", 8, 32, 1, 1e-3, 0.01, balance=None, patience=3),
        segment=TUNED_SEGMENT,
    ),
    "image": Preset(
        _tuned_image,
        TrainingOptions("expected_loss", 20, 64, 1, 1e-3, 0.01, balance=None, patience=4),
    ),
}


def fit_baselines(train: RoutingExamples, validation: RoutingExamples, seed: int) -> dict[str, Router]:
    """The routers that every report shows beside the mixture, by name; none of them is guarded."""
    return {
        "constant": fit_constant(train),
        "random": Random(train.experts, seed),
        "uniform": Uniform(train.experts),
        "linear": fit_linear(train, validation),
        "knn": fit_knn(train, validation),
        "logistic": fit_logistic(train, validation),
    }


def fit_paper(
    options: RouterOptions,
    train: RoutingExamples,
    validation: RoutingExamples,
    seed: int,
    modality: str = "text",
    progress: Progress = SILENT,
    fallback: int | None = None,
) -> FittedRouter:
    """The paper's router; the epoch and the guard's decision come from `validation`.

    fallback: the expert that the guard falls back to; None takes the best single one of validation.
    Raises RecipeError for options that exclude each other, NumericalError when training diverges.
    """
    preset = PAPER[modality]
    training = _training(preset, options, train)
    if training.objective != "centred_regression" or "balance" in options.model_fields_set:
        training = replace(training, balance=options.balance)
    with progress.track("train the paper's router", training.epochs) as advance:
        router, history = _fit_network(preset, options, training, train, validation, seed, "paper", advance)
    costs = router.predict(validation.features)
    expert = validation.best_single if fallback is None else fallback
    seen = judge("paper", costs, validation, expert, len(history))  # the best epoch on these very samples
    rows = torch.arange(len(train), len(train) + len(validation))
    if not options.guard:
        unseen = UnseenChoices(rows, choose(costs).cpu())
        return FittedRouter(router, router, "paper", (seen,), history, None, unseen)
    guarded, decision = guard(router, validation, fallback, len(history))
    unseen = UnseenChoices(rows, guarded_choice(costs.cpu(), decision))
    return FittedRouter(guarded, router, "paper", (seen,), history, decision, unseen)


def fit_tuned(
    options: RouterOptions,
    train: RoutingExamples,
    validation: RoutingExamples,
    seed: int,
    modality: str = "text",
    progress: Progress = SILENT,
    fallback: int | None = None,
    paper: Router | None = None,
    epochs: int = 1,
) -> FittedRouter:
    """The candidate that measures best on documents it has not seen, or the constant router if none beats it.

    The guard decides on the same predictions for unseen documents. fallback: the expert that a router has to beat, that
    the guard falls back to and that novel samples get (see `moqe.router.novelty`); None takes the best single one of
    validation, and then no sample counts as novel. paper: the paper's router, fitted to the same, without a guard; it
    is taken where on validation it beats the best candidate by more than the standard error of their difference.
    epochs: those of `paper`, which is the best of them on validation, so that it must clear bars for as many more.
    Raises as `fit_paper` does, and DataError when there are too few documents to cross-validate.
    """
    pool = train.join(validation)
    expert = validation.best_single if fallback is None else fallback
    fits = _candidates(TUNED[modality], options, pool, seed)
    fold = folds_by_document(pool.document, FOLDS, seed)

    novelty, refused = None, torch.zeros(len(pool), 1, dtype=torch.bool)
    if fallback is not None and options.novelty is not None:
        novel, refused = refused_unseen(pool, fold, options.novelty, expert)
        novelty = FittedNovelty(fit_novelty(train, validation, options.novelty), options.novelty, novel)

    rival = paper if options.objective is None else None
    compared = len(fits) + (rival is not None)
    judged: list[Candidate] = []
    unseen: dict[str, Tensor] = {}
    with progress.track("compare routers", FOLDS * len(fits)) as advance:
        for name, fit in fits.items():
            unseen[name] = settle(predict_unseen(fit, pool, fold, advance), expert, refused)
            judged.append(judge(name, unseen[name], pool, expert, compared))
    winners = [candidate for candidate in judged if candidate.wins]
    chosen = min(winners, key=lambda candidate: candidate.loss).name if winners else None
    rows = torch.arange(len(pool))
    always = fit_constant(validation, expert)
    costs = always.predict(pool.features).double() if chosen is None else unseen[chosen]
    if rival is not None:
        new = rows[len(train) :]
        theirs = settle(rival.predict(validation.features).double().cpu(), expert, refused[new])
        judged.append(judge("paper", theirs, validation, expert, compared * epochs))
        if judged[-1].wins and better(theirs, costs[new], validation, epochs):
            chosen, rows, costs = "paper", new, theirs

    if chosen is None:
        fixed = UnseenChoices(rows, torch.full_like(rows, expert))
        return FittedRouter(always, always, always.name, tuple(judged), (), None, fixed, novelty)

    router = rival if rival is not None and chosen == "paper" else fits[chosen](train, validation)
    if isinstance(router, Linear | Knn | Logistic | DomainClassifier):
        router = router.refit(pool)
    if novelty is not None:
        router = NoveltyRouter(router, expert, novelty.novelty)
    if not options.guard:
        free = UnseenChoices(rows, choose(costs))
        return FittedRouter(router, router, chosen, tuple(judged), (), None, free, novelty)
    known = pool.select(rows)
    decision = decide(costs, known.deciding, known.document, expert, epochs if chosen == "paper" else 1)
    held = UnseenChoices(rows, guarded_choice(costs, decision))
    guarded = apply_guard(router, decision, validation)
    return FittedRouter(guarded, router, chosen, tuple(judged), (), decision, held, novelty)


def _candidates(preset: Preset, options: RouterOptions, examples: RoutingExamples, seed: int) -> dict[str, Fit]:
    """What `tuned` compares, by name."""
    base = _training(preset, options, examples)

    def network(name: str, objective: str) -> Fit:
        balanced = "balance" in options.model_fields_set and (
            objective != "centred_regression" or options.objective == objective
        )
        training = replace(base, objective=objective, balance=options.balance if balanced else None)

        def fit(train: RoutingExamples, validation: RoutingExamples) -> Router:
            return _fit_network(preset, options, training, train, validation, seed, name, None)[0]

        return fit

    if options.objective is not None:
        name = f"network-{options.objective}"
        return {name: network(name, options.objective)}
    networks = {f"network-{objective}": network(f"network-{objective}", objective) for objective in OBJECTIVES}
    told: dict[str, Fit] = {"domain-classifier": _fit_domains} if len(set(examples.label or ())) > 1 else {}
    return {"linear": fit_linear, "knn": fit_knn, "logistic": fit_logistic, **told, **networks}


def _fit_domains(train: RoutingExamples, validation: RoutingExamples) -> Router:
    """A classifier of domains; the best constant where this part of the documents is of one domain."""
    if len(set(train.label or ())) > 1:
        return fit_domain_classifier(train, validation)
    return fit_constant(train)


def _fit_network(
    preset: Preset,
    options: RouterOptions,
    training: TrainingOptions,
    train: RoutingExamples,
    validation: RoutingExamples,
    seed: int,
    name: str,
    epoch_done: Advance | None,
) -> tuple[Router, tuple[Epoch, ...]]:
    def make() -> RoutingNetwork:
        return preset.network(options, train.features.dimension, train.experts)

    return train_network(make, train, validation, training, seed, name, epoch_done)


def _training(preset: Preset, options: RouterOptions, examples: RoutingExamples) -> TrainingOptions:
    """The preset's training with what the recipe sets, and epochs under the cap where the recipe sets none."""
    names = ("objective", "epochs", "batch_size", "accumulation", "learning_rate", "weight_decay", "precision")
    stated = {name: value for name in names if (value := getattr(options, name)) is not None}
    training = replace(preset.training, **stated)
    if options.epochs is not None:
        return training
    sample = examples.features.batch(torch.zeros(1, dtype=torch.int64))
    vectors = 1 if sample.dim() == 2 else -(-min(sample.shape[1], options.max_tokens) // preset.segment)
    with torch.random.fork_rng(devices=[]):
        network = preset.network(options, examples.features.dimension, examples.experts)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    affordable = max(1, int(MAX_MULTIPLICATIONS / (3 * parameters * vectors * len(examples))))
    if affordable < training.epochs:
        logger.warning(
            "router: %d epochs instead of %d, to bound its training on %d samples; set router.epochs to choose",
            affordable,
            training.epochs,
            len(examples),
        )
    return replace(training, epochs=min(training.epochs, affordable))
