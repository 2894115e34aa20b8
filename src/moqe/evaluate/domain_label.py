"""What knowing a sample's domain would be worth: each to the expert that is best on the router's documents of it.

A bound, not a router: a text does not come with its label. It says how much of what a router could win lies *between*
domains, and so how much of it a router collects that has to find out the domain for itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moqe.evaluate.loss_table import LossTable
from moqe.evaluate.metrics import METRICS
from moqe.evaluate.outcome import Choice


@dataclass(frozen=True)
class DomainLabel:
    """The expert of every known domain, by number, and the one of all others."""

    expert_of: Mapping[str, int]
    other: int

    def choice(self, table: LossTable) -> Choice:
        """The expert of each sample of a table, (n,)."""
        return np.array([self.expert_of.get(str(domain), self.other) for domain in table.domain], np.int64)


def fit_domain_label(tables: Sequence[LossTable], generalist: int | None = None) -> DomainLabel | None:
    """Choose on the router's samples, given in one or several tables of one metric and the same experts.

    generalist: what a domain that is not among them gets; None takes the expert that is best on all of them. None is
    returned where there are fewer than two domains, or where labels are classes, which nobody knows beforehand.
    """
    rule = METRICS[tables[0].metric]
    domain = np.concatenate([table.domain for table in tables])
    loss = np.concatenate([table.loss for table in tables])  # every expert is scored on the same tokens: sums compare
    names = sorted(set(domain.tolist()))
    if rule.group != "domain" or len(names) < 2:
        return None
    best = {name: int(rule.best(loss[domain == name].sum(0), 0)) for name in names}
    return DomainLabel(best, int(rule.best(loss.sum(0), 0)) if generalist is None else generalist)
