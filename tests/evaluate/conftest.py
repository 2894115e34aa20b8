"""Small loss tables for the tests of this folder, as fixtures that return functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from moqe.data.classification import CLASS_METRICS, score_classes
from moqe.evaluate import judge
from moqe.evaluate.loss_table import LossTable
from moqe.evaluate.outcome import routed
from moqe.evaluate.predictions import Predictions
from moqe.evaluate.verdict import ProtocolVerdict


def make_by_hand(
    loss: Sequence[Sequence[float]],
    base: Sequence[float],
    documents: Sequence[str] | None = None,
    domains: Sequence[str] | None = None,
    halves: Sequence[Sequence[float]] | None = None,
    tokens: float = 10.0,
    experts: Sequence[str] = ("rtn", "gptq"),
    metric: str = "nats_per_token",
) -> LossTable:
    """A table of given sums; `halves` are the sums of the first halves, by default half of each sum."""
    total = np.asarray(loss, float)
    n = len(total)
    first = total / 2 if halves is None else np.asarray(halves, float)
    return LossTable(
        protocol="whole",
        runtime="reference",
        metric=metric,
        experts=tuple(experts),
        loss=total,
        base=np.asarray(base, float),
        halves=np.stack([first, total - first], -1),
        count=np.full(n, tokens),
        count_halves=np.full((n, 2), tokens / 2),
        text_bytes=np.full(n, 4 * tokens),
        sample=np.arange(n),
        document=np.asarray(documents or [f"d{i}" for i in range(n)]),
        domain=np.asarray(domains or ["code"] * n),
    )


def make_simulated(
    seed: int,
    documents: int = 40,
    per_document: int = 3,
    signal: float = 0.1,
    experts: Sequence[str] = ("awq", "gptq", "rtn"),
    domains: Sequence[str] = ("code", "prose", "reference"),
    protocol: str = "whole",
    metric: str = "nats_per_token",
) -> LossTable:
    """Expert e is better by `signal` nats per token in domain e modulo the number of domains, amid paired noise."""
    rng = np.random.default_rng(seed)
    n, e = documents * per_document, len(experts)
    document = np.repeat(np.arange(documents), per_document)
    domain = document % len(domains)
    level = rng.normal(3.0, 0.5, documents)[document]
    mean = level[:, None] + rng.normal(0.1, 0.03, (n, e))
    mean -= signal * (np.arange(e)[None, :] % len(domains) == domain[:, None])
    count = rng.integers(100, 128, n).astype(float)
    loss = mean * count[:, None]
    first = (mean + rng.normal(0, 0.05, (n, e))) * (count // 2)[:, None]
    return LossTable(
        protocol=protocol,
        runtime="reference",
        metric=metric,
        experts=tuple(experts),
        loss=loss,
        base=level * count,
        halves=np.stack([first, loss - first], -1),
        count=count,
        count_halves=np.stack([count // 2, count - count // 2], -1),
        text_bytes=count * 4,
        sample=np.arange(n),
        document=np.asarray([f"document-{i}" for i in document]),
        domain=np.asarray([domains[i] for i in domain]),
    )


def make_domain_choice(table: LossTable) -> np.ndarray:
    """What a router that knows the domain chooses on a simulated table."""
    labels = sorted(set(table.domain.tolist()))
    return np.asarray([labels.index(name) % len(table.experts) for name in table.domain], np.int64)


@dataclass(frozen=True)
class Images:
    """A test set of classified images: tables by metric, predictions, names of classes."""

    tables: dict[str, LossTable]
    predictions: Predictions
    classes: tuple[str, ...]

    def select(self, rows: np.ndarray) -> Images:
        tables = {name: table.select(rows) for name, table in self.tables.items()}
        return Images(tables, self.predictions.select(rows), self.classes)


def images_of(logits: np.ndarray, base: np.ndarray, label: Sequence[int], experts: Sequence[str]) -> Images:
    """What experts' logits, (n, experts, classes), and the base model's, (n, classes), are worth."""
    n, _, classes = logits.shape
    labels = torch.as_tensor(label)
    scored = [score_classes(torch.as_tensor(logits[:, e]), labels) for e in range(len(experts))]
    of_base = score_classes(torch.as_tensor(base), labels)
    names = tuple(f"class {i}" for i in range(classes))
    tables = {}
    for metric in CLASS_METRICS:
        loss = np.stack([one.losses["whole"][metric].loss_sum for one in scored], 1)
        nothing = np.zeros(loss.shape)
        tables[metric] = LossTable(
            protocol="whole",
            runtime="reference",
            metric=metric,
            experts=tuple(experts),
            loss=loss,
            base=of_base.losses["whole"][metric].loss_sum,
            halves=np.stack([nothing, loss], -1),
            count=np.ones(n),
            count_halves=np.stack([np.zeros(n), np.ones(n)], -1),
            text_bytes=np.zeros(n),
            sample=np.arange(n),
            document=np.asarray([f"image-{i:05d}" for i in range(n)]),
            domain=np.asarray([names[i] for i in label]),
        )
    found = [one.log_probabilities for one in (*scored, of_base)]
    predictions = Predictions(tuple(experts), labels.numpy(), np.stack(found[:-1], 1), found[-1])
    return Images(tables, predictions, names)


def make_images(
    seed: int, n: int = 300, classes: int = 6, experts: Sequence[str] = ("qat", "brecq", "dsconv"), signal: float = 1.5
) -> Images:
    """Expert e knows the classes e, e + experts, ... better than the others; the base model knows all well."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, classes, n)
    truth = np.eye(classes)[label]
    noise = rng.normal(0, 1, (n, 1, classes)) + rng.normal(0, 0.6, (n, len(experts), classes))
    strength = 2.0 + signal * (label[:, None] % len(experts) == np.arange(len(experts))[None, :])
    logits = 1.2 * (strength[:, :, None] * truth[:, None, :] + noise)
    base = 1.2 * ((2.5 + signal) * truth + noise[:, 0])
    return images_of(logits, base, label.tolist(), experts)


def judge_choices(
    test: LossTable,
    validation: LossTable,
    choices: Mapping[str, np.ndarray],
    seed: int,
    bootstrap_samples: int,
    predicted: np.ndarray | None = None,
) -> ProtocolVerdict:
    """The verdict on routers that are known by their choices, under the tables' only metric."""
    tables = {test.metric: test}
    outcomes = {name: routed(tables, choice) for name, choice in choices.items()}
    return judge(tables, validation, outcomes, seed, bootstrap_samples, predicted=predicted)


@pytest.fixture
def by_hand() -> Callable[..., LossTable]:
    return make_by_hand


@pytest.fixture
def simulated() -> Callable[..., LossTable]:
    return make_simulated


@pytest.fixture
def domain_choice() -> Callable[[LossTable], np.ndarray]:
    return make_domain_choice


@pytest.fixture
def judged() -> Callable[..., ProtocolVerdict]:
    return judge_choices


@pytest.fixture
def scored_images() -> Callable[..., Images]:
    return images_of


@pytest.fixture
def simulated_images() -> Callable[..., Images]:
    return make_images
