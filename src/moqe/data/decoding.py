"""An encoded image becomes RGB with eight bits per channel.

grey, 1 bit, palette   the three channels that they stand for
transparent            laid on white, as a page shows it (not: transparency dropped, which shows hidden colours)
CMYK, YCCK, Lab        converted by Pillow's formulas; colour profiles are not read
16 bit                 scaled to 8 bit, 65535 becoming 255; not clipped
animated, many pages   the first frame
camera's orientation   applied (EXIF)
32 bit, floating point refused: nothing says which value is white
above 178,956,970 px   refused: a decompression bomb, or 20,000 x 20,000; a long strip of few pixels is fine
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from moqe.data.preprocessing import MAX_PIXELS
from moqe.errors import DataError, MissingExtra

if TYPE_CHECKING:
    from PIL.Image import Image

_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
_SINGLE = frozenset({"MPO"})  # photographs with a second picture for depth or brightness: no animation
_DEEP = frozenset({"I", "I;16", "I;16B", "I;16L", "I;16N"})
_DEEPEST = 65535
# What Pillow's decoders raise on bytes that make no sense.
_FROM_NONSENSE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    IndexError,
    EOFError,
    RuntimeError,
    struct.error,
    zlib.error,
)


def is_animated(content: bytes, name: str) -> bool:
    """Read an image's header: whether it has more than one frame.

    Raises DataError, naming the image, when it is none, or too large. Cheap: no pixel is decoded.
    """
    with _open(content, name) as image, _explained(name, "is damaged or truncated"):
        return image.format not in _SINGLE and bool(getattr(image, "is_animated", False))


def decode(content: bytes, name: str) -> Image:
    """The image as RGB with eight bits per channel. See the table above.

    Raises DataError, naming the image, when it is none, damaged, truncated, too large, or has no range of values.
    """
    from PIL import Image, ImageOps

    with _open(content, name) as image, _explained(name, "is damaged or truncated"):
        image.load()
        upright = ImageOps.exif_transpose(image)
        if upright.mode in _DEEP:
            upright = Image.fromarray(_eight_bits(np.asarray(upright), name))
        if upright.mode == "F":
            raise DataError(f"{name} has floating point pixels, of which nothing says what is white: save it as 8 bit")
        if upright.mode in ("LA", "PA", "RGBA", "RGBa", "La") or "transparency" in upright.info:
            upright = upright.convert("RGBA")
            page = Image.new("RGBA", upright.size, (255, 255, 255, 255))
            upright = Image.alpha_composite(page, upright)
        return upright.convert("RGB")


def _eight_bits(values: np.ndarray, name: str) -> np.ndarray:
    """Values of 0 to 65535, (h, w), as uint8, rounded."""
    if int(values.min()) < 0 or int(values.max()) > _DEEPEST:
        raise DataError(f"{name} has 32-bit pixels, of which nothing says what is white: save it as 8 or 16 bit")
    return ((values.astype(np.int64) * 255 + _DEEPEST // 2) // _DEEPEST).astype(np.uint8)


@contextmanager
def _open(content: bytes, name: str) -> Iterator[Image]:
    try:
        from PIL import Image
    except ModuleNotFoundError:
        raise MissingExtra("pillow", "vision", "reading images") from None
    with warnings.catch_warnings():
        # Pillow warns from half its limit on and speaks up above it; nothing else it says is of use here.
        warnings.simplefilter("ignore")
        with _explained(name, "is not an image that Pillow can read"):
            Image.init()
            # An older Pillow does not know them all.
            image = Image.open(io.BytesIO(content), formats=[kind for kind in _FORMATS if kind in Image.OPEN])
        with image:
            if image.width * image.height > MAX_PIXELS:
                raise _too_large(name, f"{image.width:,} x {image.height:,} pixels")
            yield image


@contextmanager
def _explained(name: str, problem: str) -> Iterator[None]:
    from PIL.Image import DecompressionBombError

    try:
        yield
    except DecompressionBombError as error:
        raise _too_large(name, str(error)) from None
    except _FROM_NONSENSE as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        reason = "it has no header of a known format" if "cannot identify image file" in reason else reason
        raise DataError(f"{name} {problem} ({reason}): repair or remove it") from error


def _too_large(name: str, reason: str) -> DataError:
    return DataError(
        f"{name} is too large to decode ({reason}; the limit is {MAX_PIXELS:,} pixels): make it smaller or remove it"
    )
