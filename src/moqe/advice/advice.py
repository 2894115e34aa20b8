"""What `moqe advise` returns: per width and number of experts the predicted gain, beside what one model would gain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

WORTH = 0.002  # nats per token, 0.2 % of perplexity: what less gains is not worth a router


@dataclass(frozen=True)
class Range:
    """A prediction and the bounds between which it is expected, nats per token; a gain is positive."""

    low: float
    value: float
    high: float

    @property
    def above_zero(self) -> bool:
        """Whether all of it is a gain."""
        return self.low > 0


@dataclass(frozen=True)
class Row:
    """`experts` of one width that share codes, the generalist among them, against the distilled generalist alone.

    memory_ratio: bytes of the mixture's model over those of one expert's. gain: of divergence from the base, or of loss
    where experts follow the text, by a linear router, for a full build. label_gain: the same where every window gets
    the specialist of its own label. measured_gain: what was measured, before anything was extrapolated; loss_gain: the
    same in loss under the tokens that came. storage_gain: what one model of the mixture's bytes would gain.
    bandwidth_gain: what one model would gain that reads as many bytes per token. beyond_storage: gain minus
    storage_gain, paired. extrapolated: over which quantities, `steps`, `experts`; empty where a row is measured as it
    stands.
    """

    bits: int
    experts: int
    memory_ratio: float
    gain: Range
    label_gain: Range
    measured_gain: Range
    loss_gain: Range
    storage_gain: Range
    bandwidth_gain: float
    beyond_storage: Range
    extrapolated: tuple[str, ...]

    @property
    def pays_by_bandwidth(self) -> bool:
        """Whether the mixture beats every single model that reads as many bytes per token.

        Its gain must be worth mentioning, all of its range above zero, and the losses must not contradict it.
        """
        beaten = self.gain.above_zero and self.gain.value > self.bandwidth_gain
        return beaten and self.gain.value >= WORTH and self.loss_gain.high > 0

    @property
    def pays_by_storage(self) -> bool:
        """Whether it also beats one model of as many bytes."""
        return self.pays_by_bandwidth and self.beyond_storage.above_zero


@dataclass(frozen=True)
class WidthFacts:
    """One model of a width, the generalist.

    loss: nats per token on the judging windows; gap: to the base's. divergence: KL(base || generalist) on the same
    windows; divergence_before: on choice windows, not yet distilled. steps: of distillation, 0 where there was too
    little to win for training anything.
    """

    bits: int
    bits_per_weight: float
    method: str
    loss: float
    gap: Range
    divergence: float
    divergence_before: float
    steps: int


@dataclass(frozen=True)
class Sampled:
    """What the advice was measured on. labels: domains, or clusters where there was one domain."""

    window: int
    windows: Mapping[str, int]
    judging_documents: int
    labels: tuple[str, ...]
    clusters: bool
    router_tokens: int
    router_accuracy: float
    digests: Mapping[str, str]


@dataclass(frozen=True)
class Advice:
    """The whole advice. base_loss: nats per token on the judging windows. cut: what time left no room for."""

    base: str
    sentence: str
    pays_by_bandwidth: bool
    pays_by_storage: bool
    rows: tuple[Row, ...]
    widths: tuple[WidthFacts, ...]
    base_loss: float
    sampled: Sampled
    steps: int
    own_steps: int
    full_steps: int
    full_own_steps: int
    growth: float
    text_weight: float
    own_weight: float
    cut: tuple[str, ...]
    seed: int
    seconds: Mapping[str, float]


def advise_sentence(rows: tuple[Row, ...], unlearnt: str = "") -> str:
    """Whether a mixture is worth it, by which view, and where most is won.

    unlearnt: why specialists that gained nothing may yet do so, in words; empty where that says something.
    """
    by_storage = [row for row in rows if row.pays_by_storage]
    by_bandwidth = [row for row in rows if row.pays_by_bandwidth]
    if not by_bandwidth and unlearnt:
        return f"Undecided: no predicted gain stands clear of zero, but {unlearnt}: give more minutes, or build."
    if not by_bandwidth:
        most = max(rows, key=lambda row: row.gain.high)
        return (
            f"Not worth it here: no predicted gain stands clear of zero and reaches {WORTH} nats per token; the most "
            f"these numbers leave room for is {most.gain.high:.4f} at {most.bits} bits with {most.experts} experts."
        )
    if by_storage:
        best = _best(by_storage)
        return (
            f"Worth it at {_listed(by_storage)} bits, by storage and by bytes read per token: {_described(best)}, "
            f"where one model of the same storage would gain {best.storage_gain.value:.4f}.{_others(rows)}"
        )
    best = _best(by_bandwidth)
    return (
        f"Worth it at {_listed(by_bandwidth)} bits where bytes read per token are the limit, or replicas exist anyway: "
        f"{_described(best)}. Not worth it where storage is the limit: one model of the same storage would gain "
        f"{best.storage_gain.value:.4f}."
    )


def _best(rows: list[Row]) -> Row:
    """The row with the largest gain, of sizes that were measured if there are any."""
    return max(rows, key=lambda row: ("experts" not in row.extrapolated, row.gain.value))


def _described(row: Row) -> str:
    gain = row.gain
    return (
        f"{row.experts} experts of {row.bits} bits gain {gain.value:.4f} [{gain.low:.4f}, {gain.high:.4f}] nats per "
        f"token at {row.memory_ratio:.2f} times the memory of one"
    )


def _listed(rows: list[Row]) -> str:
    bits = sorted({row.bits for row in rows})
    return " and ".join(filter(None, [", ".join(map(str, bits[:-1])), str(bits[-1])]))


def _others(rows: tuple[Row, ...]) -> str:
    """What else pays by bandwidth only."""
    storage = {row.bits for row in rows if row.pays_by_storage}
    further = [row for row in rows if row.pays_by_bandwidth and row.bits not in storage]
    return f" At {_listed(further)} bits only where bytes read per token are the limit." if further else ""
