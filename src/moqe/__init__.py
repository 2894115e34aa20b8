"""Mixture of Quantization Experts: several quantized variants of one model, and a router that picks one per input.

    import moqe

    moqe.build("recipe.yaml", "out/mixture")
    mixture = moqe.load("out/mixture")
    mixture.route("def main():").expert
    mixture.generate("The quick brown").text
    mixture.score("The quick brown fox").perplexity

Every verb of the command line is a function here, of the same name and with the same options; errors are subclasses of
`MoqeError`.
"""

from __future__ import annotations

from moqe.advice import Advice, advise
from moqe.build import BuildResult, Plan, build, evaluate, plan
from moqe.bundled import quickstart_recipe
from moqe.doctor import doctor
from moqe.errors import MoqeError
from moqe.export import Export, export
from moqe.mixture import Classification, Decision, Generation, Mixture, Score, inspect, load
from moqe.recipe import Recipe, load_recipe, parse_recipe
from moqe.speed import Bench, bench
from moqe.verbs import classify, generate, quickstart, route
from moqe.version import __version__

__all__ = [
    "Advice",
    "Bench",
    "BuildResult",
    "Classification",
    "Decision",
    "Export",
    "Generation",
    "Mixture",
    "MoqeError",
    "Plan",
    "Recipe",
    "Score",
    "__version__",
    "advise",
    "bench",
    "build",
    "classify",
    "doctor",
    "evaluate",
    "export",
    "generate",
    "inspect",
    "load",
    "load_recipe",
    "parse_recipe",
    "plan",
    "quickstart",
    "quickstart_recipe",
    "route",
]
