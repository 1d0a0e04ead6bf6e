"""Bytes from a stranger to pixels: a few formats only, told by content, size capped before anything is decoded.

Pillow opens some forty formats, one of which (EPS) starts Ghostscript; a name says nothing about the content. A
sample that cannot be decoded raises BadSample, which the stream turns into a replacement and a quarantine line.

What comes out is the first frame, upright, 8-bit RGB. Alpha is dropped, so what lies under it shows; palettes, grey and
CMYK are converted (CMYK without its colour profile); of 16-bit channels the high byte stays. Pixels of 32 bits (TIFF's
integers and floats) have no known white, and are refused.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

# Format -> endings of its files and of a shard's members. The list of what is taken: there is no other.
FORMATS = {
    "JPEG": ("jpg", "jpeg"),
    "PNG": ("png",),
    "WEBP": ("webp",),
    "TIFF": ("tif", "tiff"),
    "BMP": ("bmp",),
    "GIF": ("gif",),
}
LONGEST = 64  # times the shorter side: what is centre-cropped is not resized beyond it
ENDINGS = tuple(ending for endings in FORMATS.values() for ending in endings)
_TILE_WIDTH, _TILE_LENGTH = 322, 323  # TIFF's tags


class BadSample(Exception):
    """A sample that can't be used; the message is the reason that the quarantine log shows."""


def decode(data: bytes | Image.Image, max_pixels: int) -> Image.Image:
    """An RGB image, upright by its EXIF orientation, of a file's bytes or of what Pillow made. Raises BadSample."""
    return _read(data, max_pixels, header_only=False)


def check_header(data: bytes, max_pixels: int) -> None:
    """Raise BadSample where the header shows that `decode` would: in a hundredth of its time, and damage may follow."""
    _read(data, max_pixels, header_only=True)


def ending_of(data: bytes) -> str:
    """How files of an image's format are called, by its first bytes; of what is no image, one as good as any."""
    Image.init()  # Pillow knows a format once it is asked for
    accepts = {kind: Image.OPEN[kind][1] for kind in FORMATS if kind in Image.OPEN}
    return next((FORMATS[kind][0] for kind, accept in accepts.items() if accept and accept(data[:16])), ENDINGS[0])


def _read(data: bytes | Image.Image, max_pixels: int, header_only: bool) -> Image.Image:
    if not data:
        raise BadSample("empty")
    # Pillow's limit holds for the process, and at later crops too. It is raised only where ours is higher.
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of what is decided here: sizes, odd EXIF, transparency
            image = data if isinstance(data, Image.Image) else Image.open(io.BytesIO(data), formats=list(FORMATS))
            _check_size(image, max_pixels)
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


def _check_size(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise BadSample(f"{width}x{height} pixels, more than data.max_pixels = {max_pixels}")
    # A small TIFF may claim one tile of any size, which is decoded whole.
    tags = getattr(image, "tag_v2", {})
    width, height = tags.get(_TILE_WIDTH, 0), tags.get(_TILE_LENGTH, 0)
    if width * height > max_pixels:
        raise BadSample(f"tiles of {width}x{height} pixels, more than data.max_pixels = {max_pixels}")


def _upright_rgb(image: Image.Image) -> Image.Image:
    kind = image.format  # a turned one has none
    if not image.info.keys().isdisjoint(("exif", "xmp", "Raw profile type exif")):
        image = ImageOps.exif_transpose(image)
    if image.mode == "RGB":
        return image
    # Pillow before 12 calls a PNG's 16-bit grey "I"; any other "I" has 32 bits.
    if image.mode.startswith("I;16") or (image.mode == "I" and kind == "PNG"):
        # convert("RGB") would clip all above 255 to white.
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise BadSample(f"pixels of Pillow's mode {image.mode}; expected 8 bits a channel, or 16 without a sign")
    return image.convert("RGB")


def crop_and_resize(image: Image.Image, box: tuple[int, int, int, int], size: int) -> NDArray[np.uint8]:
    """The box (top, left, height, width) of an RGB image as uint8 (3, size, size): torchvision's resized_crop."""
    top, left, height, width = box
    # Cropping first, so that the resize sees no pixel outside of the box, as torchvision's does not.
    cropped = image.crop((left, top, left + width, top + height))
    return channels_first(cropped.resize((size, size), Image.Resampling.BILINEAR))


def centre_crop(image: Image.Image, size: int, ratio: float) -> Image.Image:
    """(size, size) out of the middle, after a resize of the shorter side to size * ratio."""
    longest = LONGEST * min(image.size)
    if max(image.size) > longest:  # a line of pixels would be resized to gigabytes
        width, height = (min(side, longest) for side in image.size)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    shorter = round(size * ratio)
    scale = shorter / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def channels_first(image: Image.Image) -> NDArray[np.uint8]:
    """uint8 (3, S, S)."""
    return np.asarray(image).transpose(2, 0, 1)  # numpy writes this to a batch in half of torch's time
