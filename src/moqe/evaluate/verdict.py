"""The verdict: what was found, as data. `verdict.json` in a mixture's folder is exactly this; see docs/verdict.md.

Terminal table, card and report are drawn from it and from nothing else that was measured.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from moqe.errors import CheckpointError
from moqe.evaluate.significance import Interval
from moqe.store import read_json, write_text

Kind = Literal["base", "expert", "mixture", "policy", "router", "no skill", "bound"]


@dataclass(frozen=True)
class Line:
    """One row of the main table: a way of choosing an expert per sample, and what it scores.

    kind: what sort of row it is. value, low, high: the metric with its interval. perplexity, bits_per_byte: None where
    the metric has none. cost: mean forward passes of a model per sample. difference: to the best single expert, None
    for that expert itself. also: the values of the other metrics.
    """

    kind: Kind
    name: str
    value: float
    low: float | None
    high: float | None
    perplexity: float | None
    bits_per_byte: float | None
    cost: float
    difference: Interval | None
    also: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Routed:
    """What a router or policy scores, its mean `cost`, and the `share` of samples that each expert answers.

    Shares add up to 1 for a router, and to more where a second expert answers too.
    """

    value: float
    low: float | None
    high: float | None
    share: dict[str, float]
    cost: float = 1.0


@dataclass(frozen=True)
class DomainRow:
    """The result on the test samples of one domain, which is the class where samples have one.

    `best_single` is the whole test's, not the domain's own.
    """

    domain: str
    n_samples: int
    n_documents: int
    base: float
    experts: dict[str, float]
    best_single: float
    mixture: float
    oracle: float
    difference: Interval
    share: dict[str, float]


@dataclass(frozen=True)
class Curve:
    """Mean value of the metric when a growing share of the samples leaves the best single expert.

    share: from 0 to 1. predicted: samples leave for the router's choice, largest predicted gain first. random: the
    same in random order (expected value). oracle: samples leave for the truly best expert, largest true gain first.
    deployed_share, deployed_value: where the mixture stands, guard included.
    """

    share: list[float]
    predicted: list[float]
    random: list[float]
    oracle: list[float]
    deployed_share: float
    deployed_value: float


@dataclass(frozen=True)
class ProtocolVerdict:
    """Everything found under one protocol. Plain numbers are values of the metric.

    best_single: the best expert on validation, which every difference refers to; best_single_on_test is for
    information. random: samples sent to experts with equal probability. uniform: sent at random with the mixture's own
    shares. constant: a router that knows only training losses. split_half_oracle: chosen on one half of a sample and
    scored on the other, both ways. oracle_share, split_half_share: the part of the gap between best single and that
    oracle which the mixture wins; None where the gap is not distinguishable from zero. cost: the mixture's mean.
    policy: how the mixture turns the router's predictions into work. policies: the policies compared, by name; empty
    where there is only one. domain_label: every domain to the expert that is best on the router's documents of it,
    which takes a label that nobody has in use; with the gap to it and the share of that which the mixture wins. None
    where there is one domain, or where domains are classes.
    """

    protocol: str
    runtime: str
    n_samples: int
    n_documents: int
    n_units: int
    base: float
    experts: dict[str, float]
    best_single: str
    best_single_on_test: str
    mixture: Routed
    difference: Interval
    difference_to_base: Interval
    oracle: float
    split_half_oracle: float | None
    random: float
    uniform: float
    constant: float | None
    oracle_gap: Interval
    oracle_share: Interval | None
    split_half_gap: Interval | None
    split_half_share: Interval | None
    routers: dict[str, Routed]
    lines: list[Line]
    domains: list[DomainRow]
    curve: Curve | None
    cost: float
    wins: bool
    sentence: str
    policy: str = "route"
    policies: dict[str, Routed] = field(default_factory=dict)
    domain_label: Routed | None = None
    domain_label_gap: Interval | None = None
    domain_label_share: Interval | None = None


@dataclass(frozen=True)
class ExpertSummary:
    """What an expert is.

    bytes_on_disk: of its files, as if it stood alone. substituted_share: the share of its parameters that were not done
    as asked. bits_per_weight: of the quantized linears, as stored; None where unknown.
    """

    method: str
    scheme: str
    bytes_on_disk: int
    substituted_share: float
    bits_per_weight: float | None = None


@dataclass(frozen=True)
class Verdict:
    """The verdict on a mixture.

    recipe: the recipe's hash. metric: a key of METRICS. deployed: the protocol that the deployed router follows.
    experts: facts by name. base_bytes, mixture_bytes: on disk, shared tensors counted once. also: the metrics that
    every line shows beside the judged one. router_metric: what routers were trained on. text_weight: the largest share
    of the calibration text in what an expert's scales were trained to follow, 0 where all follow the base alone.
    """

    recipe: str
    metric: str
    deployed: str
    protocols: dict[str, ProtocolVerdict]
    experts: dict[str, ExpertSummary]
    base_bytes: int
    mixture_bytes: int
    seed: int
    bootstrap_samples: int
    version: Literal[1] = 1
    also: list[str] = field(default_factory=list)
    router_metric: str = "nats_per_token"
    text_weight: float = 0.0

    @property
    def adaptation(self) -> str:
        """What must be known to compare with the base, where experts were trained on text; else empty."""
        if not self.text_weight:
            return ""
        return (
            f"Scales were trained on the calibration text itself (text_weight {self.text_weight:g}), the base was not: "
            "a loss below the base's is adaptation to such text, and the base could be adapted as well. Experts that "
            "were trained alike are compared fairly."
        )

    @property
    def headline(self) -> ProtocolVerdict:
        """The result under the deployed protocol, which is stated first."""
        return self.protocols[self.deployed]

    @property
    def ordered(self) -> list[ProtocolVerdict]:
        """All protocols, the deployed one first."""
        return [self.headline, *(one for name, one in self.protocols.items() if name != self.deployed)]


def write_verdict(path: Path, verdict: Verdict) -> None:
    """Write `verdict.json`: experts in the recipe's order and no timestamps, so that equal verdicts are equal bytes."""
    write_text(path, json.dumps(asdict(verdict), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_verdict(path: Path) -> Verdict:
    """Read `verdict.json`. Raises CheckpointError when it is missing or does not follow the schema."""
    try:
        return TypeAdapter(Verdict).validate_json(json.dumps(read_json(path)), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(
            f"{path} is not a verdict of this version ({where}: {first['msg']}): evaluate the mixture again"
        ) from error
