"""Judging a mixture: from loss tables and outcomes to a verdict under one protocol.

Every comparison is paired on the same samples and resampled by document. The reference is the expert that is best on
validation, because nobody who deploys one expert could have picked it on the test set. A win is claimed only where the
interval of the difference excludes zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moqe.errors import ProtocolError
from moqe.evaluate.curve import routing_curve
from moqe.evaluate.loss_table import Floats, LossTable
from moqe.evaluate.metrics import METRICS, Metric, bits_per_byte, perplexity
from moqe.evaluate.outcome import Choice, Outcome, routed
from moqe.evaluate.sentence import sentence
from moqe.evaluate.significance import (
    Interval,
    intervals,
    paired_intervals,
    percentile_interval,
    resampled_ratios,
)
from moqe.evaluate.verdict import DomainRow, Kind, Line, ProtocolVerdict, Routed

MIXTURE, CONSTANT = "mixture", "constant"
ROUTE, CASCADE, PROBE = "route", "cascade", "probe"
DOMAIN = "domain"
KINDS: dict[str, Kind] = {
    MIXTURE: "mixture",
    ROUTE: "policy",
    CASCADE: "policy",
    PROBE: "policy",
    CONSTANT: "no skill",
    DOMAIN: "bound",
}
"""What kind of line an outcome's name is; every other name is a router's."""
_NO_GAP = 1e-9  # relative to the best single expert's value

Tables = Mapping[str, LossTable]


def judge(
    test: Tables,
    validation: LossTable,
    outcomes: Mapping[str, Outcome],
    seed: int,
    bootstrap_samples: int,
    *,
    predicted: Floats | None = None,
    policy: str = ROUTE,
) -> ProtocolVerdict:
    """Judge routers and policies under one protocol.

    test: per metric the table of the test samples. validation: the table of the metric that is judged, of the same
    experts. outcomes: by name, on the test samples; "mixture" is what is deployed, guard and policy included, and must
    be there; "route", "cascade" and "probe" are policies, "domain" is a bound. predicted: the deployed router's
    predicted costs before its guard, (n, experts), lower is better; without it there is no routing curve. policy: the
    name of the deployed one.
    Raises ProtocolError when tables or outcomes do not belong together.
    """
    _check(test, validation, outcomes)
    rule, table = METRICS[validation.metric], test[validation.metric]
    names, mixture = table.experts, outcomes[MIXTURE]
    best = int(rule.best(validation.loss.sum(0), 0))
    rows = _rows(test, outcomes, rule)
    losses = np.stack([row.values[table.metric] for row in rows], axis=1)  # (n, rows)
    values = intervals(table.document, losses, table.count, bootstrap_samples, seed)
    reference = table.loss[:, best]

    def compare(candidates: Floats, against: Floats) -> list[Interval]:
        return paired_intervals(
            table.document, candidates, against, table.count, bootstrap_samples, seed, binary=rule.binary
        )

    differences = compare(losses, reference)
    lines = [
        _line(row, value, None if (row.kind, row.name) == ("expert", names[best]) else difference, test, rule)
        for row, value, difference in zip(rows, values, differences, strict=True)
    ]
    value_of = {(line.kind, line.name): line.value for line in lines}
    answered = {
        name: Routed(line.value, line.low, line.high, _share(outcomes[name], names), outcomes[name].mean_cost)
        for name in outcomes
        for line in lines
        if (line.kind, line.name) == (KINDS.get(name, "router"), name)
    }
    difference = next(one for row, one in zip(rows, differences, strict=True) if row.kind == "mixture")
    score = mixture.values[table.metric]
    (to_base,) = compare(score[:, None], table.base)
    bounds = {row.name: row.values[table.metric] for row in rows if row.kind == "bound"}
    gaps = {
        name: _recovered(table, rule, reference, score, bound, bootstrap_samples, seed)
        for name, bound in bounds.items()
    }
    split_gap, split_share = gaps.get("split-half oracle", (None, None))
    domain_gap, domain_share = gaps.get(DOMAIN, (None, None))
    wins = difference.excludes_zero() and (difference.value < 0) == rule.lower_is_better
    return ProtocolVerdict(
        protocol=table.protocol,
        runtime=table.runtime,
        n_samples=len(table),
        n_documents=len(np.unique(table.document)),
        n_units=int(table.count.sum()),
        base=value_of["base", "base"],
        experts={name: value_of["expert", name] for name in names},
        best_single=names[best],
        best_single_on_test=names[int(rule.best(table.loss.sum(0), 0))],
        mixture=answered[MIXTURE],
        difference=difference,
        difference_to_base=to_base,
        oracle=value_of["bound", "oracle"],
        split_half_oracle=value_of.get(("bound", "split-half oracle")),
        random=value_of["no skill", "random"],
        uniform=value_of["no skill", "uniform"],
        constant=value_of.get(("no skill", CONSTANT)),
        oracle_gap=gaps["oracle"][0],
        oracle_share=gaps["oracle"][1],
        split_half_gap=split_gap,
        split_half_share=split_share,
        routers={name: one for name, one in answered.items() if _kind(name) in ("router", "no skill")},
        lines=lines,
        domains=[
            _domain(test, mixture, table.domain == domain, best, rule, seed, bootstrap_samples)
            for domain in sorted(set(table.domain.tolist()))
        ],
        curve=None if predicted is None else routing_curve(table, best, mixture, predicted, rule),
        cost=mixture.mean_cost,
        wins=wins,
        sentence=sentence(
            difference,
            wins=wins,
            best=names[best],
            only_best=bool((mixture.asked[:, best] == 1).all() and mixture.asked.sum() == len(mixture)),
            cost=mixture.mean_cost,
            metric=rule,
        ),
        policy=policy,
        policies={name: one for name, one in answered.items() if _kind(name) == "policy"},
        domain_label=answered.get(DOMAIN),
        domain_label_gap=domain_gap,
        domain_label_share=domain_share,
    )


def best_per_sample(tables: Tables, metric: Metric) -> Choice:
    """The best expert of each sample, (n,): by the metric, and where that is right or wrong only, among equals by the
    first metric that is finer. The first expert of equals.
    """
    loss = tables[metric.name].loss
    finer = next((METRICS[name] for name in tables if metric.binary and not METRICS[name].binary), None)
    if finer is None:
        return metric.best(loss, 1)
    among = np.where(loss == loss.max(1, keepdims=True), tables[finer.name].loss, np.inf)
    return finer.best(among, 1)


def _check(test: Tables, validation: LossTable, outcomes: Mapping[str, Outcome]) -> None:
    if validation.metric not in test:
        raise ProtocolError(
            f"the validation losses are {validation.metric} and the test losses {', '.join(test)}: score both alike"
        )
    table = test[validation.metric]
    for name in ("protocol", "runtime", "experts"):
        ours, theirs = getattr(table, name), getattr(validation, name)
        if ours != theirs:
            raise ProtocolError(
                f"the test losses have {name} {ours} and the validation losses {theirs}: score both alike"
            )
    for metric, other in test.items():
        if other.experts != table.experts or not np.array_equal(other.sample, table.sample):
            raise ProtocolError(f"{metric} and {table.metric} are of other samples or experts: score the test again")
    if MIXTURE not in outcomes:
        raise ProtocolError(f"there is no outcome of the deployed router ({MIXTURE!r}) to judge")
    for name, outcome in outcomes.items():
        if outcome.asked.shape != table.loss.shape or set(outcome.values) != set(test):
            raise ProtocolError(
                f"{name} answered {len(outcome)} samples ({', '.join(outcome.values)}), and the test has {len(table)} "
                f"({', '.join(test)}): route the test samples again"
            )


@dataclass(frozen=True)
class _Row:
    """A line before it is judged: sums per metric, (n,), and mean cost."""

    kind: Kind
    name: str
    values: Mapping[str, Floats]
    cost: float


def _rows(test: Tables, outcomes: Mapping[str, Outcome], rule: Metric) -> list[_Row]:
    """Everything that is compared, in reading order."""
    table, mixture = test[rule.name], outcomes[MIXTURE]
    experts = len(table.experts)
    rows = [_Row("base", "base", {name: one.base for name, one in test.items()}, 1.0)]
    rows += [
        _Row("expert", expert, {name: one.loss[:, column] for name, one in test.items()}, 1.0)
        for column, expert in enumerate(table.experts)
    ]
    order: tuple[Kind, ...] = ("mixture", "policy")
    ranked = sorted(outcomes, key=lambda name: order.index(kind) if (kind := _kind(name)) in order else len(order))
    given = [_Row(_kind(name), name, outcomes[name].values, outcomes[name].mean_cost) for name in ranked]
    rows += [row for row in given if row.kind != "bound"]
    share = mixture.share / (mixture.asked.sum() / len(mixture))
    rows.append(_Row("no skill", "random", {name: one.loss.mean(1) for name, one in test.items()}, 1.0))
    rows.append(_Row("no skill", "uniform", {name: one.loss @ share for name, one in test.items()}, 1.0))
    rows += [row for row in given if row.kind == "bound"]
    oracle = routed(test, best_per_sample(test, rule)).values
    rows.append(_Row("bound", "oracle", oracle, float(experts)))
    halves = {name: _split_half(one, METRICS[name]) for name, one in test.items()}
    split = {name: values for name, values in halves.items() if values is not None}
    if split:
        rows.append(_Row("bound", "split-half oracle", split, float(experts)))
    return rows


def _kind(name: str) -> Kind:
    return KINDS.get(name, "router")


def _share(outcome: Outcome, names: tuple[str, ...]) -> dict[str, float]:
    return dict(zip(names, outcome.share.tolist(), strict=True))


def _split_half(table: LossTable, metric: Metric) -> Floats | None:
    """Sums over samples whose halves are each scored by the expert that is best on the other half, (n,).

    None where some sample cannot be halved. Unlike the oracle, no loss is used both to choose and to score.
    """
    if table.count_halves.min() < 1:
        return None
    rows = np.arange(len(table))
    choice = metric.best(table.halves, 1)  # (n, 2): the best expert on each half
    scored: Floats = table.halves[rows, choice[:, 0], 1] + table.halves[rows, choice[:, 1], 0]
    return scored


def _line(row: _Row, value: Interval, difference: Interval | None, test: Tables, metric: Metric) -> Line:
    table = test[metric.name]
    total, text_bytes = float(row.values[metric.name].sum()), float(table.text_bytes.sum())
    return Line(
        row.kind,
        row.name,
        value.value,
        value.low,
        value.high,
        perplexity(total, float(table.count.sum())) if metric.is_nats else None,
        bits_per_byte(total, text_bytes) if metric.is_nats and text_bytes > 0 else None,
        row.cost,
        difference,
        {
            name: float(row.values[name].sum() / one.count.sum())
            for name, one in test.items()
            if name != metric.name and name in row.values
        },
    )


def _recovered(
    table: LossTable, metric: Metric, reference: Floats, mixture: Floats, bound: Floats, resamples: int, seed: int
) -> tuple[Interval, Interval | None]:
    """The gap between the best single expert and a bound, and the share of it that the mixture wins."""
    gains = np.stack([metric.gain(reference, bound), metric.gain(reference, mixture)], axis=1)
    gap, gain = intervals(table.document, gains, table.count, resamples, seed)
    scale = abs(float(reference.sum() / table.count.sum()))
    if gap.low is None or gap.low <= _NO_GAP * scale:
        return gap, None
    resampled = resampled_ratios(table.document, gains, table.count, resamples, seed)
    possible = resampled[resampled[:, 0] > _NO_GAP * scale]
    low, high = percentile_interval(possible[:, 1] / possible[:, 0])
    return gap, Interval(gain.value / gap.value, low, high, None, gap.n_documents, gap.n_samples)


def _domain(
    test: Tables, mixture: Outcome, rows: np.ndarray[tuple[int], np.dtype[np.bool_]], best: int, metric: Metric,
    seed: int, resamples: int,
) -> DomainRow:  # fmt: skip
    tables = {name: one.select(rows) for name, one in test.items()}
    table, outcome = tables[metric.name], mixture.select(rows)
    total = table.count.sum()
    score, reference = outcome.values[metric.name], table.loss[:, best]
    (difference,) = paired_intervals(
        table.document, score[:, None], reference, table.count, resamples, seed, binary=metric.binary
    )
    return DomainRow(
        domain=str(table.domain[0]),
        n_samples=len(table),
        n_documents=difference.n_documents,
        base=float(table.base.sum() / total),
        experts={name: float(table.loss[:, i].sum() / total) for i, name in enumerate(table.experts)},
        best_single=float(reference.sum() / total),
        mixture=float(score.sum() / total),
        oracle=float(table.chosen(best_per_sample(tables, metric)).sum() / total),
        difference=difference,
        share=_share(outcome, table.experts),
    )
