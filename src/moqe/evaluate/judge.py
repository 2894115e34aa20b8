"""Judging a mixture: from loss tables and choices to a verdict under one protocol.

Every comparison is paired on the same samples and resampled by document. The reference is the expert that is best on
validation, because nobody who deploys one expert could have picked it on the test set. A win is claimed only where the
interval of the difference excludes zero.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from moqe.errors import ProtocolError
from moqe.evaluate.curve import routing_curve
from moqe.evaluate.format import p_statement, signed_interval
from moqe.evaluate.loss_table import Floats, LossTable
from moqe.evaluate.metrics import METRICS, Metric, bits_per_byte, perplexity
from moqe.evaluate.significance import (
    MINIMUM_DOCUMENTS,
    Interval,
    intervals,
    percentile_interval,
    resampled_ratios,
)
from moqe.evaluate.verdict import DomainRow, Kind, Line, ProtocolVerdict, Routed

MIXTURE = "mixture"
CONSTANT = "constant"
ROUTED_COST = 1.0  # a routed sample is run by one expert
_NO_GAP = 1e-9  # relative to the best single expert's value

Choice = NDArray[np.int64]


def judge(
    test: LossTable,
    validation: LossTable,
    choices: Mapping[str, Choice],
    seed: int,
    bootstrap_samples: int,
    *,
    metric: str = "nats_per_token",
    predicted: Floats | None = None,
) -> ProtocolVerdict:
    """Judge routers under one protocol.

    test, validation: sums of the metric per sample, of the same experts. choices: per router the index of the chosen
    expert for every test sample, (n,); "mixture" is the deployed router, guard included, and must be there.
    predicted: the deployed router's predicted costs before its guard, (n, experts), lower is better; without it there
    is no routing curve. Raises ProtocolError when tables or choices do not belong together.
    """
    _check(test, validation, choices)
    rule = METRICS[metric]
    count, names = test.count, test.experts
    best = int(rule.best(validation.loss.sum(0), 0))
    best_on_test = int(rule.best(test.loss.sum(0), 0))
    reference = test.loss[:, best]
    mixture = test.chosen(choices[MIXTURE])
    share = _share(choices[MIXTURE], names)
    oracle = test.chosen(rule.best(test.loss, 1))
    split_half = _split_half(test, rule)

    rows: list[tuple[Kind, str, Floats, float]] = [("base", "base", test.base, 1.0)]
    rows += [("expert", name, test.loss[:, column], 1.0) for column, name in enumerate(names)]
    rows += [("mixture", MIXTURE, mixture, ROUTED_COST)]
    rows += [
        ("no skill" if name == CONSTANT else "router", name, test.chosen(choice), ROUTED_COST)
        for name, choice in choices.items()
        if name != MIXTURE
    ]
    uniform = test.loss @ np.array([share[name] for name in names])
    rows += [("no skill", "random", test.loss.mean(1), 1.0), ("no skill", "uniform", uniform, 1.0)]
    rows += [("bound", "oracle", oracle, float(len(names)))]
    rows += [("bound", "split-half oracle", split_half, float(len(names)))] if split_half is not None else []
    losses = np.stack([row[2] for row in rows], axis=1)  # (n, rows)
    values = intervals(test.document, losses, count, bootstrap_samples, seed)
    differences = intervals(
        test.document, losses - reference[:, None], count, bootstrap_samples, seed, differences=True
    )
    lines = [
        _line(
            kind, name, cost, value, None if name == names[best] and kind == "expert" else difference, test, loss, rule
        )
        for (kind, name, loss, cost), value, difference in zip(rows, values, differences, strict=True)
    ]
    value_of = {(line.kind, line.name): line.value for line in lines}
    routed = {
        name: Routed(value.value, value.low, value.high, _share(choices[name], names))
        for (kind, name, _, _), value in zip(rows, values, strict=True)
        if kind in ("mixture", "router") or (kind, name) == ("no skill", CONSTANT)
    }
    difference = differences[[row[0] for row in rows].index("mixture")]
    (to_base,) = intervals(
        test.document, (mixture - test.base)[:, None], count, bootstrap_samples, seed, differences=True
    )
    oracle_gap, oracle_share = _recovered(test, rule, reference, mixture, oracle, bootstrap_samples, seed)
    split_gap, split_share = (
        _recovered(test, rule, reference, mixture, split_half, bootstrap_samples, seed)
        if split_half is not None
        else (None, None)
    )
    wins = difference.excludes_zero() and (difference.value < 0) == rule.lower_is_better
    return ProtocolVerdict(
        protocol=test.protocol,
        runtime=test.runtime,
        n_samples=len(test),
        n_documents=len(np.unique(test.document)),
        n_units=int(count.sum()),
        base=value_of["base", "base"],
        experts={name: value_of["expert", name] for name in names},
        best_single=names[best],
        best_single_on_test=names[best_on_test],
        mixture=routed.pop(MIXTURE),
        difference=difference,
        difference_to_base=to_base,
        oracle=value_of["bound", "oracle"],
        split_half_oracle=value_of.get(("bound", "split-half oracle")),
        random=value_of["no skill", "random"],
        uniform=value_of["no skill", "uniform"],
        constant=value_of.get(("no skill", CONSTANT)),
        oracle_gap=oracle_gap,
        oracle_share=oracle_share,
        split_half_gap=split_gap,
        split_half_share=split_share,
        routers=routed,
        lines=lines,
        domains=[
            _domain(
                test.select(test.domain == domain),
                choices[MIXTURE][test.domain == domain],
                best,
                rule,
                seed,
                bootstrap_samples,
            )
            for domain in sorted(set(test.domain.tolist()))
        ],
        curve=None if predicted is None else routing_curve(test, best, choices[MIXTURE], predicted, rule),
        cost=ROUTED_COST,
        wins=wins,
        sentence=_sentence(difference, wins, names[best], share, rule),
    )


def _check(test: LossTable, validation: LossTable, choices: Mapping[str, Choice]) -> None:
    for name in ("protocol", "runtime", "experts"):
        ours, theirs = getattr(test, name), getattr(validation, name)
        if ours != theirs:
            raise ProtocolError(
                f"the test losses have {name} {ours} and the validation losses {theirs}: score both alike"
            )
    if MIXTURE not in choices:
        raise ProtocolError(f"there are no choices of the deployed router ({MIXTURE!r}) to judge")
    for name, choice in choices.items():
        if choice.shape != (len(test),) or choice.min() < 0 or choice.max() >= len(test.experts):
            raise ProtocolError(
                f"router {name} chose for {choice.shape[0]} samples among experts {choice.min()} to {choice.max()}, "
                f"and the test has {len(test)} samples and {len(test.experts)} experts: route the test samples again"
            )


def _share(choice: Choice, names: tuple[str, ...]) -> dict[str, float]:
    counts = np.bincount(choice, minlength=len(names))
    return {name: float(count / len(choice)) for name, count in zip(names, counts, strict=True)}


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


def _line(
    kind: Kind,
    name: str,
    cost: float,
    value: Interval,
    difference: Interval | None,
    table: LossTable,
    loss: Floats,
    metric: Metric,
) -> Line:
    total, text_bytes = float(loss.sum()), float(table.text_bytes.sum())
    return Line(
        kind,
        name,
        value.value,
        value.low,
        value.high,
        perplexity(total, float(table.count.sum())) if metric.is_nats else None,
        bits_per_byte(total, text_bytes) if metric.is_nats and text_bytes > 0 else None,
        cost,
        difference,
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


def _domain(table: LossTable, choice: Choice, best: int, metric: Metric, seed: int, resamples: int) -> DomainRow:
    total = table.count.sum()
    mixture, reference = table.chosen(choice), table.loss[:, best]
    (difference,) = intervals(
        table.document, (mixture - reference)[:, None], table.count, resamples, seed, differences=True
    )
    return DomainRow(
        domain=str(table.domain[0]),
        n_samples=len(table),
        n_documents=difference.n_documents,
        base=float(table.base.sum() / total),
        experts={name: float(table.loss[:, i].sum() / total) for i, name in enumerate(table.experts)},
        best_single=float(reference.sum() / total),
        mixture=float(mixture.sum() / total),
        oracle=float(table.chosen(metric.best(table.loss, 1)).sum() / total),
        difference=difference,
        share=_share(choice, table.experts),
    )


def _sentence(difference: Interval, wins: bool, best: str, share: Mapping[str, float], metric: Metric) -> str:
    """The outcome in plain words."""
    basis = f"{difference.n_documents} documents"
    numbers = f"{signed_interval(difference)} {metric.label}, {p_statement(difference.p)}"
    if wins:
        return (
            f"The mixture wins by {abs(difference.value):.4f} {metric.label} over {best}, the best single expert "
            f"(difference {signed_interval(difference)}, {p_statement(difference.p)}, {basis})."
        )
    if share[best] == 1.0:
        return f"The mixture does not win here: every sample goes to {best}, the best single expert ({basis})."
    if difference.n_documents < MINIMUM_DOCUMENTS:
        return (
            f"The mixture does not win here: {basis} are too few to claim anything (at least {MINIMUM_DOCUMENTS} are "
            f"needed); its difference to {best}, the best single expert, is {numbers}."
        )
    if difference.excludes_zero():
        return (
            f"The mixture does not win here: it is worse than {best}, the best single expert, by {numbers} ({basis})."
        )
    return (
        f"The mixture does not win here: its difference to {best}, the best single expert, is {numbers}, "
        f"and the interval includes zero ({basis})."
    )
