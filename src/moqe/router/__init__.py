"""Routers: from what is known of a sample to the expert with the lowest predicted loss."""

from moqe.router.cascade import Cascade, CascadeAnswer, CascadeDecision, fit_cascade, fit_guarded_cascade
from moqe.router.examples import RoutingExamples
from moqe.router.features import Features, TokenFeatures, VectorFeatures
from moqe.router.fitted import FittedNovelty, FittedRouter, UnseenChoices
from moqe.router.guard import GuardDecision, GuardedRouter, guard
from moqe.router.novelty import Novelty, NoveltyRouter
from moqe.router.policy_file import load_cascade, save_cascade
from moqe.router.presets import fit_baselines, fit_paper, fit_tuned
from moqe.router.router import Router, Unit, choose, realised_losses
from moqe.router.saved import ROUTERS, load_router, save_router
from moqe.router.wrapped import innermost, novelty_of, with_innermost

__all__ = [
    "ROUTERS",
    "Cascade",
    "CascadeAnswer",
    "CascadeDecision",
    "Features",
    "FittedNovelty",
    "FittedRouter",
    "GuardDecision",
    "GuardedRouter",
    "Novelty",
    "NoveltyRouter",
    "Router",
    "RoutingExamples",
    "TokenFeatures",
    "Unit",
    "UnseenChoices",
    "VectorFeatures",
    "choose",
    "fit_baselines",
    "fit_cascade",
    "fit_guarded_cascade",
    "fit_paper",
    "fit_tuned",
    "guard",
    "innermost",
    "load_cascade",
    "load_router",
    "novelty_of",
    "realised_losses",
    "save_cascade",
    "save_router",
    "with_innermost",
]
