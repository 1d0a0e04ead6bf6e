"""SimCLR's augmentation (Chen et al. 2020, appendix A): drawn per sample and view, applied to a batch.

`draw` fixes every parameter from (seed, epoch, sample, view), wherever and whenever it is called. A worker crops
(`crop_box`), and `augment` does the rest on the training device: flip, colour jitter in the drawn order, grey, blur,
normalise, in torchvision's definitions for float tensors. A row's pixels are the same bits in whatever batch it
stands and however many threads compute it: operations are elementwise, or sums whose order does not matter.

On CUDA all rows go through two kernels at once (`augment_triton`). Elsewhere rows that share flip and order of jitter
go through together, in place, as many as stay in a core's cache.

Legend: n samples, 2 views each, R rows (n times 2), S pixels a side, P parameters.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from functools import lru_cache
from itertools import permutations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from dist_ssl.config import AugmentConfig
from dist_ssl.data.random import key_of, philox, uniforms

# The columns of the parameters.
FLIP, JITTER, ORDER, BRIGHTNESS, CONTRAST, SATURATION, HUE, GREY, BLUR, SIGMA = range(10)
NUM_PARAMETERS = 10
ORDERS = tuple(permutations((BRIGHTNESS, CONTRAST, SATURATION, HUE)))

HAS_TRITON = importlib.util.find_spec("triton") is not None
ATTEMPTS = 10  # of torchvision's RandomResizedCrop to find a crop that fits
RATIOS = (3 / 4, 4 / 3)
SIGMAS = (0.1, 2.0)
CACHED_PIXELS = 2**16  # rows of a block on a CPU: with its scratch space it should fit in a core's second-level cache
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
    """uint8 crops (n, 2, 3, S, S) on any device, parameters (n, 2, P) -> float32 views like the crops, normalised.

    Parameters are read on the host: keep them on the CPU, or this waits for the device.
    """
    rows_u8, drawn = crops_u8.flatten(0, 1), parameters.flatten(0, 1).cpu()
    device, size = crops_u8.device, crops_u8.shape[-1]
    if _has_kernels(crops_u8):
        from dist_ssl.data import augment_triton  # torch's builds without CUDA bring no triton

        views = augment_triton.colours(rows_u8, drawn, config)
        _blur_rows(views, drawn)  # after the normalisation, with which it commutes
        return views.view(crops_u8.shape)
    largest = max(1, CACHED_PIXELS // size**2)
    std = torch.tensor(config.std, device=device).view(3, 1, 1)
    scale, shift = 1 / std, torch.tensor(config.mean, device=device).view(3, 1, 1) / -std
    # numpy asks the kernel for huge pages, whose first touch costs a fifth: half a millisecond an image.
    views = torch.from_numpy(np.empty(rows_u8.shape, np.float32)).to(device)
    scratch = torch.empty((3, min(largest, len(rows_u8)), 3, size, size), dtype=torch.float32, device=device)
    for rows in _blocks(drawn, largest):
        of_rows = drawn[rows]
        x, spare, other = scratch[:, : len(rows)].unbind()
        alone = int(rows[0]) if len(rows) == 1 else None
        if alone is None:
            block = rows_u8[rows.to(device)]
        else:
            block, x = rows_u8[alone : alone + 1], views[alone : alone + 1]
        x.copy_(block.flip(-1) if of_rows[0, FLIP] else block).mul_(1 / 255)
        if of_rows[0, JITTER]:
            _jitter(x, ORDERS[int(of_rows[0, ORDER])], of_rows, spare, other)
        grey = of_rows[:, GREY].nonzero().flatten().tolist()
        if grey:
            luma = _grey(x, spare, other)
            for i in grey:
                x[i].copy_(luma[i])
        _blur_rows(x, of_rows)
        x.mul_(scale).add_(shift)
        if alone is None:
            views[rows.to(device)] = x
    return views.view(crops_u8.shape)


def _has_kernels(crops_u8: Tensor) -> bool:
    return crops_u8.is_cuda and HAS_TRITON


def normalize(images_u8: Tensor, config: AugmentConfig) -> Tensor:
    """uint8 (..., 3, S, S) -> float32, scaled to [0, 1], then by the config's mean and standard deviation."""
    device = images_u8.device
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (config.mean, config.std))
    return images_u8.to(torch.float32).mul_(1 / 255).sub_(mean).div_(std)


