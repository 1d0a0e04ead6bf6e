"""Bytes from a stranger to pixels: JPEG, PNG and WebP only, told by content, size capped before anything is decoded.

Pillow opens some forty formats, one of which (EPS) starts Ghostscript; a name says nothing about the content. A
sample that cannot be decoded raises BadSample, which the stream turns into a replacement and a quarantine line.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("JPEG", "PNG", "WEBP")


class BadSample(Exception):
    """A sample that can't be used; the message is the reason that the quarantine log shows."""


def decode(data: bytes, max_pixels: int) -> Image.Image:
    """An RGB image, upright by its EXIF orientation, whatever mode the file has. Raises BadSample."""
    return _read(data, max_pixels, header_only=False)


def check_header(data: bytes, max_pixels: int) -> None:
    """Raise BadSample where the header shows that `decode` would: in a hundredth of its time, and damage may follow."""
    _read(data, max_pixels, header_only=True)


def _read(data: bytes, max_pixels: int, header_only: bool) -> Image.Image:
    if not data:
        raise BadSample("empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of what is decided here: sizes, odd EXIF, transparency
            image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
            width, height = image.size
            if width * height > max_pixels:
                raise BadSample(f"{width}x{height} pixels, more than data.max_pixels = {max_pixels}")
            if header_only:
                return image
            image.load()
            return _upright_rgb(image)
    except BadSample:
        raise
    except MemoryError:
        raise
    except Image.UnidentifiedImageError:
        raise BadSample(f"not a {', '.join(FORMATS)} image by its content") from None
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise BadSample(f"{type(error).__name__}: {error}") from None


def _upright_rgb(image: Image.Image) -> Image.Image:
    if "exif" in image.info or "xmp" in image.info:
        image = ImageOps.exif_transpose(image)
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I") or image.mode == "F":
        # 16-bit grey: convert("RGB") would clip all above 255 to white.
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")
