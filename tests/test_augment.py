"""Augmentation against torchvision's functional operations, and numpy's Philox as the oracle of ours."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as F

from dist_ssl.augment import augment, crop_box, normalize
from dist_ssl.augment import parameters as A
from dist_ssl.config import AugmentConfig
from dist_ssl.data.decode import crop_and_resize
from dist_ssl.data.random import key_of, permutation, philox, uniforms, words
from dist_ssl.data.stream import draw_views


def reference(crop_u8: torch.Tensor, drawn: torch.Tensor, config: AugmentConfig) -> torch.Tensor:
    """One view by torchvision's operations on a float tensor (3, S, S)."""
    x = crop_u8.float() / 255
    if drawn[A.FLIP]:
        x = F.hflip(x)
    if drawn[A.JITTER]:
        operations = {
            A.BRIGHTNESS: F.adjust_brightness,
            A.CONTRAST: F.adjust_contrast,
            A.SATURATION: F.adjust_saturation,
            A.HUE: F.adjust_hue,
        }
        for operation in A.ORDERS[int(drawn[A.ORDER])]:
            x = operations[operation](x, float(drawn[operation]))
    if drawn[A.GREY]:
        x = F.rgb_to_grayscale(x, 3)
    if drawn[A.BLUR]:
        size = A.blur_size(x.shape[-1])
        x = F.gaussian_blur(x, [size, size], [float(drawn[A.SIGMA])] * 2)
    if drawn[A.SOLARISE]:
        x = F.solarize(x, 0.5)
    return F.normalize(x, list(config.mean), list(config.std))


def photographs(n: int, size: int) -> torch.Tensor:
    """Crops with smooth parts, edges, saturated and grey pixels."""
    generator = torch.Generator().manual_seed(size)
    smooth = torch.nn.functional.interpolate(torch.rand(n * 2, 3, 5, 5, generator=generator), size=size, mode="bicubic")
    noise = torch.rand(n * 2, 3, size, size, generator=generator) * 0.2
    crops = ((smooth * 1.4 - 0.2 + noise).clamp(0, 1) * 255).to(torch.uint8).view(n, 2, 3, size, size)
    crops[0, 0] = crops[0, 0, :1]  # grey: hue is not defined
    crops[1, 0, :, : size // 2] = 255
    return crops


@pytest.mark.parametrize("size", [32, 65, 224])
def test_augment_is_torchvisions(size: int) -> None:
    config = AugmentConfig(crop_size=size, solarise_probability=0.3)
    n = 24 if size < 100 else 12
    crops = photographs(n, size)
    drawn, _ = draw_views(3, np.zeros(n, np.int64), np.arange(n), config)
    views = augment(crops, drawn, config)
    std = torch.tensor(config.std).view(3, 1, 1)
    for i in range(n):
        for view in range(2):
            difference = (views[i, view] - reference(crops[i, view], drawn[i, view], config)) * std
            assert difference.abs().max() <= 1 / 255, (i, view, drawn[i, view])
            assert difference.abs().mean() <= 1e-5


def test_every_order_of_jitter_and_every_extreme() -> None:
    config = AugmentConfig(crop_size=32)
    crops = photographs(24, 32)
    drawn, _ = draw_views(0, np.zeros(24, np.int64), np.arange(24), config)
    drawn[:, :, A.JITTER], drawn[:, :, A.GREY], drawn[:, :, A.BLUR] = 1, 0, 0
    drawn[:, :, A.ORDER] = torch.arange(24)[:, None]
    drawn[:, 0, A.BRIGHTNESS], drawn[:, 0, A.CONTRAST], drawn[:, 0, A.SATURATION] = 1.8, 0.2, 0.0
    drawn[:, 0, A.HUE] = -0.2
    views = augment(crops, drawn, config)
    std = torch.tensor(config.std).view(3, 1, 1)
    for i in range(24):
        for view in range(2):
            difference = (views[i, view] - reference(crops[i, view], drawn[i, view], config)) * std
            assert difference.abs().max() <= 1 / 255


def test_pixels_do_not_depend_on_the_batch_or_threads() -> None:
    config = AugmentConfig(crop_size=224)
    crops = photographs(6, 224)
    drawn, _ = draw_views(5, np.zeros(6, np.int64), np.arange(6), config)
    views = augment(crops, drawn, config)
    alone = torch.cat([augment(crops[i : i + 1], drawn[i : i + 1], config) for i in range(6)])
    assert torch.equal(views, alone)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(threads, 2))
        assert torch.equal(views, augment(crops, drawn, config))
    finally:
        torch.set_num_threads(threads)
    small = AugmentConfig(crop_size=40)
    crops, (drawn, _) = photographs(40, 40), draw_views(5, np.zeros(40, np.int64), np.arange(40), small)
    alone = torch.cat([augment(crops[i : i + 1], drawn[i : i + 1], small) for i in range(40)])
    assert torch.equal(augment(crops, drawn, small), alone)


