"""Flip, colour jitter, grey and normalisation of uint8 crops as two Triton kernels: what `augment` does, for CUDA.

Every row has its own order of operations: a program works on one row, so that the order is a branch which its threads
take together. The contrast needs the mean luma of its image as it is at that point, so a first launch makes that, as
whole numbers, whose sums are the same in any order; a second makes the views, all rows at once. The blur comes after
the normalisation, with which it commutes (its weights add up to one), as two batched products of matrices.

Legend: R rows (views), S pixels a side, P parameters, T tiles of a row.
"""

# mypy: disable-error-code="no-untyped-def"
# (a kernel's arguments are pointers, numbers of the device and constants of the compiler)
from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from dist_ssl.augment import parameters as columns
from dist_ssl.config import AugmentConfig

BLOCK = 1024  # pixels of a program
ONE = tl.constexpr(2**20)  # a luma of 1 in the whole numbers that are summed: the CPU's rounding

_FLIP, _GREY = tl.constexpr(columns.FLIP), tl.constexpr(columns.GREY)
_BRIGHTNESS, _CONTRAST = tl.constexpr(columns.BRIGHTNESS), tl.constexpr(columns.CONTRAST)
_SATURATION, _HUE = tl.constexpr(columns.SATURATION), tl.constexpr(columns.HUE)
_STEPS = tl.constexpr(columns.NUM_PARAMETERS)  # four more columns: the operations of a row in their order, 0 for none
_WIDTH = tl.constexpr(columns.NUM_PARAMETERS + 4)


def colours(rows_u8: Tensor, drawn: Tensor, config: AugmentConfig) -> Tensor:
    """uint8 (R, 3, S, S) on a device, parameters (R, P) on the CPU -> float32 (R, 3, S, S), normalised and blurred."""
    rows_u8 = rows_u8.contiguous()
    device, size = rows_u8.device, rows_u8.shape[-1]
    steps = torch.tensor(columns.ORDERS)[drawn[:, columns.ORDER].long()] * drawn[:, columns.JITTER, None]
    table = torch.cat([drawn, steps], dim=1).to(device, non_blocking=True)
    views = torch.empty(rows_u8.shape, dtype=torch.float32, device=device)
    grid = (len(rows_u8), triton.cdiv(size**2, BLOCK))
    sums = torch.empty(grid, dtype=torch.int64, device=device)
    _luma_sums[grid](rows_u8, table, sums, size, BLOCK=BLOCK)
    means = (sums.sum(dim=1).double() / (ONE.value * size**2)).float()
    scale = [1 / std for std in config.std]
    shift = [-mean / std for mean, std in zip(config.mean, config.std, strict=True)]
    _colours[grid](rows_u8, table, means, views, size, *scale, *shift, BLOCK=BLOCK)
    blurred = drawn[:, columns.BLUR].nonzero().flatten()
    if len(blurred) and columns.blur_size(size) > 1:
        chosen = blurred.to(device)
        views[chosen] = blur_by_matrices(views[chosen], drawn[blurred, columns.SIGMA].to(device))
    return views


@triton.jit
def _load(crops, table, pixels, S):
    """Red, green and blue of some pixels of this program's row, in [0, 1], flipped where the row is."""
    row = tl.program_id(0)
    x = pixels % S
    x = tl.where(tl.load(table + row * _WIDTH + _FLIP) > 0, S - 1 - x, x)
    place = crops + row.to(tl.int64) * 3 * S * S + pixels // S * S + x
    inside = pixels < S * S
    red = tl.load(place, mask=inside, other=0).to(tl.float32) * (1 / 255)
    green = tl.load(place + S * S, mask=inside, other=0).to(tl.float32) * (1 / 255)
    blue = tl.load(place + 2 * S * S, mask=inside, other=0).to(tl.float32) * (1 / 255)
    return red, green, blue


