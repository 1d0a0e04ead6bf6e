"""Decoding what a stranger sends: right colours for every mode, and a reason instead of pixels for the rest."""

from __future__ import annotations

import contextlib
import gzip
import io
import struct
import time
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from dist_ssl.data.decode import FORMATS, LONGEST, BadSample, centre_crop, crop_and_resize, decode, ending_of

MAX = 50_000_000


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(10_000_000), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


PICTURE = Image.fromarray((np.arange(40 * 60 * 3).reshape(40, 60, 3) % 251).astype(np.uint8))
GREY = PICTURE.convert("L")


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}), ("WEBP", {"lossless": True}), ("JPEG", {"quality": 95}), ("BMP", {}), ("GIF", {}), ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}), ("TIFF", {"compression": "jpeg"}),
    ],
)  # fmt: skip
def test_formats(kind: str, options: dict[str, Any]) -> None:
    image = decode(encoded(PICTURE, kind, **options), MAX)
    assert (image.mode, image.size) == ("RGB", (60, 40))
    expected = Image.open(io.BytesIO(encoded(PICTURE, kind, **options))).convert("RGB")
    assert np.array_equal(np.asarray(image), np.asarray(expected))


def test_modes_come_out_in_true_colour() -> None:
    grey = np.asarray(GREY)
    sixteen = Image.fromarray((grey.astype(np.uint16) << 8) + 77)
    alpha = PICTURE.copy()
    alpha.putalpha(GREY)
    palette = PICTURE.quantize(64)
    for data, expected in (
        (encoded(GREY, "PNG"), GREY.convert("RGB")),
        (encoded(sixteen, "PNG"), GREY.convert("RGB")),
        (encoded(GREY.point(lambda v: 255 * (v > 100)).convert("1"), "PNG"), GREY.point(lambda v: 255 * (v > 100))),
        (encoded(alpha, "PNG"), PICTURE),
        (encoded(GREY.convert("LA"), "PNG"), GREY.convert("RGB")),
        (encoded(palette, "PNG"), palette.convert("RGB")),
        (encoded(palette, "PNG", transparency=3), palette.convert("RGB")),
    ):
        image = decode(data, MAX)
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image), np.asarray(expected.convert("RGB")))
    for image in (PICTURE.convert("CMYK"), GREY):
        jpeg = encoded(image, "JPEG", quality=100)
        assert np.abs(np.asarray(decode(jpeg, MAX), int) - np.asarray(image.convert("RGB"), int)).mean() < 4


@pytest.mark.parametrize("kind", ["TIFF", "GIF", "WEBP", "PNG"])
def test_the_first_frame_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (30, 20), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    image = Image.open(io.BytesIO(data))
    assert getattr(image, "n_frames", 1) == 3
    assert np.array_equal(np.asarray(decode(data, MAX)), np.asarray(frames[0]))


def test_tiffs_of_every_depth() -> None:
    grey, sixteen = np.asarray(GREY), (np.asarray(GREY).astype(np.uint16) << 8) + 77
    alpha = PICTURE.copy()
    alpha.putalpha(GREY)
    for image, expected in (
        (Image.fromarray(sixteen), GREY), (Image.frombytes("I;16B", (60, 40), sixteen.astype(">u2").tobytes()), GREY),
        (alpha, PICTURE), (PICTURE.convert("CMYK"), PICTURE), (PICTURE.quantize(64), PICTURE.quantize(64)),
    ):  # fmt: skip
        found = decode(encoded(image, "TIFF"), MAX)
        assert np.array_equal(np.asarray(found), np.asarray(expected.convert("RGB"))), image.mode
    for image in (Image.fromarray(grey.astype(np.int32)), Image.fromarray(grey.astype(np.float32))):
        for options in ({}, {"tiffinfo": {700: b"<x:xmpmeta/>"}}):
            with pytest.raises(BadSample, match=f"mode {image.mode}; expected 8 bits a channel"):
                decode(encoded(image, "TIFF", **options), MAX)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = decode(encoded(PICTURE, "TIFF", exif=exif), MAX)
    assert np.array_equal(np.asarray(turned), np.asarray(PICTURE.transpose(Image.Transpose.ROTATE_270)))


def test_pictures_of_a_phone_are_jpegs() -> None:
    """Pillow calls those that hold another picture MPO."""
    data = encoded(PICTURE, "MPO", save_all=True, append_images=[GREY.convert("RGB")])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert ending_of(data) == "jpg"
    assert np.array_equal(np.asarray(decode(data, MAX)), np.asarray(decode(encoded(PICTURE, "JPEG"), MAX)))


def test_ending_is_told_by_content() -> None:
    assert [ending_of(encoded(PICTURE, kind)) for kind in FORMATS] == ["jpg", "png", "webp", "tif", "bmp", "gif"]
    assert ending_of(png_header(20_000, 20_000)) == "png"
    assert ending_of(EPS) == "jpg"


