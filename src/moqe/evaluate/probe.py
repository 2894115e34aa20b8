"""The policy `probe`: every expert scores the first k tokens, and the one with the lowest loss on them goes on.

Nothing is predicted and nothing is fitted: an expert is judged by what it has just done. It needs no router and knows
no kind of text that is new to it, and it pays for that: every expert runs the prefix. With N experts and windows of T
tokens that is, in forward passes of an expert over a window,

    (N k + T - k) / T

What the first k tokens cost is not stored, and need not be: `prefix-k` scores from the prediction of token k on, so the
losses of a whole window minus those are the k - 1 predictions inside the prefix, which is all that a probe sees.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moqe.errors import ProtocolError
from moqe.evaluate.judge import Tables
from moqe.evaluate.loss_table import Floats, LossTable
from moqe.evaluate.outcome import Outcome, routed


def prefix_losses(whole: LossTable, rest: LossTable) -> Floats:
    """The loss of every expert on the tokens before those that `rest` scores, (n, experts): sums, in nats.

    whole, rest: of the same samples under `whole` and `prefix-k`. Raises ProtocolError where they are not, and where
    `rest` leaves nothing before it.
    """
    if whole.experts != rest.experts or whole.runtime != rest.runtime or not np.array_equal(whole.sample, rest.sample):
        raise ProtocolError(
            f"the losses under {whole.protocol} and {rest.protocol} are of other samples, experts or runtimes: "
            "score both again"
        )
    if not len(rest) or (whole.count - rest.count).min() < 1:
        raise ProtocolError(f"{rest.protocol} leaves no token for a probe to score: take a longer protocol.prefix")
    losses: Floats = whole.loss - rest.loss
    return losses


def probed(tables: Tables, whole: LossTable, metric: str) -> Outcome:
    """The outcome of a probe under `prefix-k`: each sample goes to the expert that is best on its first k tokens.

    tables: per metric, under `prefix-k`. whole: of `metric`, lower is better, under `whole`. Raises as `prefix_losses`.
    """
    rest = tables[metric]
    answered = routed(tables, prefix_losses(whole, rest).argmin(1).astype(np.int64))
    window, prefix = whole.count + 1.0, whole.count - rest.count + 1.0  # tokens: one more than is predicted of them
    return replace(answered, cost=(len(rest.experts) * prefix + window - prefix) / window)
