"""Specialists beside other experts on CIFAR-10's ResNet-20 at 4 bits: one expert per image, and cascades.

    python -m benchmarks.vision_specialists --models MODELS --data CIFAR --work FOLDER [--out docs/results.md]

MODELS, CIFAR, FOLDER and the halves of the test split are those of `benchmarks.vision`, whose experts of this network
are taken where FOLDER has all of them, and made alone otherwise. `--method`, `--share` and `--rounds` describe the
family, which is fitted to training images alone; half of the test split trains routers and thresholds and chooses the
best single expert, the other half is reported. Routers are what costs little here, `linear` and `knn`, on 64 principal
components of the usual features, fitted to three quarters of the router's half: the better one on the last quarter is
used where it clears the bar of `moqe.router.selection`, and the fallback elsewhere (the generalist of a family, else
the best single expert).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from benchmarks.tables import table, write_section
from benchmarks.vision import HALVES, METHODS, NETS, SCHEMES, TOP1, WHOLE, expert_name, halves, make_recipe, score
from moqe.cli import Bars
from moqe.evaluate import BASE, read_losses, read_predictions
from moqe.evaluate.format import metric_bounds, metric_difference, metric_difference_bounds, metric_value, number
from moqe.evaluate.loss_table import Floats
from moqe.evaluate.predictions import Predictions
from moqe.evaluate.significance import Interval, intervals
from moqe.expert_options import IMAGE_METHODS
from moqe.models.clusters import clusters
from moqe.recipe import GENERALIST, Recipe, parse_recipe
from moqe.router.cascade import fit_guarded_cascade
from moqe.router.examples import RoutingExamples
from moqe.router.features import Features, SelectedFeatures, VectorFeatures
from moqe.router.knn import fit_knn
from moqe.router.linear import fit_linear
from moqe.router.router import choose
from moqe.router.selection import judge
from moqe.tasks.images import ImageTask

NET, BITS = "resnet20", "4 bits"
CALIBRATION = 2048
COUNT, OWN_WEIGHT, STEPS = 3, 4.0, 300
MAX_COST, COMPONENTS = 1.1, 64
ALL, BEST = "methods and family", "best single"


@dataclass(frozen=True)
class Scored:
    """What experts do on the test split: predictions, cross-entropy in nats, (n, experts), and the base's right
    answers, (n,)."""

    predictions: Predictions
    nats: Floats
    base: Floats

    def columns(self, names: Sequence[str]) -> NDArray[np.int64]:
        """Where these experts stand."""
        return np.array([self.predictions.experts.index(name) for name in names])

    @property
    def right(self) -> Floats:
        """Right answers, (n, experts)."""
        answers = self.predictions.log_probabilities.argmax(2) == self.predictions.label[:, None]
        return np.asarray(answers, np.float64)


@dataclass
class Line:
    """A way of answering: right answers and forward passes of each image, summed over the halves that report it."""

    right: Floats
    cost: Floats
    used: set[str] = field(default_factory=set)


def family_recipe(options: argparse.Namespace) -> Recipe:
    """The recipe of a generalist and specialists of one network; images and preprocessing are the other experts'."""
    own = argparse.Namespace(**(vars(options) | {"calibration_samples": CALIBRATION}))
    content = make_recipe(own, NET, BITS).to_mapping()
    del content["experts"]
    family = {
        "by": "cluster",
        "count": COUNT,
        "method": options.method,
        "scheme": SCHEMES[BITS],
        "share": options.share,
        "rounds": options.rounds,
        "own_weight": OWN_WEIGHT,
        options.method: {"steps": STEPS},
    }
    return parse_recipe(content | {"specialists": family})


def methods_recipe(options: argparse.Namespace) -> Recipe:
    """The recipe of experts by other methods: that of `benchmarks.vision` where it was built, else this network's."""
    whole = make_recipe(options, NETS[-1], BITS)
    if (options.work / whole.hash).exists():
        return whole
    content = make_recipe(options, NET, BITS).to_mapping()
    wanted = {expert_name(NET, method) for method in METHODS}
    return parse_recipe(content | {"experts": [each for each in content["experts"] if each["name"] in wanted]})


def nearest_clusters(known: Tensor, new: Tensor, seed: int) -> NDArray[np.int64]:
    """The calibration cluster that each test image lies nearest to, (n,): what a router that knew clusters would do."""
    label = torch.tensor(clusters(known, COUNT, seed, "calibration images"))
    centres = torch.stack([known[label == one].double().mean(0) for one in range(COUNT)])
    nearest: NDArray[np.int64] = torch.cdist(new.double(), centres).argmin(1).numpy()
    return nearest


def principal(known: Tensor, new: Tensor) -> VectorFeatures:
    """The test images' features along the calibration images' first principal components."""
    centre = known.mean(0)
    _, axes = torch.linalg.eigh((known - centre).T @ (known - centre))  # ascending
    return VectorFeatures((new - centre) @ axes[:, -COMPONENTS:])


