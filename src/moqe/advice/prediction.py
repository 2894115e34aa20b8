"""From measured losses to predicted gains: who serves what, intervals over documents, and careful extrapolation.

Gains are differences of the divergence KL(base || expert). A loss exceeds the base's by this divergence plus a term of
mean zero, for text that the base predicts well, in which chance decides: another training run of the same expert has
another one. The divergence is what carries over to a build, and it has a fraction of the noise. The gain in loss under
the tokens that came is reported beside it and may contradict it.

Where experts follow the text as well (`text_weight`) they leave the base's predictions on purpose, and gains are of
loss. Nothing bounds them then, and what is learnt of a text goes on with every window, while a divergence runs out: the
growth that was measured is expected to go on, and labels without a specialist to gain in proportion to how much the
generalist has adapted to them. What one model of more bits gains is read off the divergences of codes that were not
trained at all, which flatters it: training makes up for about half of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moqe.advice.advice import Range, Row
from moqe.advice.codes import bits_per_weight, scale_bits_per_weight
from moqe.advice.measurement import Scored, Width
from moqe.evaluate.loss_table import Floats
from moqe.evaluate.significance import percentile_interval, resampled_ratios

RESAMPLES = 2000
MOST_GROWTH = 2.0  # a gain is not taken to more than double when a specialist's own steps double
_PER_BIT = math.log(4.0)  # rounding noise has a quarter of the power with every bit
_SMALLEST_GAP = 1e-6


@dataclass(frozen=True)
class Size:
    """Bytes of one expert's model, and of one more set of scales."""

    expert: float
    scales: float


def growth_of(widths: Sequence[Width]) -> float:
    """By what a gain grows when a specialist's own steps double, 1 to MOST_GROWTH: the median over widths."""
    found = [width.growth for width in widths if not math.isnan(width.growth)]
    return float(np.clip(np.median(found), 1.0, MOST_GROWTH)) if found else 1.0


def doublings(own_steps: int, full_own_steps: int) -> float:
    """How often the steps that a specialist had of its own must double to be those of a build."""
    return max(0.0, math.log2(full_own_steps / own_steps))


def gap_at(points: Floats, gaps: Floats, bits: float) -> Floats:
    """The gap of one model of `bits` per weight, (n,): log-linear between the widths measured, and beyond them.

    points: bits per weight, ascending, (k,). gaps: of these, (n, k).
    """
    logs = np.log(np.maximum(gaps, _SMALLEST_GAP))
    if len(points) == 1:
        return np.asarray(np.exp(logs[:, 0] - _PER_BIT * (bits - points[0])))
    right = int(np.clip(np.searchsorted(points, bits), 1, len(points) - 1))
    share = (bits - points[right - 1]) / (points[right] - points[right - 1])
    return np.asarray(np.exp(logs[:, right - 1] * (1 - share) + logs[:, right] * share))


