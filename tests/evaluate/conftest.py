"""Small loss tables for the tests of this folder, as fixtures that return functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest

from moqe.evaluate import judge
from moqe.evaluate.loss_table import LossTable
from moqe.evaluate.outcome import routed
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
