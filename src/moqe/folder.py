"""Where things lie in a mixture's folder.

recipe.yaml          what was asked, defaults left out
mixture.json         written last: experts, their files' digests, identity; a folder without it is half-built
shared/              tensors and tokenizer that all experts have in common
experts/<name>/      a compressed-tensors folder or split GGUF, and certificate.json
losses.parquet       the loss table
predictions.parquet  where samples have a true class: every expert's log-probabilities
router/<protocol>/   the deployed router and the ones it was compared with
verdict.json  report.html  README.md
agreement.json       what other runtimes say beside the reference, where that was measured
.work/               state of an unfinished build; removed at the end
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

CERTIFICATE = "certificate.json"


@dataclass(frozen=True)
class MixtureFolder:
    """Paths inside a mixture's folder."""

    path: Path

    @property
    def recipe(self) -> Path:
        """The recipe the folder was made from."""
        return self.path / "recipe.yaml"

    @property
    def manifest(self) -> Path:
        """The manifest, whose presence says that the build is complete."""
        return self.path / "mixture.json"

    @property
    def shared(self) -> Path:
        """Tensors and tokenizer common to all experts."""
        return self.path / "shared"

    def expert(self, name: str) -> Path:
        """The folder of one expert."""
        return self.path / "experts" / name

    def certificate(self, name: str) -> Path:
        """The certificate of one expert."""
        return self.expert(name) / CERTIFICATE

    def quantized(self, name: str) -> Path:
        """While building: the folder of an expert as its method left it, before distillation."""
        return self.work / "quantized" / name

    def training(self, name: str) -> Path:
        """While building: the state of an expert's distillation."""
        return self.work / "distill" / name

    @property
    def losses(self) -> Path:
        """The loss table."""
        return self.path / "losses.parquet"

    @property
    def predictions(self) -> Path:
        """Every expert's log-probabilities, where samples have a true class."""
        return self.path / "predictions.parquet"

    def router(self, protocol: str) -> Path:
        """The routers of one protocol."""
        return self.path / "router" / protocol

    @property
    def verdict(self) -> Path:
        """The verdict as JSON."""
        return self.path / "verdict.json"

    @property
    def agreement(self) -> Path:
        """How far other runtimes are from the reference, where that was measured."""
        return self.path / "agreement.json"

    @property
    def report(self) -> Path:
        """The report as one HTML page."""
        return self.path / "report.html"

    @property
    def card(self) -> Path:
        """The verdict as Markdown."""
        return self.path / "README.md"

    @property
    def work(self) -> Path:
        """State of an unfinished build."""
        return self.path / ".work"