@triton.jit
def _luma(red, green, blue):
    return red * 0.2989 + green * 0.587 + blue * 0.114


@triton.jit
def _clamp(x):
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def _shift_hue(red, green, blue, shift):
    """As `augment._shift_hue`."""
    value = tl.maximum(tl.maximum(red, green), blue)
    chroma = value - tl.minimum(tl.minimum(red, green), blue)
    hue = tl.where(green == value, 2 * chroma + blue - red, 4 * chroma + red - green)
    hue = tl.where(red == value, green - blue, hue) / tl.maximum(chroma, 1e-12) + 6 * shift
    hue -= tl.floor(hue * (1 / 6)) * 6
    red = value + chroma * (tl.minimum(tl.maximum(tl.abs(hue - 3), 1.0), 2.0) - 2)
    green = value + chroma - chroma * tl.minimum(tl.maximum(tl.abs(hue - 2), 1.0), 2.0)
    blue = value + chroma - chroma * tl.minimum(tl.maximum(tl.abs(hue - 4), 1.0), 2.0)
    return red, green, blue


@triton.jit
def _jitter(red, green, blue, operation, table, mean):
    """One operation of the jitter; none where it is 0."""
    factor = tl.load(table + tl.program_id(0) * _WIDTH + operation)
    if operation == _HUE:
        red, green, blue = _shift_hue(red, green, blue, factor)
    elif operation > 0:
        other = tl.zeros_like(red)
        if operation == _CONTRAST:
            other += mean
        elif operation == _SATURATION:
            other = _luma(red, green, blue)
        other *= 1 - factor
        red, green, blue = _clamp(red * factor + other), _clamp(green * factor + other), _clamp(blue * factor + other)
    return red, green, blue


@triton.jit
def _luma_sums(crops, table, sums, S, BLOCK: tl.constexpr):
    """sums (R, T): the luma of a tile's pixels when the contrast's turn has come, in multiples of 1 / ONE."""
    row, tile = tl.program_id(0), tl.program_id(1)
    pixels = tile * BLOCK + tl.arange(0, BLOCK)
    red, green, blue = _load(crops, table, pixels, S)
    before = 1
    for step in tl.static_range(4):
        operation = tl.load(table + row * _WIDTH + _STEPS + step).to(tl.int32)
        before = tl.where(operation == _CONTRAST, 0, before)
        red, green, blue = _jitter(red, green, blue, operation * before, table, 0.0)
    whole = tl.floor(_luma(red, green, blue) * ONE + 0.5).to(tl.int64)
    tl.store(sums + row * tl.num_programs(1) + tile, tl.sum(tl.where(pixels < S * S, whole, 0)))


@triton.jit
def _colours(
    crops, table, means, views, S, scale_r, scale_g, scale_b, shift_r, shift_g, shift_b, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0)
    pixels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    red, green, blue = _load(crops, table, pixels, S)
    mean = tl.load(means + row)
    for step in tl.static_range(4):
        operation = tl.load(table + row * _WIDTH + _STEPS + step).to(tl.int32)
        red, green, blue = _jitter(red, green, blue, operation, table, mean)
    if tl.load(table + row * _WIDTH + _GREY) > 0:
        red = _luma(red, green, blue)
        green, blue = red, red
    place = views + row.to(tl.int64) * 3 * S * S + pixels
    inside = pixels < S * S
    tl.store(place, red * scale_r + shift_r, mask=inside)
    tl.store(place + S * S, green * scale_g + shift_g, mask=inside)
    tl.store(place + 2 * S * S, blue * scale_b + shift_b, mask=inside)


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
    radius = columns.blur_size(size) // 2
    i = torch.arange(size)
    taps = torch.zeros(2 * radius + 1, size, size)
    for t in range(2 * radius + 1):
        j = (i + t - radius).abs()
        taps[t, i, torch.minimum(j, 2 * (size - 1) - j)] = 1.0
    return taps