def test_augment_leaves_its_input_alone() -> None:
    config = AugmentConfig(crop_size=32)
    crops = photographs(8, 32)
    before = crops.clone()
    drawn, _ = draw_views(0, np.zeros(8, np.int64), np.arange(8), config)
    augment(crops, drawn, config)
    assert torch.equal(crops, before)


def test_draws_are_keyed_by_seed_epoch_sample_and_view() -> None:
    config = AugmentConfig()
    epochs, ids = np.array([0, 0, 1, 2**40]), np.array([5, 6, 5, 2**50])
    drawn, crops = draw_views(7, epochs, ids, config)
    again, crops_again = draw_views(7, epochs[::-1].copy(), ids[::-1].copy(), config)
    assert torch.equal(drawn, again.flip(0))
    assert np.array_equal(crops, crops_again[::-1])
    rows = {tuple(row) for row in drawn.flatten(0, 1)[:, A.BRIGHTNESS :].tolist()}
    assert len(rows) == 8
    other, _ = draw_views(8, epochs, ids, config)
    assert not torch.equal(drawn, other)


def test_distributions_of_the_draws() -> None:
    config = AugmentConfig(jitter_strength=0.5, solarise_probability=0.2)
    n = 20_000
    drawn, _ = draw_views(0, np.zeros(n, np.int64), np.arange(n), config)
    rows = drawn.flatten(0, 1).double()
    for column, probability in ((A.FLIP, 0.5), (A.JITTER, 0.8), (A.GREY, 0.2), (A.BLUR, 0.5), (A.SOLARISE, 0.2)):
        assert abs(rows[:, column].mean() - probability) < 0.012
    for column in (A.BRIGHTNESS, A.CONTRAST, A.SATURATION):
        assert 0.6 <= rows[:, column].min() < 0.61
        assert 1.39 < rows[:, column].max() <= 1.4
        assert abs(rows[:, column].mean() - 1) < 0.01
    assert abs(rows[:, A.HUE]).max() <= 0.1
    assert rows[:, A.SIGMA].min() >= 0.1
    assert rows[:, A.SIGMA].max() <= 2.0
    counts = torch.bincount(rows[:, A.ORDER].long(), minlength=24)
    assert counts.min() > 0.85 * 2 * n / 24
    # No column follows from another: each is a word of its own.
    correlations = torch.corrcoef(rows.T) - torch.eye(A.NUM_PARAMETERS, dtype=torch.float64)
    assert correlations.abs().max() < 0.03


