"""The seam between vision methods and everything around them.

A vision method turns a folded network and calibration images into quantized layers. It knows nothing of files, and it
returns layers rather than a network, so that what is measured is always built from what is stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

from moqe.methods.vision.layer import QuantizedLayer
from moqe.models.convolutions import LayerSite
from moqe.progress import Progress
from moqe.recipe import Expert
from moqe.schemes import Scheme

PASSES = 6  # over the calibration images, whatever the method: ptq's ranges, and errors for the certificate


class CalibrationImages(Protocol):
    """Preprocessed images that a method may look at. Their labels are used only where a method says so."""

    @property
    def labels(self) -> Tensor:
        """Classes, int64, (n,)."""

    def __len__(self) -> int:
        """How many images there are."""

    def batch(self, rows: Tensor) -> Tensor:
        """The images of these rows, int64 (b,): float32, (b, 3, h, w), preprocessed."""


@dataclass(frozen=True)
class VisionResult:
    """What a method made: its quantized layers, and per layer what the certificate should say.

    layers: in the order they run; sites that are not among them stay in full precision. notes: by layer name; see
    each method's page for the keys. `error` and `ptq_error` are always there for quantized layers.
    """

    layers: tuple[QuantizedLayer, ...]
    notes: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """What a method is asked to do.

    network: a folded network, float32 and in eval mode, which is left as it was. sites: its convolutions and linears in
    the order they run. blocks: names of the modules that are reconstructed together, in the order they run. images: to
    calibrate and train on. expert: its options. seed: of every random choice; the global generators are not touched.
    """

    network: nn.Module
    sites: Sequence[LayerSite]
    blocks: Sequence[str]
    images: CalibrationImages
    scheme: Scheme
    expert: Expert
    seed: int
    progress: Progress


class VisionMethod(Protocol):
    """An algorithm that quantizes an image classifier to any scheme of images. Stateless."""

    def forward_passes(self, expert: Expert, images: int) -> float:
        """About how many forward passes of one image `fit` takes, a step of training counted as three."""

    def fit(self, job: Job) -> VisionResult:
        """Quantize a network.

        Raises NumericalError where numbers are not finite, UnsupportedLayer where a layer cannot be done.
        """
