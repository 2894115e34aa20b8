"""Table 1 of the MoQE paper on image classifiers that fit a laptop: CIFAR-10's residual networks.

    python -m benchmarks.vision --models MODELS --data CIFAR --work FOLDER [--out docs/results.md]

MODELS holds `resnet{20,32,44,56}.safetensors`, CIFAR holds `train.parquet` and `test.parquet` (docs/results.md says
which were used). FOLDER keeps experts, losses and finished tables: the command resumes.

The networks have seen the training images and their authors chose the checkpoint on the test split, so only the test
split says how often anybody is right, and a router needs to know that. It is therefore halved at random, by class, five
times: routers, thresholds and the choice of the best single expert come from one half, what is reported from the other.
An image's result is its mean over the halves in which it was reported; intervals are bootstraps over images. They say
how much the images matter, given these five divisions.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from benchmarks.tables import table, write_section
from moqe.cli import Bars
from moqe.evaluate import BASE, LossTableFile, read_losses, read_predictions
from moqe.evaluate.format import metric_bounds, metric_difference, metric_difference_bounds, metric_value, number
from moqe.evaluate.judge import best_per_sample
from moqe.evaluate.loss_table import Floats
from moqe.evaluate.metrics import METRICS
from moqe.evaluate.outcome import routed
from moqe.evaluate.routing import RoutingData, answer, fit_routers
from moqe.evaluate.significance import Interval, intervals
from moqe.recipe import Recipe, parse_recipe
from moqe.router.features import SelectedFeatures
from moqe.store import read_json, write_json
from moqe.tasks.images import ImageTask

NETS = ("resnet20", "resnet32", "resnet44", "resnet56")
METHODS = ("qat", "brecq", "dsconv", "n2uq")
PLAIN = "ptq"
SCHEMES = {"int8": "w8a8", "4 bits": "w4a4"}
# Updates. Eight bits lose so little that more of them change nothing.
TRAINING: dict[str, dict[str, dict[str, Any]]] = {
    "int8": {
        "qat": {"qat": {"steps": 100}},
        "brecq": {"brecq": {"steps": 100}},
        "n2uq": {"n2uq": {"steps": 200}},
        "dsconv": {"dsconv": {"steps": 0}},
    },
    "4 bits": {
        "qat": {"qat": {"steps": 300}},
        "brecq": {"brecq": {"steps": 300}},
        "n2uq": {"n2uq": {"steps": 300}},
        "dsconv": {"dsconv": {"steps": 100}},
    },
}
RUNTIMES = {"int8": "onnx", "4 bits": "reference"}
HALVES = 5
VALIDATION = 0.25
SMALLEST_GAIN = 0.4  # points that the cascade of different bases should win
WHOLE = "whole"
TOP1 = METRICS["top1"]


@dataclass(frozen=True)
class Ways:
    """What each way of answering scored on every image, summed over the halves that reported the image.

    right, cost: by name, (images,). reported: in how many halves, (images,).
    """

    right: Mapping[str, Floats]
    cost: Mapping[str, Floats]
    reported: Floats


@dataclass
class Table:
    """One table: experts, in which order they stand, and the full-precision model beside them."""

    title: str
    experts: tuple[str, ...]
    plain: tuple[str, ...]
    net: str
    rows: list[dict[str, Any]] = field(default_factory=list)


def expert_name(net: str, method: str) -> str:
    """The name of an expert in the recipe of all experts of one width."""
    return f"{net}-{method}"


def make_recipe(options: argparse.Namespace, net: str, bits: str) -> Recipe:
    """The recipe of all experts of all networks at one width; `net` is the base, whose first stage the router sees.

    The router's images are the training split's, which nobody looks at here: see this file's header.
    """
    train, test = str(options.data / "train.parquet"), str(options.data / "test.parquet")
    calibration = options.calibration_samples

    def weights(name: str) -> str:
        return str(options.models / f"{name}.safetensors")

    return parse_recipe(
        {
            "task": "image-classification",
            "base": f"benchmarks.cifar_resnet:{net}",
            "weights": weights(net),
            "data": {
                "calibration": [{"path": train, "max_documents": calibration}],
                "router": [{"path": train, "skip_documents": calibration, "max_documents": 40}],
                "test": [test],
                "calibration_samples": calibration,
                "preprocessing": {"crop": 32, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
            },
            "runtime": RUNTIMES[bits],
            "experts": [
                {
                    "name": expert_name(name, method),
                    "base": f"benchmarks.cifar_resnet:{name}",
                    "weights": weights(name),
                    "method": method,
                    "scheme": SCHEMES[bits],
                    **TRAINING[bits].get(method, {}),
                }
                for method in (PLAIN, *METHODS)
                for name in NETS
            ],
        }
    )


def score(models: Mapping[str, tuple[ImageTask, str]], work: Path, bars: Bars) -> None:
    """Score models on the test split, skipping what is scored already, and merge. models: task and its name there."""
    task = models[BASE][0]
    described = {"test": task.describe("test")}
    losses = LossTableFile(
        work / "parts", tuple(models), described, task.metrics, task.runtime_name, task.chunk_samples
    )
    for name, (owner, known_as) in models.items():
        pending = list(losses.pending(name, "test"))
        with bars.track(f"score {name}", len(pending)) as advance:
            for chunk in pending:
                losses.add(chunk, owner.losses(known_as, chunk.split, chunk.rows))
                advance(1)
    losses.merge(work / "losses.parquet", work / "predictions.parquet")


def halves(label: NDArray[np.int64], seed: int) -> tuple[NDArray[np.int64], ...]:
    """Rows for training the router, for its validation, and for the report: a half of every class for the report."""
    random = np.random.default_rng(seed)
    train, validation, report = [], [], []
    for one in np.unique(label):
        rows = random.permutation(np.flatnonzero(label == one))
        middle = len(rows) // 2
        first = round(middle * VALIDATION)
        validation += rows[:first].tolist()
        train += rows[first:middle].tolist()
        report += rows[middle:].tolist()
    return tuple(np.sort(np.asarray(part, np.int64)) for part in (train, validation, report))


def fill(one: Table, recipe: Recipe, task: ImageTask, losses: Path, bars: Bars) -> None:
    """Fit and judge over the halves; leaves rows, as JSON values."""
    columns = (*one.plain, *one.experts)
    tables = {metric: read_losses(losses, "test", WHOLE, metric) for metric in task.metrics}
    alone = tables["top1"].of((one.net, *columns))
    chosen = {metric: found.of(one.experts) for metric, found in tables.items()}
    stored = read_predictions(losses.with_name("predictions.parquet"), "test")
    assert stored is not None
    predictions, features = stored.of(one.experts), task.features("test", WHOLE)
    right: dict[str, Floats] = {}
    cost: dict[str, Floats] = {}
    reported = np.zeros(len(predictions))
    for half in range(HALVES):
        train, validation, report = halves(predictions.label, half)

        def data(rows: NDArray[np.int64]) -> RoutingData:
            return RoutingData(
                chosen[task.router_metric].select(rows),
                chosen[task.metric].select(rows),
                SelectedFeatures(features, torch.from_numpy(rows)),
                predictions.select(rows),
            )

        fitted = fit_routers(data(train), data(validation), recipe.router, task.modality, half, bars)
        test = {metric: found.select(report) for metric, found in chosen.items()}
        answers = answer(
            test,
            SelectedFeatures(features, torch.from_numpy(report)),
            fitted.routers,
            predictions=predictions.select(report),
            cascade=None if fitted.cascade is None else fitted.cascade.cascade,
            policy="route",
        )
        router_half = np.concatenate([train, validation])
        best = int(chosen["top1"].loss[router_half].sum(0).argmax())
        found = {
            f"router `{name}`" if name in ("paper", "linear", "knn") else name: x
            for name, x in answers.outcomes.items()
        }
        found["best single"] = routed(test, np.full(len(report), best))
        found["oracle"] = routed(test, best_per_sample(test, TOP1))
        for name, outcome in found.items():
            right.setdefault(name, np.zeros(len(reported)))[report] += outcome.values["top1"]
            cost.setdefault(name, np.zeros(len(reported)))[report] += outcome.cost
        for column, name in enumerate((BASE, *columns)):
            right.setdefault(name, np.zeros(len(reported)))[report] += alone.loss[report, column]
        right.setdefault("random", np.zeros(len(reported)))[report] += test["top1"].loss.mean(1)
        reported[report] += 1
    one.rows = rows_of(one, Ways(right, cost, reported), recipe)


def rows_of(one: Table, ways: Ways, recipe: Recipe) -> list[dict[str, Any]]:
    """Values, differences to the best single expert and costs, with their intervals over images."""
    seen = ways.reported > 0
    image = np.flatnonzero(seen).astype(str)
    means = {name: right[seen] / ways.reported[seen] for name, right in ways.right.items()}
    order = [BASE, *one.plain, *one.experts, "best single", "mixture", "router `paper`", "tuned", "router `linear`"]
    order += ["router `knn`", "cascade", "random", "oracle"]
    names = [name for name in dict.fromkeys(order) if name in means]
    values = np.stack([means[name] for name in names], axis=1)
    ones = np.ones(len(image))
    plain = intervals(image, values, ones, recipe.bootstrap_samples, recipe.seed)
    against = values - means["best single"][:, None]
    differences = intervals(image, against, ones, recipe.bootstrap_samples, recipe.seed, differences=True)
    rows = []
    for name, value, difference in zip(names, plain, differences, strict=True):
        passes = float((ways.cost[name][seen] / ways.reported[seen]).mean()) if name in ways.cost else 1.0
        rows.append({"name": name, "value": vars(value), "difference": vars(difference), "cost": passes})
    return rows


def text_of(one: Table) -> str:
    """A table as Markdown, and what it says in a sentence."""
    cells = []
    for row in one.rows:
        value, difference = Interval(**row["value"]), Interval(**row["difference"])
        same = row["name"] == "best single"
        cells.append(
            [
                LABELS.get(row["name"], row["name"]),
                f"{metric_value(value.value, TOP1)} {metric_bounds(value.low, value.high, TOP1)}",
                ""
                if same
                else f"{metric_difference(difference.value, TOP1)} {metric_difference_bounds(difference, TOP1)}",
                f"{row['cost']:.3f}" if row["name"] not in (BASE, "oracle", "random") else "",
            ]
        )
    header = ["line", "top-1, % [95 %]", "minus best single, points [95 %]", "mean cost"]
    return f"### {one.title}\n\n{table(header, cells)}\n\n{sentence(one)}"


LABELS = {
    "base": "full precision",
    "best single": "best single expert, chosen on the router's half",
    "mixture": "mixture (`tuned`, guard)",
    "tuned": "router `tuned`",
    "oracle": "oracle (any expert right)",
}


def sentence(one: Table) -> str:
    """Whether mixture, paper's router and cascade win."""
    parts = []
    for name, words in (
        ("mixture", "The mixture"),
        ("router `paper`", "The paper's router"),
        ("cascade", "The cascade"),
    ):
        row = next((row for row in one.rows if row["name"] == name), None)
        if row is None:
            continue
        difference = Interval(**row["difference"])
        wins = difference.excludes_zero() and difference.value > 0
        points = metric_difference(difference.value, TOP1)
        parts.append(
            f"{words} {'wins' if wins else 'does not win'} here ({points} points at {number(row['cost'], 3)} passes)."
        )
    return " ".join([*parts, hindsight(one)])


