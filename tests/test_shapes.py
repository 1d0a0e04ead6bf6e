"""The rendered source: deterministic, its factors true, hard for pixels and not for eyes."""

from __future__ import annotations

import colorsys
import io
import json

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression

from dist_ssl.data import shapes


def test_an_image_depends_on_seed_and_index_only() -> None:
    whole, factors = shapes.render(3, range(50), 32)
    assert whole.shape == (50, 32, 32, 3)
    some, of_some = shapes.render(3, [49, 7], 32)
    assert np.array_equal(some, whole[[49, 7]])
    assert of_some.hue.tolist() == factors.hue[[49, 7]].tolist()
    assert not np.array_equal(shapes.render(4, range(50), 32)[0], whole)
    assert shapes.encode(3, [7], 32) == [shapes.encode(3, range(50), 32)[7]]


@pytest.mark.parametrize("size", [8, 33, 128])
def test_any_size(size: int) -> None:
    (image, label, factors), *_ = shapes.encode(0, range(3), size)
    assert Image.open(io.BytesIO(image)).size == (size, size)
    assert json.loads(factors)["class"] == label


def test_factors_are_complete_and_cover_their_range() -> None:
    factors = shapes.draw_factors(0, range(4000))
    values = json.loads(factors.as_json(5))
    assert set(values) == {
        "class", "hue", "rotation", "texture", "background", "position_x", "position_y", "scale", "noise",
    }  # fmt: skip
    assert all(isinstance(values[name], int) for name in ("class", "texture", "background"))
    for drawn, kinds in ((factors.kind, 8), (factors.texture, 4), (factors.background, 5)):
        counts = np.bincount(drawn, minlength=kinds)
        assert len(counts) == kinds
        assert counts.min() > 0.8 * 4000 / kinds
    for drawn, low, high in (
        (factors.hue, 0, 1), (factors.rotation, 0, 2 * np.pi), (factors.position_x, 0.35, 0.65),
        (factors.scale, 0.22, 0.38), (factors.noise, 0, shapes.LARGEST_NOISE),
    ):  # fmt: skip
        assert low <= drawn.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < drawn.max() <= high


@pytest.mark.slow
def test_factors_tell_what_is_in_the_picture() -> None:
    """On plain shapes without noise: the place, the hue and the area that the pixels show."""
    pixels, factors = shapes.render(0, range(3000), 64)
    plain = np.flatnonzero(
        (factors.kind == 0) & (factors.texture == 0) & (factors.background == 0) & (factors.noise < 0.03)
    )
    assert len(plain) >= 2
    for i in plain:
        image = pixels[i].astype(float)
        shape = np.abs(image - image[0, 0]).sum(axis=2) > 120
        y, x = np.nonzero(shape)
        assert abs((x.mean() + 0.5) / 64 - factors.position_x[i]) < 0.02
        assert abs((y.mean() + 0.5) / 64 - factors.position_y[i]) < 0.02
        radius = 0.85 * factors.scale[i] * 64
        assert abs(shape.sum() / (np.pi * radius**2) - 1) < 0.1
        red, green, blue = image[shape].mean(axis=0) / 255
        difference = abs(colorsys.rgb_to_hsv(red, green, blue)[0] - factors.hue[i])
        assert min(difference, 1 - difference) < 0.04


def test_a_linear_probe_on_pixels_is_poor() -> None:
    """Below 45% of 8 classes, so that what an encoder learned shows."""
    pixels, factors = shapes.render(0, range(4000), 32)
    x = pixels.reshape(4000, -1).astype(np.float32) / 255 - 0.5
    probe = LogisticRegression(C=0.01, max_iter=150, tol=1e-3).fit(x[:3000], factors.kind[:3000])
    accuracy = probe.score(x[3000:], factors.kind[3000:])
    print(f"linear probe on pixels: {accuracy:.3f}")
    assert accuracy < 0.45
