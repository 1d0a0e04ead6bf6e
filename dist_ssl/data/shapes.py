"""The built-in source `shapes:COUNT[:SIZE]`: rendered images whose every factor is known.

One of eight shapes, in any colour, texture, place, size and rotation, lighter or darker than any of five backgrounds,
with noise. A linear map of pixels says little about the class, since nothing is where it was in another image; the
factors beside each image let an evaluation ask what an encoder and its projection head keep. Image i depends on
(seed, i) only. Shapes are signed distance functions, whose zero line is drawn one pixel soft.

Legend: n images, S pixels a side.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dist_ssl.data.random import key_of, philox, uniforms, words

Array = NDArray[np.floating[Any]]  # float32 throughout

CLASSES = ("disc", "square", "triangle", "star", "cross", "ring", "crescent", "bar")
TEXTURES = ("plain", "stripes", "checker", "dots")
BACKGROUNDS = ("plain", "gradient", "stripes", "checker", "waves")
JPEG_QUALITY = 92
LARGEST_NOISE = 0.08


@dataclass(frozen=True)
class Factors:
    """What each of n images shows.

    `hue` in [0, 1) and `rotation` in radians [0, 2 pi) are circular; positions are of the shape's centre, `scale` is
    its radius, both in parts of the image's side; `noise` is a standard deviation in [0, 1].
    """

    kind: NDArray[np.int64]
    hue: NDArray[np.float64]
    rotation: NDArray[np.float64]
    texture: NDArray[np.int64]
    background: NDArray[np.int64]
    position_x: NDArray[np.float64]
    position_y: NDArray[np.float64]
    scale: NDArray[np.float64]
    noise: NDArray[np.float64]
    rest: NDArray[np.float64]  # (n, 15) uniforms for what is not worth a name: phases, the background's colours

    def as_json(self, i: int) -> bytes:
        values: dict[str, float | int] = {"class": int(self.kind[i]), "texture": int(self.texture[i])}
        values["background"] = int(self.background[i])
        for name in ("hue", "rotation", "position_x", "position_y", "scale", "noise"):
            values[name] = round(float(getattr(self, name)[i]), 6)
        return json.dumps(values).encode()


def draw_factors(seed: int, indices: Sequence[int]) -> Factors:
    """The factors of the images `indices`."""
    counters = np.zeros((len(indices) * 6, 4), dtype=np.uint64)
    counters[:, 0] = np.tile(np.arange(6), len(indices))
    counters[:, 1] = np.repeat(np.asarray(indices, dtype=np.uint64), 6)
    u = uniforms(philox(key_of("shapes", seed), counters)).reshape(len(indices), 24)
    return Factors(
        kind=(u[:, 0] * len(CLASSES)).astype(np.int64),
        hue=u[:, 1],
        rotation=u[:, 2] * 2 * np.pi,
        texture=(u[:, 3] * len(TEXTURES)).astype(np.int64),
        background=(u[:, 4] * len(BACKGROUNDS)).astype(np.int64),
        position_x=0.35 + 0.3 * u[:, 5],
        position_y=0.35 + 0.3 * u[:, 6],
        scale=0.22 + 0.16 * u[:, 7],
        noise=LARGEST_NOISE * u[:, 8],
        rest=u[:, 9:],
    )


def render(seed: int, indices: Sequence[int], size: int) -> tuple[NDArray[np.uint8], Factors]:
    """The images `indices` as (n, S, S, 3) uint8, and their factors."""
    factors = draw_factors(seed, indices)
    rest = factors.rest.astype(np.float32)
    line = (np.arange(size, dtype=np.float32) + 0.5) / size
    y, x = line[None, :, None], line[None, None, :]

    def column(values: NDArray[np.generic]) -> Array:
        return values.astype(np.float32)[:, None, None]

    cos, sin = np.cos(column(factors.rotation)), np.sin(column(factors.rotation))
    dx = (x - column(factors.position_x)) / column(factors.scale)
    dy = (y - column(factors.position_y)) / column(factors.scale)
    u, v = cos * dx + sin * dy, cos * dy - sin * dx
    distance = np.empty_like(u)
    texture = np.empty_like(u)
    background = np.empty_like(u)
    for kind in range(len(CLASSES)):
        rows = np.flatnonzero(factors.kind == kind)
        distance[rows] = _distance(kind, u[rows], v[rows])
    for kind in range(len(TEXTURES)):
        rows = np.flatnonzero(factors.texture == kind)
        texture[rows] = _texture(kind, u[rows], v[rows], 4 + 4 * column(rest[rows, 0]))
    angle = column(rest[:, 1]) * np.float32(2 * np.pi)
    along = np.cos(angle) * (x - 0.5) + np.sin(angle) * (y - 0.5)
    across = np.cos(angle) * (y - 0.5) - np.sin(angle) * (x - 0.5)
    for kind in range(len(BACKGROUNDS)):
        rows = np.flatnonzero(factors.background == kind)
        background[rows] = _background(
            kind, along[rows], across[rows], column(rest[rows, 2]), 3 + 5 * column(rest[rows, 3])
        )
    # One of shape and background is dark and the other light, by a coin: brightness does not tell them apart.
    light, dark = 0.65 + 0.35 * rest[:, 4], 0.1 + 0.3 * rest[:, 5]
    shape_is_light = rest[:, 6] < 0.5
    shape_value, ground_value = np.where(shape_is_light, light, dark), np.where(shape_is_light, dark, light)
    shape_rgb = _rgb(factors.hue.astype(np.float32), 0.5 + 0.5 * rest[:, 7], shape_value)
    ground_rgb = _rgb(rest[:, 8], 0.6 * rest[:, 9], ground_value)
    second_rgb = _rgb(rest[:, 10], 0.6 * rest[:, 11], np.clip(ground_value + 0.3 * (rest[:, 12] - 0.5), 0, 1))
    cover = np.clip(0.5 - distance * column(factors.scale) * size, 0, 1)[..., None]
    shape = shape_rgb[:, None, None] * (0.55 + 0.45 * texture)[..., None]
    ground = ground_rgb[:, None, None] + (second_rgb - ground_rgb)[:, None, None] * background[..., None]
    pixels = ground + cover * (shape - ground)
    pixels += _noise(seed, indices, size) * column(factors.noise)[..., None]
    return (pixels.clip(0, 1) * 255 + 0.5).astype(np.uint8), factors


def encode(seed: int, indices: Sequence[int], size: int) -> list[tuple[bytes, int, bytes]]:
    """(JPEG bytes, class, factors as JSON bytes) of the images `indices`."""
    pixels, factors = render(seed, indices, size)
    encoded = []
    for i in range(len(indices)):
        buffer = io.BytesIO()
        Image.fromarray(pixels[i]).save(buffer, "JPEG", quality=JPEG_QUALITY)
        encoded.append((buffer.getvalue(), int(factors.kind[i]), factors.as_json(i)))
    return encoded


def _distance(kind: int, u: Array, v: Array) -> Array:
    """Signed distance to a shape of radius about 1, negative inside."""
    match CLASSES[kind]:
        case "disc":
            return np.hypot(u, v) - np.float32(0.85)
        case "square":
            return np.maximum(np.abs(u), np.abs(v)) - np.float32(0.75)
        case "triangle":
            return np.maximum(np.maximum(-v, 0.866 * u + 0.5 * v), 0.5 * v - 0.866 * u) - np.float32(0.55)
        case "star":
            sector = np.float32(np.pi / 5)
            # In a wider type: numpy's float32 arctan2 gives other bits on processors with AVX-512.
            around = np.arctan2(v.astype(np.longdouble), u.astype(np.longdouble)).astype(np.float32)
            angle = np.abs(np.mod(around, 2 * sector) - sector)
            radius = np.hypot(u, v)
            # The edge from the tip (radius 1.1) to the notch (radius 0.45) in the folded plane.
            tip, notch = np.array([1.1, 0.0]), 0.45 * np.array([np.cos(np.pi / 5), np.sin(np.pi / 5)])
            normal = np.array([notch[1] - tip[1], tip[0] - notch[0]])
            normal = (normal / np.linalg.norm(normal)).astype(np.float32)
            x, y = radius * np.cos(sector - angle), radius * np.sin(sector - angle)
            return (x - np.float32(1.1)) * normal[0] + y * normal[1]
        case "cross":
            a, b = np.abs(u), np.abs(v)
            return np.minimum(np.maximum(a - 1, b - 0.33), np.maximum(a - 0.33, b - 1)).astype(np.float32)
        case "ring":
            return np.abs(np.hypot(u, v) - np.float32(0.75)) - np.float32(0.22)
        case "crescent":
            return np.maximum(np.hypot(u, v) - 0.95, 0.8 - np.hypot(u - 0.5, v)).astype(np.float32)
        case _:
            return np.maximum(np.abs(u) - 1, np.abs(v) - np.float32(0.36)).astype(np.float32)


def _texture(kind: int, u: Array, v: Array, frequency: Array) -> Array:
    """1 where the shape has its own colour, 0 where it is darker."""
    match TEXTURES[kind]:
        case "plain":
            return np.ones_like(u)
        case "stripes":
            return _soft(np.sin(frequency * u))
        case "checker":
            return _soft(np.sin(frequency * u) * np.sin(frequency * v))
        case _:
            return _soft(np.cos(frequency * u) + np.cos(frequency * v) - np.float32(0.8))


def _background(kind: int, along: Array, across: Array, phase: Array, frequency: Array) -> Array:
    """How much of the second colour, in [0, 1]."""
    turn, pace = phase * np.float32(2 * np.pi), frequency * np.float32(np.pi)
    match BACKGROUNDS[kind]:
        case "plain":
            return np.zeros_like(along)
        case "gradient":
            return np.clip(along + np.float32(0.5), 0, 1)
        case "stripes":
            return _soft(np.sin(pace * along + turn))
        case "checker":
            return _soft(np.sin(pace * along + turn) * np.sin(pace * across + turn))
        case _:
            return 0.5 + 0.25 * (np.sin(pace * along + turn) + np.sin(pace * across + 2 * turn))


def _soft(wave: Array) -> Array:
    return np.clip(0.5 + 3 * wave, 0, 1)


def _rgb(hue: Array, saturation: Array, value: Array) -> Array:
    """(n,) each in [0, 1] -> (n, 3)."""
    k = np.mod(np.array([5, 3, 1], dtype=np.float32) + 6 * hue[:, None], 6)
    return (value[:, None] * (1 - saturation[:, None] * np.clip(np.minimum(k, 4 - k), 0, 1))).astype(np.float32)


def _noise(seed: int, indices: Sequence[int], size: int) -> Array:
    """(n, S, S, 3) of unit variance: sums of two random bytes, which are cheap and the same everywhere."""
    key, count = key_of("shapes noise", seed), size * size * 3
    raw = np.stack([words(key, -(-count * 2 // 8), index).view(np.uint8)[: count * 2] for index in indices])
    sums = raw[:, :count].astype(np.int16) + raw[:, count:] - 255
    return (sums.astype(np.float32) / np.float32(104.5)).reshape(len(indices), size, size, 3)
