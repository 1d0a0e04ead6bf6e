"""SimCLR's augmentation (Chen et al. 2020, appendix A): drawn per sample and view, applied to a batch.

`draw` fixes every parameter from (seed, epoch, sample, view), wherever and whenever it is called. A worker crops
(`crop_box`), and `augment` does the rest on the training device: flip, colour jitter in the drawn order, grey, blur,
normalise, in torchvision's definitions for float tensors.

Legend: n samples, 2 views each, R = 2n rows, S pixels a side, P parameters.
"""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from dist_ssl.config import AugmentConfig
from dist_ssl.data.random import key_of, philox, uniforms

# The columns of the parameters.
FLIP, JITTER, ORDER, BRIGHTNESS, CONTRAST, SATURATION, HUE, GREY, BLUR, SIGMA = range(10)
NUM_PARAMETERS = 10
ORDERS = tuple(permutations((BRIGHTNESS, CONTRAST, SATURATION, HUE)))

ATTEMPTS = 10  # of torchvision's RandomResizedCrop to find a crop that fits
RATIOS = (3 / 4, 4 / 3)
SIGMAS = (0.1, 2.0)
_WORDS = 32  # random words a view: two for each attempt, two for the place, ten parameters


def draw(
    seed: int, epochs: NDArray[np.int64], sample_ids: NDArray[np.int64], config: AugmentConfig
) -> tuple[Tensor, NDArray[np.float64]]:
    """The augmentation of n samples: parameters (n, 2, P) float32, and uniforms (n, 2, 22) for `crop_box`."""
    n = len(sample_ids)
    counters = np.empty((n, 2, _WORDS // 4, 4), dtype=np.uint64)
    counters[..., 0] = np.arange(_WORDS // 4, dtype=np.uint64)
    counters[..., 1] = np.arange(2, dtype=np.uint64)[:, None]
    counters[..., 2] = np.asarray(sample_ids).astype(np.uint64)[:, None, None]
    counters[..., 3] = np.asarray(epochs).astype(np.uint64)[:, None, None]
    u = uniforms(philox(key_of("augment", seed), counters.reshape(-1, 4))).reshape(n, 2, _WORDS)
    crop, u = u[..., : 2 * ATTEMPTS + 2], u[..., 2 * ATTEMPTS + 2 :]
    strength = 0.8 * config.jitter_strength
    drawn = np.empty((n, 2, NUM_PARAMETERS))
    drawn[..., FLIP] = u[..., FLIP] < config.flip_probability
    drawn[..., JITTER] = u[..., JITTER] < config.jitter_probability
    drawn[..., ORDER] = np.floor(u[..., ORDER] * len(ORDERS))
    for factor in (BRIGHTNESS, CONTRAST, SATURATION):
        drawn[..., factor] = 1 + strength * (2 * u[..., factor] - 1)
    drawn[..., HUE] = 0.2 * config.jitter_strength * (2 * u[..., HUE] - 1)
    drawn[..., GREY] = u[..., GREY] < config.grey_probability
    drawn[..., BLUR] = u[..., BLUR] < config.blur_probability
    drawn[..., SIGMA] = SIGMAS[0] + (SIGMAS[1] - SIGMAS[0]) * u[..., SIGMA]
    return torch.from_numpy(drawn.astype(np.float32)), crop


def crop_box(u: NDArray[np.float64], height: int, width: int, min_scale: float) -> tuple[int, int, int, int]:
    """(top, left, height, width) of torchvision's RandomResizedCrop, from 22 uniforms."""
    for attempt in range(ATTEMPTS):
        area = height * width * (min_scale + (1 - min_scale) * float(u[2 * attempt]))
        ratio = math.exp(math.log(RATIOS[0]) + math.log(RATIOS[1] / RATIOS[0]) * float(u[2 * attempt + 1]))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(u[-2] * (height - h + 1)), int(u[-1] * (width - w + 1)), h, w
    # No attempt fits a very long image: the largest centred crop of an allowed ratio.
    h, w = height, width
    if width / height < RATIOS[0]:
        h = round(w / RATIOS[0])
    elif width / height > RATIOS[1]:
        w = round(h * RATIOS[1])
    return (height - h) // 2, (width - w) // 2, h, w


def augment(crops_u8: Tensor, parameters: Tensor, config: AugmentConfig) -> Tensor:
    """uint8 crops (n, 2, 3, S, S) on any device, parameters (n, 2, P) on the CPU -> float32 views, normalised.

    On the CPU rows go through in blocks that stay in a core's cache; on a GPU all at once.
    """
    rows_u8, drawn = crops_u8.flatten(0, 1), parameters.flatten(0, 1).cpu()
    views = torch.empty(rows_u8.shape, dtype=torch.float32, device=crops_u8.device)
    at_once = len(rows_u8) if crops_u8.is_cuda else max(1, 2**16 // rows_u8.shape[-1] ** 2)
    for start in range(0, len(rows_u8), at_once):
        rows = slice(start, start + at_once)
        views[rows] = _augment_rows(rows_u8[rows], drawn[rows], config)
    return views.view(crops_u8.shape)


def normalize(images_u8: Tensor, config: AugmentConfig) -> Tensor:
    """uint8 (..., 3, S, S) -> float32, scaled to [0, 1], then by the config's mean and standard deviation."""
    return _normalize(images_u8.to(torch.float32).mul_(1 / 255), config)


def _normalize(x: Tensor, config: AugmentConfig) -> Tensor:
    mean = torch.tensor(config.mean, device=x.device).view(3, 1, 1)
    std = torch.tensor(config.std, device=x.device).view(3, 1, 1)
    return x.sub_(mean).div_(std)


def _augment_rows(rows_u8: Tensor, drawn: Tensor, config: AugmentConfig) -> Tensor:
    x = rows_u8.to(torch.float32).mul_(1 / 255)
    rows = drawn[:, FLIP].nonzero().flatten()
    if len(rows):
        x[rows] = x[rows].flip(-1)
    orders = torch.where(drawn[:, JITTER] > 0, drawn[:, ORDER], -1)
    for order in orders.unique().tolist():
        if order >= 0:
            rows = (orders == order).nonzero().flatten()
            x[rows] = _jitter(x[rows], ORDERS[int(order)], drawn[rows].to(x.device)[:, :, None, None, None])
    rows = drawn[:, GREY].nonzero().flatten()
    if len(rows):
        x[rows] = _grey(x[rows]).expand(-1, 3, -1, -1)
    rows = drawn[:, BLUR].nonzero().flatten()
    if len(rows) and blur_size(x.shape[-1]) > 1:
        x[rows] = _blur(x[rows], drawn[rows, SIGMA].to(x.device))
    return _normalize(x, config)


def _jitter(x: Tensor, order: tuple[int, ...], drawn: Tensor) -> Tensor:
    """(R, 3, S, S) with the factors of (R, P, 1, 1, 1), in the given order of operations."""
    for operation in order:
        factor = drawn[:, operation]
        if operation == BRIGHTNESS:
            x = (x * factor).clamp_(0, 1)
        elif operation == CONTRAST:
            x = _blend(x, _grey(x).mean(dim=(1, 2, 3), keepdim=True), factor)
        elif operation == SATURATION:
            x = _blend(x, _grey(x), factor)
        else:
            x = _shift_hue(x, factor)
    return x


def _blend(x: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return (x * factor).add_(other * (1 - factor)).clamp_(0, 1)


def _grey(x: Tensor) -> Tensor:
    """(R, 3, S, S) -> (R, 1, S, S): luma of ITU-R BT.601, torchvision's weights."""
    return (x[:, 0:1] * 0.2989).add_(x[:, 1:2] * 0.587).add_(x[:, 2:3] * 0.114)


def _shift_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Rotate the hue of HSV by `shift` turns, closed form: f(n) = V - C max(0, min(k, 4 - k, 1)), k = n + 6H mod 6."""
    red, green, blue = x.unbind(dim=1)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    divisor = torch.where(chroma == 0, 1, chroma)
    sextants = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, (blue - red) / divisor + 2, (red - green) / divisor + 4),
    )
    sextants += 6 * shift[:, 0]
    channels = []
    for n in (5, 3, 1):
        k = (sextants + n).remainder_(6)
        channels.append(value - torch.minimum(k, 4 - k).clamp_(0, 1).mul_(chroma))
    return torch.stack(channels, dim=1)


def blur_size(size: int) -> int:
    """The blur's kernel: a tenth of the crop, made odd."""
    return 2 * (size // 10 // 2) + 1


def _blur(x: Tensor, sigmas: Tensor) -> Tensor:
    """Gaussian blur of (R, 3, S, S) with (R,) sigmas: two passes, reflecting at the edges."""
    rows, _, size, _ = x.shape
    radius = blur_size(size) // 2
    steps = torch.arange(-radius, radius + 1, dtype=torch.float32, device=x.device)
    kernel = torch.exp(-0.5 * (steps / sigmas[:, None]).square())
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).repeat_interleave(3, dim=0)[:, None]
    planes = F.pad(x, (radius, radius, radius, radius), mode="reflect").view(1, rows * 3, size + 2 * radius, -1)
    planes = F.conv2d(planes, kernel[:, :, None, :], groups=rows * 3)
    return F.conv2d(planes, kernel[:, :, :, None], groups=rows * 3).view(rows, 3, size, size)