def measure(
    scored: Scored, features: Features, groups: Mapping[str, tuple[str, ...]], cluster: NDArray[np.int64], seed: int
) -> tuple[dict[str, Line], Floats]:
    """Every line by name, and in how many halves each image was reported, (n,).

    groups: experts by what they are called together; the last one holds all.
    """
    everyone = list(groups.values())[-1]
    right, label = scored.right, torch.tensor(scored.predictions.label)
    probabilities = torch.from_numpy(scored.predictions.probabilities)
    n = len(label)
    lines: dict[str, Line] = {}
    reported = np.zeros(n)

    def add(name: str, rows: NDArray[np.int64], values: Floats, cost: Floats | float = 1.0, used: str = "") -> None:
        line = lines.setdefault(name, Line(np.zeros(n), np.zeros(n)))
        line.right[rows] += values
        line.cost[rows] += cost
        line.used |= {used} if used else set()

    for half in range(HALVES):
        train, validation, report = halves(scored.predictions.label, half)
        both = np.concatenate([train, validation])
        reported[report] += 1
        columns = scored.columns(everyone)
        costs = {name: Tensor() for name in ("linear", "knn")}
        fitted = [
            RoutingExamples(
                SelectedFeatures(features, torch.from_numpy(rows)),
                torch.from_numpy(scored.nats[np.ix_(rows, columns)]),
                tuple(map(str, rows)),
            )
            for rows in (train, validation)
        ]
        for name, fit in (("linear", fit_linear), ("knn", fit_knn)):
            costs[name] = fit(fitted[0], fitted[1]).predict(features).double().cpu()  # (n, everyone)
        best = everyone[int(right[np.ix_(both, columns)].sum(0).argmax())]
        add(BEST, report, right[report, scored.columns([best])[0]], used=best)
        add(BASE, report, scored.base[report])
        for name in everyone:
            add(name, report, right[report, scored.columns([name])[0]])
        family = groups["family"]
        add("by cluster", report, right[report, scored.columns(family[1:])[cluster[report]]])
        for called, names in groups.items():
            columns, places = scored.columns(names), [everyone.index(name) for name in names]
            judged = RoutingExamples(
                fitted[1].features,
                fitted[1].losses[:, places],
                fitted[1].document,
                1.0 - torch.from_numpy(right[np.ix_(validation, columns)]),
            )
            alone = (
                names.index(GENERALIST) if GENERALIST in names else int(right[np.ix_(both, columns)].sum(0).argmax())
            )
            found = {
                name: judge(name, cost[validation][:, places], judged, alone, len(costs))
                for name, cost in costs.items()
            }
            winners = sorted((one for one in found.values() if one.wins), key=lambda one: one.loss)
            choice = torch.full((n,), alone)
            if winners:
                choice = choose(costs[winners[0].name][:, places])
            add(
                f"mixture of {called}",
                report,
                right[report, np.array(columns)[choice[report].numpy()]],
                used=winners[0].name if winners else names[alone],
            )
            for name, cost in costs.items():
                free = choose(cost[:, places])[report].numpy()
                add(f"router `{name}` of {called}", report, right[report, np.array(columns)[free]])
            unseen = torch.zeros(len(both), dtype=torch.bool)
            unseen[len(train) :] = True
            decided = fit_guarded_cascade(
                choice[both], probabilities[both][:, columns], label[both], MAX_COST, unseen, seed
            )
            answers = decided.cascade.answer(choice[report], probabilities[report][:, columns])
            add(
                f"cascade of {called}",
                report,
                (answers.probabilities.argmax(1) == label[report]).double().numpy(),
                answers.cost.numpy(),
            )
            add(f"oracle of {called}", report, right[np.ix_(report, columns)].max(1))
    return lines, reported


def difference(values: Floats, recipe: Recipe) -> Interval:
    """The mean of paired differences with its interval over images."""
    image = np.arange(len(values)).astype(str)
    (found,) = intervals(
        image, values[:, None], np.ones(len(values)), recipe.bootstrap_samples, recipe.seed, differences=True
    )
    return found


def points(found: Interval) -> str:
    """A difference of shares in points with its interval."""
    return f"{metric_difference(found.value, TOP1)} {metric_difference_bounds(found, TOP1)}"


