"""The seam between modalities: all that build, evaluate and a loaded mixture need to know about language or images.

A task turns a recipe into samples, experts and losses. Above it nobody asks which task it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from moqe.data.protocols import Scored, SplitSamples
from moqe.models.estimate import Estimate
from moqe.progress import Progress
from moqe.recipe import Recipe
from moqe.router.features import Features
from moqe.router.router import Router


class Samples(Protocol):
    """Routable inputs with the labels that statistics need; see `moqe.data.samples.TextSamples`."""

    @property
    def document(self) -> tuple[str, ...]:
        """The unit that is resampled, per sample."""

    @property
    def domain(self) -> tuple[str, ...]:
        """The label of each sample in tables and plots."""

    @property
    def digest(self) -> str:
        """Names the samples and their order."""

    def __len__(self) -> int: ...

    def select(self, rows: Sequence[int]) -> Samples:
        """The samples at the given rows, in that order."""


@dataclass(frozen=True)
class ExpertFacts:
    """What the report says about an expert beside its losses.

    bytes_on_disk counts a tensor shared with other experts in full, as if the expert stood alone.
    """

    bytes_on_disk: int
    certificate: Mapping[str, Any]


class Task(Protocol):
    """Language or images, bound to one recipe and one mixture folder.

    modality: which networks can route, `text` or `image`. protocols: names of the rules by which a sample is scored,
    the one that deployment follows first. chunk_samples: how many samples are scored between two writes of the loss
    table.
    """

    modality: str
    protocols: tuple[str, ...]
    chunk_samples: int

    @property
    def metrics(self) -> tuple[str, ...]:
        """What is measured of every sample, keys of `moqe.evaluate.METRICS`; the first is judged, the others shown."""

    @property
    def metric(self) -> str:
        """The metric that the verdict judges: the first of `metrics`."""

    @property
    def router_metric(self) -> str:
        """The metric that routers are trained on."""

    @property
    def runtime_name(self) -> str:
        """What computes the losses."""

    @property
    def classes(self) -> tuple[str, ...]:
        """What a sample can be, in the order of an expert's predictions; empty where samples have no true class."""

    @property
    def feature_expert(self) -> str | None:
        """The expert whose features the router sees, so that it runs before anyone can choose; None without one."""

    def __init__(self, recipe: Recipe, folder: Path, device: str) -> None: ...

    @classmethod
    def predict(cls, recipe: Recipe, device: str, progress: Progress) -> Estimate:
        """What a build would take; makes nothing. Raises what a build would raise about the recipe itself."""

    def splits(self) -> Mapping[str, Samples]:
        """`calibration`, `router_train`, `router_validation` and `test`: disjoint documents."""

    def describe(self, split: str) -> SplitSamples:
        """What the loss table records about a split beside losses."""

    def identity(self, progress: Progress) -> dict[str, str]:
        """Digests of everything that decides the result beside the recipe: base weights, tokenizer, samples.

        The first call, so it reads the data and shows that.
        """

    def disk_bytes_needed(self) -> int:
        """Bytes that making the missing experts will take."""

    def make_experts(self, progress: Progress) -> None:
        """Quantize what is not yet on disk. Resumable; returns when every expert's folder is whole."""

    def losses(self, expert: str, split: str, rows: Sequence[int]) -> Scored:
        """What an expert (or `base`) does on the samples of a split at `rows`: every metric under every protocol."""

    def features(self, split: str, protocol: str) -> Features:
        """What the router may see of the samples of a split under a protocol."""

    def deploy(self, router: Router, folder: Path) -> None:
        """Write what running a mixture needs beside a router saved in `folder`; for language nothing."""

    def picture(self, split: str, row: int) -> bytes | None:
        """A sample as a PNG small enough for a page, at most 128 pixels a side; None where samples are no images."""

    def facts(self) -> dict[str, ExpertFacts]:
        """Size and certificate of every expert, and the size of `base`."""