def hindsight(one: Table) -> str:
    """How far mixture and cascade are from the expert that turned out to be best, which nobody could know."""
    value = {row["name"]: row["value"]["value"] for row in one.rows}
    best = max(one.experts, key=lambda name: value[name])
    away = [
        f"the {words} {metric_difference(value[name] - value[best], TOP1)}"
        for name, words in (("mixture", "mixture"), ("cascade", "cascade"))
        if name in value
    ]
    return f"Against {best}, the best expert in hindsight: {', '.join(away)} points."


def tables(bits: str) -> list[Table]:
    """The tables of one width: one a network, and the best method of each network together."""
    found = [
        Table(
            f"{net}, {bits}",
            tuple(expert_name(net, method) for method in METHODS),
            (expert_name(net, PLAIN),),
            net,
        )
        for net in NETS
    ]
    different = Table(
        f"Different base models, {bits}: qat of each", tuple(expert_name(net, "qat") for net in NETS), (), NETS[-1]
    )
    return [*found, different]


def against_plain(bits: str, losses: Path, recipe: Recipe) -> str:
    """Every expert against its own base and against ptq on the whole test split."""
    found = read_losses(losses, "test", WHOLE, "top1")
    rows = []
    for net in NETS:
        base = found.loss[:, found.experts.index(net)]
        plain = found.loss[:, found.experts.index(expert_name(net, PLAIN))]
        for method in (PLAIN, *METHODS):
            own = found.loss[:, found.experts.index(expert_name(net, method))]
            cells = [expert_name(net, method), metric_value(float(own.mean()), TOP1)]
            for other in (base, plain):
                (difference,) = intervals(
                    found.document,
                    (own - other)[:, None],
                    found.count,
                    recipe.bootstrap_samples,
                    recipe.seed,
                    differences=True,
                )
                cells.append(
                    f"{metric_difference(difference.value, TOP1)} {metric_difference_bounds(difference, TOP1)}"
                    if not (method == PLAIN and other is plain)
                    else ""
                )
            rows.append(cells)
    header = ["expert", "top-1, %", "minus its full precision, points [95 %]", "minus ptq, points [95 %]"]
    return f"### All experts, {bits}, on all 10,000 test images\n\n{table(header, rows)}"