def test_crop_boxes_are_random_resized_crops() -> None:
    n, height, width = 4000, 375, 500
    _, u = draw_views(1, np.zeros(n, np.int64), np.arange(n), AugmentConfig())
    boxes = np.array([crop_box(one, height, width, 0.08) for one in u.reshape(-1, u.shape[-1])])
    top, left, h, w = boxes.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + h <= height).all()
    assert (left + w <= width).all()
    areas, ratios = h * w / (height * width), w / h
    assert areas.min() >= 0.075
    assert areas.max() > 0.9
    assert ((ratios > 0.72) & (ratios < 1.37)).all()
    # torchvision's own, drawn by its own generator, has the same moments.
    torch.manual_seed(0)
    from torchvision.transforms import RandomResizedCrop

    theirs = np.array(
        [RandomResizedCrop.get_params(torch.empty(3, height, width), [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(8000)]
    )
    for ours, other in zip(boxes.T, theirs.T, strict=True):
        assert abs(ours.mean() - other.mean()) < 4 * math.hypot(ours.std(), other.std()) / math.sqrt(8000)
        assert abs(ours.std() / other.std() - 1) < 0.05


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 500), (500, 1), (8, 300), (2, 3)])
def test_crop_box_of_long_and_tiny_images(height: int, width: int) -> None:
    _, u = draw_views(1, np.zeros(50, np.int64), np.arange(50), AugmentConfig())
    for one in u.reshape(-1, u.shape[-1]):
        top, left, h, w = crop_box(one, height, width, 0.08)
        assert 0 <= top <= top + h <= height
        assert 0 <= left <= left + w <= width
        assert h > 0
        assert w > 0


def test_crop_and_resize_is_torchvisions() -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (375, 500, 3), dtype=np.uint8))
    for box in ((10, 20, 300, 400), (0, 0, 375, 500), (100, 100, 40, 50), (374, 499, 1, 1)):
        ours = torch.from_numpy(crop_and_resize(image, box, 224).copy())
        theirs = F.pil_to_tensor(F.resized_crop(image, *box, [224, 224], F.InterpolationMode.BILINEAR))
        assert (ours.int() - theirs.int()).abs().max() <= 1


def test_normalize() -> None:
    config = AugmentConfig()
    images = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    expected = F.normalize(images.float() / 255, list(config.mean), list(config.std))
    assert torch.allclose(normalize(images, config), expected, atol=1e-5)


def test_philox_is_numpys() -> None:
    rng = np.random.default_rng(0)
    counters = rng.integers(0, 2**64, (20, 4), dtype=np.uint64)
    counters[0], counters[1] = 2**64 - 1, [1, 0, 0, 0]
    key = key_of("test", 1)
    ours = philox(key, counters)
    for row, counter in zip(ours, counters, strict=True):
        number = sum(int(word) << 64 * i for i, word in enumerate(counter))
        theirs = np.random.Philox(key=key[0] | key[1] << 64, counter=(number - 1) % 2**256).random_raw(4)
        assert np.array_equal(row, theirs)


def test_random_streams_never_change() -> None:
    """Golden numbers: a run that resumes on another version must draw the same."""
    key = key_of("golden", 0)
    assert words(key, 2, 1, 2, 3).tolist() == GOLDEN_WORDS
    assert permutation(key, 8, 1, 2, 3).tolist() == GOLDEN_PERMUTATION
    assert sorted(permutation(key, 1000, 1)) == list(range(1000))
    drawn, crop = draw_views(0, np.array([3]), np.array([12345]), AugmentConfig())
    assert drawn[0, 1].tolist() == pytest.approx(GOLDEN_DRAW, abs=1e-6)
    assert crop[0, 1, :2].tolist() == pytest.approx(GOLDEN_CROP, abs=1e-12)
    assert uniforms(np.array([0, 2**64 - 1], dtype=np.uint64)).tolist() == [0.0, 1 - 2**-53]


GOLDEN_WORDS = [5954306429151549407, 6094073510939664177]
GOLDEN_PERMUTATION = [3, 7, 2, 4, 0, 1, 5, 6]
GOLDEN_DRAW = [0.0, 1.0, 23.0, 0.2957953, 0.612433, 1.5537885, -0.1418158, 0.0, 1.0, 0.8463488, 0.0]
GOLDEN_CROP = [0.08717528887669246, 0.576776057693189]
