"""What card and report say beside the verdict: the recipe, how the router was selected, what was substituted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moqe.evaluate.agreement import Agreement
from moqe.evaluate.contact import ContactSheet


@dataclass(frozen=True)
class CandidateRow:
    """A router that was considered, judged on samples it had not been trained on.

    value: what its choices score in the metric that the verdict judges. gain: over the expert that it had to beat, with
    its standard error; positive is better.
    """

    name: str
    value: float
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
class DistilledRow:
    """An expert whose scales were trained.

    before, after: the divergence from the base, or from base and text mixed, on held-out calibration windows, weighted
    as in training, nats; before is where this training began. step: after which the state was taken, of `steps`.
    windows, words: how many calibration windows a specialist is for and what tells them from the others; 0 and none for
    a generalist. own_share: the share of its blocks that have scales of their own; None where memory is not bounded.
    text_weight: the share of the text in what it followed.
    """

    expert: str
    codes_of: str
    before: float
    after: float
    step: int
    steps: int
    windows: int
    words: tuple[str, ...]
    own_share: float | None
    text_weight: float = 0.0


@dataclass(frozen=True)
class MemoryPoint:
    """What a share of the specialists' own scales buys.

    memory: bytes of generalist and specialists together, in those of one. divergence: mean over the specialists of that
    from what they followed, on their own held-out windows, nats.
    """

    memory: float
    divergence: float


@dataclass(frozen=True)
class ReportContext:
    """Everything that card and report need beside the verdict.

    base: the base model as the recipe names it. recipe_yaml: the recipe's text. candidates: per protocol, the routers
    that were considered. guards: per protocol, what the guard saw and did, in sentences. contact: images on which
    experts disagree; None where samples are no images. to_beat: the expert that a router had to beat, in words.
    distilled: the experts whose scales were trained. memory: the curve behind the recipe's bound on memory; empty where
    there is none. agreements: of other runtimes with the reference, where that was measured.
    Nothing here depends on where the mixture lies: builds in two folders give equal pages.
    """

    base: str
    recipe_yaml: str
    candidates: Mapping[str, tuple[CandidateRow, ...]]
    guards: Mapping[str, str]
    substitutions: tuple[Substitution, ...]
    contact: ContactSheet | None = None
    to_beat: str = "the best single expert"
    distilled: tuple[DistilledRow, ...] = ()
    memory: tuple[MemoryPoint, ...] = ()
    agreements: tuple[Agreement, ...] = ()