def describe(lines: Mapping[str, Line], reported: Floats, recipe: Recipe) -> str:
    """The table of all lines, and the comparisons that matter."""
    seen = reported > 0
    mean = {name: line.right[seen] / reported[seen] for name, line in lines.items()}
    image, ones = np.arange(int(seen.sum())).astype(str), np.ones(int(seen.sum()))
    rows = []
    for name, values in mean.items():
        (found,) = intervals(image, values[:, None], ones, recipe.bootstrap_samples, recipe.seed)
        cost = float((lines[name].cost[seen] / reported[seen]).mean())
        bound = name == BASE or name.startswith("oracle")
        rows.append(
            [
                LABELS.get(name, name) + (f" ({', '.join(sorted(lines[name].used))})" if lines[name].used else ""),
                f"{metric_value(found.value, TOP1)} {metric_bounds(found.low, found.high, TOP1)}",
                "" if name == BEST else points(difference(values - mean[BEST], recipe)),
                "" if bound else number(cost, 3),
            ]
        )
    pairs = [
        ("mixture of family", GENERALIST),
        ("mixture of family", BEST),
        (f"mixture of {ALL}", BEST),
        ("by cluster", GENERALIST),
        ("cascade of family", GENERALIST),
        (f"cascade of {ALL}", "cascade of methods"),
        (f"cascade of {ALL}", BEST),
    ]
    compared = [
        [first, LABELS.get(second, second), points(difference(mean[first] - mean[second], recipe))]
        for first, second in pairs
    ]
    header = ["line", "top-1, % [95 %]", "minus best single, points [95 %]", "mean cost"]
    return f"{table(header, rows)}\n\n{table(['line', 'against', 'points [95 %]'], compared)}"


LABELS = {
    BASE: "full precision",
    BEST: "best single expert of all, chosen on the router's half",
    "by cluster": "specialist of the image's cluster",
}


def own_ground(scored: Scored, family: Sequence[str], cluster: NDArray[np.int64], recipe: Recipe) -> str:
    """Each specialist against the generalist on the test images of its cluster, and on all others."""
    nats, right = (values[:, scored.columns(family)] for values in (scored.nats, scored.right))
    rows = []
    for index, name in enumerate(family[1:]):
        own = cluster == index
        cells = [name, f"{own.sum():,}"]
        for part in (own, ~own):
            loss = difference((nats[:, index + 1] - nats[:, 0])[part], recipe)
            cells.append(f"{loss.value:+.4f} [{loss.low:+.4f}, {loss.high:+.4f}]")
            cells.append(points(difference((right[:, index + 1] - right[:, 0])[part], recipe)))
        rows.append(cells)
    header = ["specialist minus generalist", "own images", "own: nats [95 %]", "own: points [95 %]"]
    return table([*header, "others: nats [95 %]", "others: points [95 %]"], rows)


def main() -> None:
    """Read the command line, make and score what is missing, write the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("docs/results.md"))
    parser.add_argument("--calibration-samples", type=int, default=1024, help="of the other experts")
    parser.add_argument("--method", choices=IMAGE_METHODS, default="qat", help="of the family")
    parser.add_argument("--share", choices=("none", "codes"), default="none")
    parser.add_argument("--rounds", type=int, default=0, help="of alternation")
    options = parser.parse_args()
    console, bars = Console(stderr=True), Bars()
    others = methods_recipe(options)
    methods = ImageTask(others, options.work / others.hash)
    wanted = tuple(expert_name(NET, method) for method in METHODS)
    recipe = family_recipe(options)
    task = ImageTask(recipe, options.work / recipe.hash)
    task.make_experts(bars)
    methods.make_experts(bars)
    console.print("experts made")
    family = tuple(expert.name for expert in recipe.family)
    models = {BASE: (task, BASE)} | {name: (methods, name) for name in wanted}
    work = options.work / recipe.hash / "scores"
    score(models | {name: (task, name) for name in family}, work, bars)
    predictions = read_predictions(work / "predictions.parquet", "test")
    assert predictions is not None
    losses = read_losses(work / "losses.parquet", "test", WHOLE, "cross_entropy")
    base = read_losses(work / "losses.parquet", "test", WHOLE, "top1").base
    everyone = (*wanted, *family)
    scored = Scored(predictions.of(everyone), losses.of(everyone).loss, base)
    groups = {"methods": wanted, "family": family, ALL: everyone}
    known, new = (task.features(split, WHOLE).pooled() for split in ("calibration", "test"))
    cluster = nearest_clusters(known, new, recipe.seed)
    lines, reported = measure(scored, principal(known, new), groups, cluster, recipe.seed)
    kind = [options.share] + ([options.method] if options.method != "qat" else [])
    kind += [f"rounds-{options.rounds}"] if options.rounds else []
    title = f"## Specialists on CIFAR-10: {NET}, {BITS}, {options.method}, share: {options.share}"
    title += f", {options.rounds} rounds" if options.rounds else ""
    setting = (
        f"A generalist and {COUNT} specialists by cluster, all {options.method} with {STEPS} updates of 32 on "
        f"{CALIBRATION:,} training images; specialists see their own {OWN_WEIGHT:g} times as often. "
        f"Cascades may cost {MAX_COST:g}."
    )
    content = "\n\n".join(
        [title, setting, describe(lines, reported, recipe), own_ground(scored, family, cluster, recipe)]
    )
    write_section(options.out, f"vision-specialists-{'-'.join(kind)}", content)
    console.print(content)


if __name__ == "__main__":
    main()