def _blocks(drawn: Tensor, largest: int) -> Iterator[Tensor]:
    """Rows of (R, P) that share flip and order of jitter, up to `largest` at a time."""
    kinds = (drawn[:, ORDER] + 1) * drawn[:, JITTER] * 2 + drawn[:, FLIP]
    _, counts = kinds.unique(return_counts=True)
    for rows in kinds.argsort(stable=True).split(counts.tolist()):
        yield from rows.split(largest)


def _jitter(x: Tensor, order: tuple[int, ...], drawn: Tensor, spare: Tensor, other: Tensor) -> None:
    """Colour jitter of (R, 3, S, S) by the factors of (R, P), in place, in the given order of operations."""
    factors = drawn.to(x.device)[:, :, None, None, None]
    for operation in order:
        factor = factors[:, operation]
        if operation == BRIGHTNESS:
            x.mul_(factor).clamp_(0, 1)
        elif operation == CONTRAST:
            mean = _mean(_grey(x, spare, other)).mul_(1 - factor)
            x.mul_(factor).add_(mean).clamp_(0, 1)
        elif operation == SATURATION:
            luma = _grey(x, spare, other).mul_(1 - factor)
            x.mul_(factor).add_(luma).clamp_(0, 1)
        else:
            _shift_hue(x, factor, spare, other)


def _mean(luma: Tensor) -> Tensor:
    """(R, 1, S, S) in [0, 1] -> (R, 1, 1, 1), the same bits whatever the order of summation.

    Adding 8 rounds float32 to multiples of 2^-20, whose sums are exact in float64. torch sums rows in an order that
    depends on threads and on how many rows there are.
    """
    rounded = luma.add_(8.0).sub_(8.0)
    total = rounded.sum(dim=(1, 2, 3), keepdim=True, dtype=torch.float64)
    return (total / luma[0].numel()).to(torch.float32)


def _grey(x: Tensor, spare: Tensor, other: Tensor) -> Tensor:
    """(R, 3, S, S) -> (R, 1, S, S): luma of ITU-R BT.601, torchvision's weights. In the first plane of `spare`."""
    luma, product = spare[:, 0:1], other[:, 0:1]
    torch.mul(x[:, 0:1], 0.2989, out=luma)
    luma.add_(torch.mul(x[:, 1:2], 0.587, out=product))
    return luma.add_(torch.mul(x[:, 2:3], 0.114, out=product))


def _shift_hue(x: Tensor, shift: Tensor, spare: Tensor, other: Tensor) -> None:
    """Rotate the hue of HSV by `shift` turns, in place and in closed form.

    With V the largest channel, C the chroma and H the hue in [0, 6): red is V - 2 C + C clamp(|H - 3|, 1, 2), green
    and blue are V + C - C clamp(|H - 2|, 1, 2) and the same with 4.
    """
    red, green, blue = x.unbind(dim=1)
    value, chroma, hue = spare.unbind(dim=1)
    a, b, is_largest = other.unbind(dim=1)
    torch.maximum(torch.maximum(red, green, out=value), blue, out=value)
    torch.sub(value, torch.minimum(torch.minimum(red, green, out=a), blue, out=a), out=chroma)
    # C H: g - b where red is largest, else 2 C + b - r where green is, else 4 C + r - g.
    torch.sub(red, green, out=hue).add_(torch.mul(chroma, 4.0, out=a))
    torch.sub(blue, red, out=b).add_(torch.mul(chroma, 2.0, out=a)).sub_(hue)
    is_largest.copy_(green).eq_(value)
    hue.add_(b.mul_(is_largest))
    torch.sub(green, blue, out=b).sub_(hue)
    is_largest.copy_(red).eq_(value)
    hue.add_(b.mul_(is_largest))
    # Where C is 0 so is the numerator: any divisor gives no hue, and the chroma takes away what is made of it.
    torch.add(value, chroma, out=b)
    chroma.mul_(6.0)
    # From here on the hue is in turns, made positive first so that its fraction is all that a rotation leaves.
    hue.div_(torch.clamp(chroma, min=1e-12, out=a)).add_(1 + shift[:, 0]).frac_()
    for channel, centre in ((green, 2 / 6), (blue, 4 / 6)):
        torch.sub(b, torch.sub(hue, centre, out=a).abs_().clamp_(1 / 6, 2 / 6).mul_(chroma), out=channel)
    a = torch.sub(hue, 3 / 6, out=a).abs_().sub_(2 / 6).clamp_(-1 / 6, 0).mul_(chroma)
    torch.add(value, a, out=red)


