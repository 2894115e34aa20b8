"""Encoded images of every kind become RGB, or one line that says why not (issue: bad input)."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from moqe.data.decoding import decode, is_animated
from moqe.errors import DataError

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
COLOUR = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(image: Image.Image, kind: str = "PNG", **options: object) -> np.ndarray:
    found = decode(encoded(image, kind, **options), "it")
    assert found.mode == "RGB"
    return np.asarray(found)


def test_colour_is_kept():
    assert np.array_equal(decoded(Image.fromarray(COLOUR)), COLOUR)


@pytest.mark.parametrize("mode", ["L", "P", "1"])
def test_one_channel_becomes_three_equal_ones(mode):
    image = Image.fromarray(RAMP).convert(mode)
    expected = np.asarray(image.convert("L"))
    assert np.array_equal(decoded(image), np.repeat(expected[..., None], 3, 2))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparency_lies_on_white(mode):
    alpha = np.array([[0, 255, 128]], dtype=np.uint8)
    grey = np.array([[10, 10, 10]], dtype=np.uint8)
    image = Image.merge("RGBA", [Image.fromarray(grey)] * 3 + [Image.fromarray(alpha)])
    if mode == "LA":
        image = Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)])
    if mode == "PA":
        image = image.convert("P")  # a palette with one transparent entry
        image.info["transparency"] = bytes([0] * 256)
        assert (decoded(image, transparency=bytes([0] * 256)) == 255).all()
        return
    assert decoded(image)[0, :, 0].tolist() == [255, 10, 132]


def test_one_colour_can_be_the_transparent_one():
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (9, 9, 9))
    assert decoded(image, transparency=(1, 2, 3))[0].tolist() == [[255, 255, 255], [9, 9, 9]]


def test_cmyk():
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # red
    red = decoded(image, "JPEG", quality=95)
    assert np.abs(red.astype(int) - [255, 0, 0]).max() < 8


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 65535), min_size=4, max_size=4))
def test_sixteen_bits_are_scaled_not_clipped(values):
    pixels = np.array(values, dtype=np.uint16).reshape(2, 2)
    found = decoded(Image.fromarray(pixels))
    assert np.array_equal(found[..., 0], np.round(pixels / 257).astype(np.uint8))


def test_sixteen_bits_of_colour():
    rows = b"".join(b"\0" + struct.pack(">6H", 65535, 32768, 0, 257, 514, 771) for _ in range(2))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0))
    png = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert np.asarray(decode(png, "it"))[0].tolist() == [[255, 128, 0], [1, 2, 3]]


def test_values_without_a_range_are_refused():
    deep = Image.fromarray(np.array([[0, 70000]], dtype=np.int32))
    with pytest.raises(DataError, match="it has 32-bit pixels"):
        decoded(deep, "TIFF")
    with pytest.raises(DataError, match="it has floating point pixels"):
        decoded(Image.fromarray(np.array([[0.5]], dtype=np.float32)), "TIFF")


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_of_several_frames_counts(kind):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert is_animated(content, "it")
    assert np.abs(np.asarray(decode(content, "it")).astype(int) - [255, 0, 0]).max() < 3
    assert not is_animated(encoded(frames[0], kind), "it")


def test_a_second_picture_in_a_photograph_is_no_animation():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    assert not is_animated(encoded(frames[0], "MPO", save_all=True, append_images=frames[1:]), "it")


def test_the_camera_s_orientation_is_applied():
    image = Image.fromarray(COLOUR)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    assert np.array_equal(decoded(image, exif=exif.tobytes()), np.rot90(COLOUR, -1))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not an image",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"GIF89a",
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff\xe0",
    ],
)
def test_what_is_no_image(content):
    for read in (decode, is_animated):
        with pytest.raises(DataError, match=r"^cat.jpg is not an image that Pillow can read .*: repair or remove it$"):
            read(content, "cat.jpg")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF"])
def test_truncated_images(kind):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    content = encoded(Image.fromarray(noise), kind)
    assert decode(content, "it").size == (64, 64)
    with pytest.raises(DataError, match=r"^cat.jpg (is damaged or truncated|is not an image)"):
        decode(content[: len(content) // 2], "cat.jpg")


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["JPEG", "PNG", "GIF", "TIFF", "AVIF"]), st.integers(0, 10**6), st.binary(min_size=1, max_size=8)
)
def test_damage_is_a_data_error_or_an_image(kind, place, noise):
    content = bytearray(encoded(Image.fromarray(COLOUR), kind))
    place %= len(content)
    content[place : place + len(noise)] = noise
    with contextlib.suppress(DataError):
        assert decode(bytes(content), "it").mode == "RGB"


def png_header(width: int, height: int) -> bytes:
    data = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + data
    idat = b"\0\0\0\0IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + idat


@pytest.mark.parametrize("limit", [Image.MAX_IMAGE_PIXELS, None])
@pytest.mark.parametrize("read", [decode, is_animated])
def test_twenty_thousand_pixels_squared_are_too_many(read, limit, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)  # ours holds where an application has lifted Pillow's
    with pytest.raises(DataError, match=r"^big.png is too large to decode .*: make it smaller or remove it$"):
        read(png_header(20_000, 20_000), "big.png")


def test_large_images_below_the_limit_pass_without_a_warning():
    assert not is_animated(png_header(10_000, 10_000), "it")  # Pillow warns here, and warnings are errors in tests
    assert decode(encoded(Image.new("L", (20_000, 30))), "it").size == (20_000, 30)


def test_one_pixel():
    assert decoded(Image.new("L", (1, 1), 7)).tolist() == [[[7, 7, 7]]]
