"""What an augmentation is, drawn before any pixel is touched, in numpy: SimCLR's (Chen et al. 2020, appendix A), and
after it BYOL's solarisation (Grill et al. 2020, appendix B).

`draw` makes the parameters of views from uniform numbers, which are a function of (seed, epoch, sample, view)
(`data.random.view_uniforms`); `crop_box` places a crop.

Legend: n samples, V views of each, P parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import permutations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_ssl.config import ViewPolicy

# The columns of the parameters.
FLIP, JITTER, ORDER, BRIGHTNESS, CONTRAST, SATURATION, HUE, GREY, BLUR, SIGMA, SOLARISE = range(11)
NUM_PARAMETERS = 11
ORDERS = tuple(permutations((BRIGHTNESS, CONTRAST, SATURATION, HUE)))

ATTEMPTS = 10  # of torchvision's RandomResizedCrop to find a crop that fits
RATIOS = (3 / 4, 4 / 3)
SIGMAS = (0.1, 2.0)
NUM_CROP_UNIFORMS = 2 * ATTEMPTS + 2  # two for each attempt, two for the place
NUM_UNIFORMS = NUM_CROP_UNIFORMS + NUM_PARAMETERS  # of a view; what is new comes last, so that old draws stay


def draw(uniforms: NDArray[np.float64], policies: Sequence[ViewPolicy]) -> tuple[Tensor, NDArray[np.float64]]:
    """Uniforms (n, V, 33), policies V -> parameters (n, V, P) float32, and the uniforms (n, V, 22) for `crop_box`."""
    crop, u = uniforms[..., :NUM_CROP_UNIFORMS], uniforms[..., NUM_CROP_UNIFORMS:]
    drawn = np.empty((*u.shape[:2], NUM_PARAMETERS))
    for view, policy in enumerate(policies):
        drawn[:, view] = _draw(u[:, view], policy)
    return torch.from_numpy(drawn.astype(np.float32)), crop


def _draw(u: NDArray[np.float64], policy: ViewPolicy) -> NDArray[np.float64]:
    """Uniforms (n, P) -> parameters (n, P) of one view of each sample."""
    strength, drawn = 0.8 * policy.jitter_strength, np.empty_like(u)
    drawn[:, FLIP] = u[:, FLIP] < policy.flip_probability
    drawn[:, JITTER] = u[:, JITTER] < policy.jitter_probability
    drawn[:, ORDER] = np.floor(u[:, ORDER] * len(ORDERS))
    for factor in (BRIGHTNESS, CONTRAST, SATURATION):
        drawn[:, factor] = 1 + strength * (2 * u[:, factor] - 1)
    drawn[:, HUE] = 0.2 * policy.jitter_strength * (2 * u[:, HUE] - 1)
    drawn[:, GREY] = u[:, GREY] < policy.grey_probability
    drawn[:, BLUR] = u[:, BLUR] < policy.blur_probability
    drawn[:, SIGMA] = SIGMAS[0] + (SIGMAS[1] - SIGMAS[0]) * u[:, SIGMA]
    drawn[:, SOLARISE] = u[:, SOLARISE] < policy.solarise_probability
    return drawn


def crop_box(
    u: NDArray[np.float64], height: int, width: int, min_scale: float, max_scale: float = 1.0
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of torchvision's RandomResizedCrop, from 22 uniforms."""
    for attempt in range(ATTEMPTS):
        area = height * width * (min_scale + (max_scale - min_scale) * float(u[2 * attempt]))
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


def blur_size(size: int) -> int:
    """The blur's kernel: a tenth of the crop, made odd."""
    return 2 * (size // 10 // 2) + 1