def test_the_limit_of_pixels_is_ours_where_it_is_higher_than_pillows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(BadSample, match="DecompressionBombError"):
        decode(encoded(PICTURE, "PNG"), 999)
    assert Image.MAX_IMAGE_PIXELS == 1000
    image = decode(encoded(PICTURE, "PNG"), MAX)
    crop_and_resize(image, (0, 0, 40, 60), 8)  # where Pillow looks at the size again


def tiff_of_one_tile(side: int, tile: int) -> bytes:
    """A TIFF whose picture is smaller than its only tile: a few hundred kB that decode to tile^2 bytes."""
    data = zlib.compress(bytes(tile * tile), 9)
    tags = {256: side, 257: side, 258: 8, 259: 8, 262: 1, 277: 1, 322: tile, 323: tile, 324: 0, 325: len(data)}
    tags[324] = 8 + 2 + 12 * len(tags) + 4
    table = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + table + bytes(4) + data


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(PICTURE, "PNG", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert expected is not None
    assert np.array_equal(np.asarray(decode(data, MAX)), np.asarray(expected))
    assert decode(encoded(PICTURE, "JPEG", exif=exif), MAX).size == ((40, 60) if orientation > 4 else (60, 40))
    raw, text = exif.tobytes(), PngInfo()
    text.add_text("Raw profile type exif", f"\nexif\n{len(raw):8}\n{raw.hex()}\n", zip=True)  # as ImageMagick writes it
    assert np.array_equal(np.asarray(decode(encoded(PICTURE, "PNG", pnginfo=text), MAX)), np.asarray(expected))


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(/tmp/owned) (w) file\nshowpage\n"


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (lambda: b"", "empty"),
        (lambda: EPS, "not a JPEG, PNG, WEBP, TIFF, BMP, GIF image"),
        (lambda: b"\x80\x04cos\nsystem\n(S'touch /tmp/owned'\ntR.", "not a JPEG, PNG, WEBP, TIFF, BMP, GIF image"),
        (lambda: gzip.compress(bytes(250_000_000), 1), "not a JPEG, PNG, WEBP, TIFF, BMP, GIF image"),
        (lambda: encoded(PICTURE, "PPM"), "not a JPEG, PNG, WEBP, TIFF, BMP, GIF image"),
        (lambda: encoded(PICTURE, "TIFF")[:3000], "."),
        (lambda: encoded(PICTURE, "GIF")[:900], "truncated"),
        (lambda: encoded(PICTURE, "BMP")[:3000], "truncated"),
        (lambda: tiff_of_one_tile(100, 16384), "tiles of 16384x16384 pixels, more than data.max_pixels"),
        (lambda: encoded(PICTURE, "JPEG")[:700], "truncated"),
        (lambda: encoded(PICTURE, "PNG")[:-2000], "."),
        (lambda: encoded(PICTURE, "WEBP")[:100], "."),
        (lambda: b"\xff\xd8\xff\xe0" + bytes(1000), "."),
        (lambda: png_header(50_000, 50_000), "2500000000|50000x50000|DecompressionBomb"),
        (lambda: png_header(9_000, 9_000), "9000x9000 pixels, more than data.max_pixels"),
        (lambda: png_header(2**31 - 1, 2**31 - 1), "."),
        (lambda: png_header(0, 5), "."),
    ],
    ids=range(17),
)
def test_hostile_bytes_give_a_reason(made: Callable[[], bytes], reason: str) -> None:
    data = made()  # not while tests are collected: some take a second
    before, started = psutil.Process().memory_info().rss, time.monotonic()
    with pytest.raises(BadSample, match=reason):
        decode(data, MAX)
    assert psutil.Process().memory_info().rss - before < 200e6
    assert time.monotonic() - started < 5


def test_a_damaged_byte_anywhere_never_raises_anything_else() -> None:
    rng = np.random.default_rng(0)
    for kind in FORMATS:
        whole = bytearray(encoded(PICTURE, kind))
        for _ in range(200):
            damaged = bytearray(whole)
            for at in rng.integers(0, len(whole), 3):
                damaged[at] = rng.integers(0, 256)
            with contextlib.suppress(BadSample):
                assert decode(bytes(damaged), MAX).mode == "RGB"


def test_a_line_of_pixels_is_not_resized_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    sides, resize = [], Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda image, size, *given: sides.append(size) or resize(image, size, *given)
    )
    line = Image.new("RGB", (65_000, 1))
    line.putpixel((32_500, 0), (255, 255, 255))
    middle = np.asarray(centre_crop(line, 224, 1.0))[:, :, 0]
    assert (middle[:, 112] == 128).all()  # the pixel begins in the very middle
    assert sides == [(LONGEST * 224, 224)]