def blur_size(size: int) -> int:
    """The blur's kernel: a tenth of the crop, made odd."""
    return 2 * (size // 10 // 2) + 1


def _blur_rows(x: Tensor, drawn: Tensor) -> None:
    """Gaussian blur of the rows of (R, 3, S, S) that are to be blurred, in place, reflecting at the edges."""
    rows = drawn[:, BLUR].nonzero().flatten()
    if not len(rows) or blur_size(x.shape[-1]) == 1:
        return
    if x.is_cuda:
        chosen = rows.to(x.device)
        x[chosen] = blur_by_matrices(x[chosen], drawn[rows, SIGMA].to(x.device))
        return
    for row in rows.tolist():
        x[row] = _blur_by_convolution(x[row : row + 1], float(drawn[row, SIGMA]))


def _blur_by_convolution(x: Tensor, sigma: float) -> Tensor:
    """(1, 3, S, S) -> (3, S, S). Beyond 4.5 sigma lie 7e-6 of the weights: left out, which saves half of the work.

    Every line is a channel of its own: three times S short convolutions take half the time of three large ones.
    """
    size = x.shape[-1]
    radius = min(blur_size(size) // 2, int(4.5 * sigma) + 1)
    steps = torch.arange(-radius, radius + 1, dtype=torch.float32)
    weights = torch.exp(-0.5 * (steps / sigma).square())
    along = (weights / weights.sum()).expand(3 * size, 1, 1, -1)
    for _ in range(2):  # rows, then columns as rows of the transposed image
        lines = functional.pad(x, (radius, radius, 0, 0), "reflect").reshape(1, 3 * size, 1, -1)
        x = functional.conv2d(lines, along, groups=3 * size).view(1, 3, size, size).mT
    return x[0]


def blur_by_matrices(x: Tensor, sigmas: Tensor) -> Tensor:
    """(R, 3, S, S), (R,) sigmas -> blurred, as two batched matrix products, which a GPU does at once."""
    taps = _taps(x.shape[-1]).to(x.device)
    steps = torch.arange(len(taps), dtype=torch.float32, device=x.device) - len(taps) // 2
    kernels = torch.exp(-0.5 * (steps / sigmas[:, None]).square())
    kernels = kernels / kernels.sum(dim=1, keepdim=True)
    matrices = (kernels @ taps.flatten(1)).view(-1, 1, *taps.shape[1:])
    return matrices @ x @ matrices.mT


@lru_cache(maxsize=4)
def _taps(size: int) -> Tensor:
    """(k, S, S): entry (t, i, j) is 1 where tap t of the blur at pixel i reads pixel j."""
    radius = blur_size(size) // 2
    i = torch.arange(size)
    taps = torch.zeros(2 * radius + 1, size, size)
    for t in range(2 * radius + 1):
        j = (i + t - radius).abs()
        taps[t, i, torch.minimum(j, 2 * (size - 1) - j)] = 1.0
    return taps
