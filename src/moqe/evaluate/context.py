"""What card and report say beside the verdict: the recipe, how the router was selected, what was substituted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moqe.evaluate.verdict import ExpertSummary
from moqe.methods.certificate import Certificate


@dataclass(frozen=True)
class CandidateRow:
    """A router that was considered, judged on samples it had not been trained on.

    loss: nats per token of its choices. gain: over the best single expert, with its standard error; positive is
    better.
    """

    name: str
    loss: float
    gain: float
    standard_error: float | None
    chosen: bool


@dataclass(frozen=True)
class Substitution:
    """A layer of an expert for which something else was done than asked, and why."""

    expert: str
    layer: str
    reason: str


@dataclass(frozen=True)
class ReportContext:
    """Everything that card and report need beside the verdict.

    base: the base model as the recipe names it. recipe_yaml: the recipe's text. candidates: per protocol, the routers
    that were considered. Nothing here depends on where the mixture lies: builds in two folders give equal pages.
    """

    base: str
    recipe_yaml: str
    candidates: Mapping[str, tuple[CandidateRow, ...]]
    substitutions: tuple[Substitution, ...]


def expert_summary(certificate: Certificate, bytes_on_disk: int) -> ExpertSummary:
    """What the verdict says about an expert, from its certificate and the bytes of its files."""
    return ExpertSummary(
        certificate.method,
        certificate.scheme,
        bytes_on_disk,
        certificate.substituted_share,
        certificate.bits_per_weight,
    )


def substitutions(certificate: Certificate) -> tuple[Substitution, ...]:
    """The layers of an expert for which something else was done than asked."""
    return tuple(Substitution(certificate.expert, layer.name, layer.substituted) for layer in certificate.substitutions)