def main() -> None:
    """Read the command line, make what is missing, write the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("docs/results.md"))
    parser.add_argument("--calibration-samples", type=int, default=1024)
    parser.add_argument("--bits", choices=tuple(SCHEMES), action="append")
    options = parser.parse_args()
    console, bars = Console(stderr=True), Bars()
    options.work.mkdir(parents=True, exist_ok=True)
    for bits in options.bits or SCHEMES:
        recipe = make_recipe(options, NETS[-1], bits)
        work = options.work / recipe.hash
        task = ImageTask(recipe, work)
        task.make_experts(bars)
        console.print(bits, "experts made")
        models = {BASE: (task, BASE)}  # a runtime may keep a base model's file, so each has a folder of its own
        for net in NETS:
            models[net] = ImageTask(make_recipe(options, net, bits), work / "bases" / net), BASE
        score(models | {expert.name: (task, expert.name) for expert in recipe.experts}, work / "scores", bars)
        losses = work / "scores" / "losses.parquet"
        done: list[Table] = []
        for one in tables(bits):
            path = work / "tables" / f"{one.title.replace(' ', '-')}.json"
            if path.exists():
                one.rows = read_json(path)
            else:
                own = make_recipe(options, one.net, bits)
                fill(one, own, ImageTask(own, work), losses, bars)
                write_json(path, one.rows)
            done.append(one)
            console.print(one.title, sentence(one))
            content = "\n\n".join(text_of(table) for table in done)
            write_section(options.out, f"vision-{bits.replace(' ', '-')}", f"## CIFAR-10, {bits}\n\n{content}")
        summary = against_plain(bits, losses, recipe)
        write_section(options.out, f"vision-experts-{bits.replace(' ', '-')}", summary)


if __name__ == "__main__":
    main()