class Predictor:
    """Turns measured widths into rows. doublings: of a specialist's own steps, from those measured to a build's."""

    def __init__(
        self,
        widths: Sequence[Width],
        scored: Scored,
        sizes: Mapping[int, Size],
        growth: float,
        doublings: float,
        seed: int,
    ) -> None:
        self.widths, self.scored, self.sizes, self.seed = widths, scored, sizes, seed
        self.most = growth**doublings  # factor by which longer training may raise a gain
        self.points = np.array([bits_per_weight(width.bits) for width in widths])
        self.divergences = np.stack([width.left for width in widths], axis=1)  # (n, k)

    def gap(self, width: Width) -> Range:
        """What a width's generalist loses against the base, nats per token."""
        values, resampled = self._resampled((width.generalist.nats - self.scored.base)[:, None])
        return Range(*_around(values[0], resampled[:, 0]))

    def row(self, width: Width, experts: int) -> Row:
        """Predict `experts` of one width, the generalist among them."""
        trained = len(width.specialists)
        size = self.sizes[width.bits]
        more_bits = scale_bits_per_weight() * (experts - 1)
        here, k = list(self.widths).index(width), len(self.widths)
        columns = [self.divergences, *self._gains(width, min(experts - 1, trained))]
        values, resampled = self._resampled(np.column_stack(columns))
        (routed, labelled, loss), (routed_drawn, labelled_drawn, loss_drawn) = values[k:], resampled[:, k:].T

        def saved(divergences: Floats) -> Floats:
            return divergences[:, here] - gap_at(self.points, divergences, self.points[here] + more_bits)

        storage_value, storage = float(saved(values[None, :k])[0]), saved(resampled[:, :k])
        ceiling = math.inf if self.scored.by_text else float(np.quantile(resampled[:, here], 0.975))
        most, extrapolated = self._factor(width, experts)

        def predicted(value: float, drawn: Floats) -> Range:
            expected = most if self.scored.by_text else math.sqrt(most)
            return _widened(value, drawn, expected, most, ceiling) if trained else Range(0.0, 0.0, ceiling)

        gain = predicted(routed, routed_drawn)
        best = np.minimum(most * routed_drawn, ceiling) if trained else np.full(RESAMPLES, ceiling)
        beyond = percentile_interval(routed_drawn - storage)[0], percentile_interval(best - storage)[1]
        return Row(
            bits=width.bits,
            experts=experts,
            memory_ratio=(size.expert + (experts - 1) * size.scales) / size.expert,
            gain=gain,
            label_gain=predicted(labelled, labelled_drawn),
            measured_gain=Range(*_around(routed, routed_drawn)),
            loss_gain=Range(*_around(loss, loss_drawn)),
            storage_gain=Range(*_around(storage_value, storage)),
            bandwidth_gain=0.0,  # as many bytes read per token buy the generalist itself
            beyond_storage=Range(beyond[0], gain.value - storage_value, beyond[1]),
            extrapolated=extrapolated,
        )

    def _gains(self, width: Width, count: int) -> tuple[Floats, Floats, Floats]:
        """What the `count` specialists that help most win on every scored window, (n,) each.

        As judged by routing and by label, and in loss by routing. Which specialists help, and whether a label that the
        router gives is answered by its specialist at all, is decided on the choice windows.
        """
        scored, generalist, by_text = self.scored, width.generalist, self.scored.by_text
        helped = {}
        for label, scores in width.specialists.items():
            mine = (scored.routed == label) & ~scored.judging
            helped[label] = float((generalist.judged(by_text) - scores.judged(by_text))[mine].sum())
        best = sorted(helped, key=lambda label: -helped[label])[:count]
        routed = labelled = loss = np.zeros(len(generalist.nats))
        for label in best:
            specialist = width.specialists[label]
            won = generalist.judged(by_text) - specialist.judged(by_text)
            if helped[label] > 0:
                routed = np.where(scored.routed == label, won, routed)
                loss = np.where(scored.routed == label, generalist.nats - specialist.nats, loss)
            labelled = np.where(scored.label == label, won, labelled)
        return routed, labelled, loss

    def _factor(self, width: Width, experts: int) -> tuple[float, tuple[str, ...]]:
        """By what a measured gain may grow in a full build of so many experts, and why.

        Labels for which no specialist was trained win at most the same share of what they promise (`promise`) as those
        for which one was. More experts than labels win at most as much again with every doubling.
        """
        if not width.specialists:
            return 1.0, ()
        most, why = self.most, ["steps"] * (self.most > 1.0)
        shares = {
            label: max(0.0, float(width.promises[self.scored.judging & (self.scored.label == label)].sum()))
            for label in set(self.scored.label.tolist())
        }
        covered = sum(shares.get(label, 0.0) for label in width.specialists)
        others = sorted((value for label, value in shares.items() if label not in width.specialists), reverse=True)
        further = experts - 1 - len(width.specialists)
        if further > 0:
            most *= 1.0 + sum(others[:further]) / covered if covered else 1.0
            why.append("experts")
        labels = len(width.specialists) + len(others)
        if experts - 1 > labels:
            most *= math.log(experts) / math.log(labels + 1)
        return most, tuple(why)

    def _resampled(self, columns: Floats) -> tuple[Floats, Floats]:
        """Means over the judging windows, (k,), and over resampled documents, (resamples, k), paired by draw."""
        judged = columns[self.scored.judging]
        document, ones = self.scored.document[self.scored.judging], np.ones(len(judged))
        return judged.mean(0), resampled_ratios(document, judged, ones, RESAMPLES, self.seed)


def _around(value: float, resampled: Floats) -> tuple[float, float, float]:
    low, high = percentile_interval(resampled)
    return low, float(value), high


def _widened(value: float, resampled: Floats, expected: float, most: float, ceiling: float) -> Range:
    """An interval that allows for growth by up to `most` and none, where growth by `expected` is.

    A gain of divergence cannot exceed the whole of it, `ceiling`; a loss that is possible is taken to grow as well.
    """
    low, value, high = _around(value, resampled)
    middle = max(value, min(value * expected, ceiling))
    return Range(low if low > 0 else low * most, middle, max(middle, min(high * most, ceiling)))
