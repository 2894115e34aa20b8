"""Images as samples: what a router routes, and what methods calibrate on.

An image is decoded, resized and cut when it is first asked for. Where all images of a split fit into 512 MiB at that
size, they are kept as bytes, once per way of resizing, and a batch is an index and a normalisation; otherwise each
image is decoded whenever it is asked for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moqe.data.class_names import has_background
from moqe.data.decoding import decode
from moqe.data.image_sources import Classes, ImageDocument, read_images
from moqe.data.partition import check_disjoint, distinct, router_limits, split_documents, spread
from moqe.data.preprocessing import Preprocessing
from moqe.errors import DataError
from moqe.recipe import Data, Source
from moqe.store import canonical_hash

if TYPE_CHECKING:
    from PIL.Image import Image

CACHE_BYTES = 512 * 2**20
Rows = Sequence[int] | Tensor


class ImageStore:
    """The images of a split and what has been decoded of them; shared by every selection of its samples."""

    def __init__(self, documents: Sequence[ImageDocument], cache_bytes: int = CACHE_BYTES) -> None:
        self.documents = tuple(documents)
        self._cache_bytes = cache_bytes
        self._cached: dict[Hashable, tuple[Tensor, Tensor]] = {}  # per way of resizing: (n, 3, h, w), what is there

    def arranged(self, rows: Tensor, preprocessing: Preprocessing) -> Tensor:
        """Images resized and cut: uint8, (b, 3, h, w)."""
        shape = (len(self.documents), 3, *preprocessing.size)
        if torch.Size(shape).numel() > self._cache_bytes:
            return self._decoded(rows, preprocessing)
        way = (preprocessing.resize, preprocessing.crop, preprocessing.interpolation)
        if way not in self._cached:
            self._cached[way] = torch.empty(shape, dtype=torch.uint8), torch.zeros(shape[0], dtype=torch.bool)
        pixels, present = self._cached[way]
        missing = torch.tensor(sorted(set(rows[~present[rows]].tolist())), dtype=torch.int64)
        if len(missing):
            pixels[missing] = self._decoded(missing, preprocessing)
            present[missing] = True
        return pixels[rows]

    def picture(self, row: int) -> Image:
        """One image, RGB, at its own size."""
        document = self.documents[row]
        return decode(document.content(), document.name)

    def _decoded(self, rows: Tensor, preprocessing: Preprocessing) -> Tensor:
        arranged = [preprocessing.arrange(self.picture(row), self.documents[row].name) for row in rows.tolist()]
        return torch.stack(arranged)


@dataclass(frozen=True)
class ImageSamples:
    """Labelled images, each a document of its own.

    store: where they come from; rows: which of it. document: n content digests. domain: n class names. labels: class
    indices, int64, (n,).
    """

    store: ImageStore
    rows: Tensor
    document: tuple[str, ...]
    domain: tuple[str, ...]
    labels: Tensor

    @classmethod
    def of(cls, documents: Sequence[ImageDocument]) -> ImageSamples:
        """Samples of encoded images, in their order."""
        return cls(
            ImageStore(documents),
            torch.arange(len(documents)),
            tuple(document.digest for document in documents),
            tuple(document.domain for document in documents),
            torch.tensor([document.label for document in documents], dtype=torch.int64),
        )

    def __len__(self) -> int:
        return len(self.document)

    @property
    def digest(self) -> str:
        """16 hexadecimal digits: equal digests mean equal images and labels in equal order."""
        return canonical_hash([self.document, self.labels.tolist()])

    def select(self, rows: Rows) -> ImageSamples:
        """The samples at the given rows, in that order."""
        chosen = torch.as_tensor(rows, dtype=torch.int64)
        return replace(
            self,
            rows=self.rows[chosen],
            document=tuple(self.document[row] for row in chosen.tolist()),
            domain=tuple(self.domain[row] for row in chosen.tolist()),
            labels=self.labels[chosen],
        )

    def pixels(self, rows: Rows, preprocessing: Preprocessing) -> Tensor:
        """The images at the given rows as a network takes them: float32, (b, 3, h, w), b > 0, on the CPU.

        Raises DataError, naming the image, when it is damaged or cannot be brought to the others' size.
        """
        chosen = self.rows[torch.as_tensor(rows, dtype=torch.int64)]
        return preprocessing.normalise(self.store.arranged(chosen, preprocessing))

    def picture(self, row: int) -> Image:
        """One image for people: RGB, at its own size, a Pillow image."""
        return self.store.picture(int(self.rows[row]))


@dataclass(frozen=True)
class PreparedImages:
    """Samples as one network takes them: what methods calibrate on."""

    samples: ImageSamples
    preprocessing: Preprocessing
    device: torch.device

    @property
    def labels(self) -> Tensor:
        """Classes, int64, (n,), on the device."""
        return self.samples.labels.to(self.device)

    def __len__(self) -> int:
        return len(self.samples)

    def batch(self, rows: Tensor) -> Tensor:
        """The images of these rows, int64 (b,): float32, (b, 3, h, w), on the device."""
        pixels = self.samples.store.arranged(self.samples.rows[rows.cpu()], self.preprocessing)
        return self.preprocessing.normalise(pixels.to(self.device))


def make_image_splits(data: Data, labels: tuple[str, ...] | None, classes: int, seed: int) -> dict[str, ImageSamples]:
    """Read a recipe's sources: `calibration`, `router_train`, `router_validation` and `test`, disjoint images.

    labels, classes: the base model's class names, None where it has none, and their number. A share of every class's
    router images, drawn by their digests, is for validation; a class with one of them is for training only. Sample
    limits are spread evenly over classes.
    Raises DataError when an image is in two sets, when a class has no calibration image, when the router's images
    cannot be divided, and whatever `read_images` raises.
    """
    known = Classes(classes, labels)
    calibration = distinct("calibration", _read(data.calibration, known))
    router = distinct("router", _read(data.router, known))
    test = distinct("test", _read(data.test, known))
    check_disjoint({"calibration": calibration, "router": router, "test": test}, "content")
    _check_classes(calibration, [*router, *test], known)
    train, validation = _divided(router, data.validation_share, seed)
    train_limit, validation_limit = router_limits(data.router_samples, data.validation_share)
    return {
        "calibration": _chosen(calibration, data.calibration_samples, seed),
        "router_train": _chosen(train, train_limit, seed),
        "router_validation": _chosen(validation, validation_limit, seed),
        "test": _chosen(test, data.test_samples, seed),
    }


def _read(sources: Iterable[Source], known: Classes) -> list[ImageDocument]:
    return [document for source in sources for document in read_images(source, known)]


def _check_classes(calibration: Sequence[ImageDocument], others: Sequence[ImageDocument], known: Classes) -> None:
    """Raise DataError when calibration lacks a class: its channels would be calibrated on others.

    The background class of a model may be missing, if the other sets have no image of it either.
    """
    found = {document.label for document in calibration}
    if has_background(known.names) and all(document.label for document in others):
        found.add(0)
    names = known.names or [str(label) for label in range(known.count)]
    missing = [names[label] for label in range(known.count) if label not in found]
    if missing:
        raise DataError(
            f"{len(missing)} of {known.count} classes have no calibration image: {', '.join(missing[:5])}"
            f"{', ...' if len(missing) > 5 else ''}; add images of every class, or raise max_documents"
        )


def _divided(
    documents: Sequence[ImageDocument], share: float, seed: int
) -> tuple[list[ImageDocument], list[ImageDocument]]:
    """Router images for training and for validation; a class's only image is for training."""
    counts = Counter(document.domain for document in documents)
    several = [document for document in documents if counts[document.domain] > 1]
    if not several:
        raise DataError("the router has at most one image of each class, and training and validation need one each")
    _, validation = split_documents(several, share, seed)
    drawn = {document.digest for document in validation}
    return [document for document in documents if document.digest not in drawn], validation


def _chosen(documents: Sequence[ImageDocument], limit: int | None, seed: int) -> ImageSamples:
    if limit is not None and limit < len(documents):
        units = [(document.domain, document.digest) for document in documents]
        documents = [documents[row] for row in spread(units, limit, seed)]
    return ImageSamples.of(documents)
