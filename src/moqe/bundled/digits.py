"""Handwritten digits that ship with scikit-learn: 1,797 grey images of 8 x 8 pixels, no download.

    bundled:digits/train    497 images: what the bundled network was trained on and what calibration may read
    bundled:digits/router   650 images: the router's
    bundled:digits/test     650 images

The data set is the test file of "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak, UCI). `train` is its
beginning and the others take turns after that, so router and test see the same kind of images. The part of an image
depends on its index alone. No two of the images are equal.

An image is handed out as a file that any image library opens, binary PGM (netpbm's grey map, "P5"): a header of one
line and one byte per pixel, so the same image is the same bytes everywhere.
"""

from __future__ import annotations

from moqe.errors import DataError, MissingExtra, did_you_mean

PARTS = ("train", "router", "test")
LABELS = tuple("0123456789")
SIDE = 8  # pixels
TRAIN_IMAGES = 497
_LARGEST = 16.0  # scikit-learn keeps counts of 4 x 4 binary cells


def digits_images(part: str) -> list[tuple[str, bytes, int]]:
    """Name, PGM file and label (0 to 9) of every image of a part, in the order of the data set.

    Raises DataError on an unknown part, MissingExtra without scikit-learn.
    """
    if part not in PARTS:
        raise DataError(f"bundled:digits has no part {part!r}; {did_you_mean(part, PARTS)}")
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise MissingExtra("scikit-learn", "vision", "bundled:digits") from None
    content = load_digits()
    pixels = (content.images * (255.0 / _LARGEST)).round().astype("uint8")  # (1797, 8, 8)
    header = f"P5 {SIDE} {SIDE} 255\n".encode()
    return [
        (f"digits-{index:04d}.pgm", header + image.tobytes(), int(label))
        for index, (image, label) in enumerate(zip(pixels, content.target, strict=True))
        if part_of(index) == part
    ]


def part_of(index: int) -> str:
    """The part that the image at an index of the data set belongs to."""
    if index < TRAIN_IMAGES:
        return "train"
    return "router" if (index - TRAIN_IMAGES) % 2 == 0 else "test"
