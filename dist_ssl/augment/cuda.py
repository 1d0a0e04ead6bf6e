"""Flip, colour jitter, grey, blur, solarisation and normalisation of uint8 crops as Triton kernels: `augment` on CUDA.

Every row has its own order of operations: a program works on one row, so that the order is a branch which its threads
take together. The contrast needs the mean luma of its image as it is at that point, so a first launch makes that, as
whole numbers, whose sums are the same in any order. A second makes the views, in the format and dtype that the first
convolution reads. Rows to be blurred it leaves as fp32 planes, for two more launches: along rows, along columns.

Bytes a pixel of three channels: 3 + 3 read, 6 written in bf16; of a blurred row 3 + 3 read, then 12 written and read
twice, 6 written. Everything that is drawn goes to the device as one table.

Legend: R rows (views), S pixels a side, P parameters, T tiles of a row.
"""

# mypy: disable-error-code="no-untyped-def"
# (a kernel's arguments are pointers, numbers of the device and constants of the compiler)
from __future__ import annotations

import numpy as np
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
_BLUR, _SIGMA = tl.constexpr(columns.BLUR), tl.constexpr(columns.SIGMA)
_SOLARISE = tl.constexpr(columns.SOLARISE)
# Behind the parameters: the operations of a row in their order, 0 for none; the row's place among those that are
# blurred; and, in the table's k-th row, the k-th row that is blurred.
_STEPS = tl.constexpr(columns.NUM_PARAMETERS)
_PLACE, _BLURRED = tl.constexpr(columns.NUM_PARAMETERS + 4), tl.constexpr(columns.NUM_PARAMETERS + 5)
_WIDTH = tl.constexpr(columns.NUM_PARAMETERS + 6)
_ORDERS = np.array(columns.ORDERS)


def colours(rows_u8: Tensor, drawn: Tensor, config: AugmentConfig, dtype: torch.dtype) -> Tensor:
    """uint8 (R, 3, S, S) on a device, parameters (R, P) on the CPU -> (R, 3, S, S) in channels-last format.

    Nothing is read back from the device, and the host does not wait for it.
    """
    rows_u8 = rows_u8.contiguous()
    device, size = rows_u8.device, rows_u8.shape[-1]
    on_host, num_blurred = _table(drawn, columns.blur_size(size) // 2)
    if rows_u8.is_cuda:
        on_host = on_host.pin_memory()
    table = on_host.to(device, non_blocking=True)
    views = torch.empty(rows_u8.shape, dtype=dtype, device=device, memory_format=torch.channels_last)
    planes, along_rows = torch.empty((2, num_blurred, 3, size, size), dtype=torch.float32, device=device)
    grid = (len(rows_u8), triton.cdiv(size**2, BLOCK))
    sums = torch.empty(grid, dtype=torch.int64, device=device)
    _luma_sums[grid](rows_u8, table, sums, size, BLOCK=BLOCK)
    normal = [1 / std for std in config.std]
    normal += [-mean / std for mean, std in zip(config.mean, config.std, strict=True)]
    tiles = triton.next_power_of_2(grid[1])
    _colours[grid](rows_u8, table, sums, views, planes, size, *normal, BLOCK=BLOCK, TILES=tiles)
    if num_blurred:
        grid, radius = (num_blurred, grid[1]), columns.blur_size(size) // 2
        _blur[grid](planes, table, along_rows, size, radius, *normal, ALONG_ROWS=True, BLOCK=BLOCK)
        _blur[grid](along_rows, table, views, size, radius, *normal, ALONG_ROWS=False, BLOCK=BLOCK)
    return views


def _table(drawn: Tensor, radius: int) -> tuple[Tensor, int]:
    """(R, P) -> the kernels' table (R, P + 6), and how many rows are blurred."""
    parameters = drawn.numpy()
    table = np.zeros((len(parameters), _WIDTH.value), np.float32)
    table[:, : columns.NUM_PARAMETERS] = parameters
    orders = _ORDERS[parameters[:, columns.ORDER].astype(np.int64)]
    table[:, _STEPS.value : _PLACE.value] = orders * parameters[:, columns.JITTER, None]
    if radius == 0:
        table[:, columns.BLUR] = 0
    (blurred,) = table[:, columns.BLUR].nonzero()
    table[blurred, _PLACE.value] = np.arange(len(blurred))
    table[: len(blurred), _BLURRED.value] = blurred
    return torch.from_numpy(table), len(blurred)


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
def _finish(
    views, table, row, pixels, S, red, green, blue, scale_r, scale_g, scale_b, shift_r, shift_g, shift_b
):  # fmt: skip
    """Solarise some pixels of a row where it is to be, normalise, and write as channels-last format has them."""
    if tl.load(table + row * _WIDTH + _SOLARISE) > 0:
        red, green, blue = tl.minimum(red, 1 - red), tl.minimum(green, 1 - green), tl.minimum(blue, 1 - blue)
    red, green, blue = red * scale_r + shift_r, green * scale_g + shift_g, blue * scale_b + shift_b
    place = views + (row.to(tl.int64) * S * S + pixels) * 3
    inside = pixels < S * S
    tl.store(place, red.to(views.dtype.element_ty), mask=inside)
    tl.store(place + 1, green.to(views.dtype.element_ty), mask=inside)
    tl.store(place + 2, blue.to(views.dtype.element_ty), mask=inside)


@triton.jit
def _store_planes(planes, row, pixels, S, red, green, blue):
    place = planes + row.to(tl.int64) * 3 * S * S + pixels
    inside = pixels < S * S
    tl.store(place, red, mask=inside)
    tl.store(place + S * S, green, mask=inside)
    tl.store(place + 2 * S * S, blue, mask=inside)


@triton.jit
def _colours(
    crops, table, sums, views, planes, S, scale_r, scale_g, scale_b, shift_r, shift_g, shift_b,
    BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    row, num_tiles = tl.program_id(0), tl.num_programs(1)
    pixels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    red, green, blue = _load(crops, table, pixels, S)
    tiles = tl.arange(0, TILES)
    total = tl.sum(tl.load(sums + row * num_tiles + tiles, mask=tiles < num_tiles, other=0))
    mean = (total.to(tl.float64) / (tl.full([], ONE, tl.float64) * S * S)).to(tl.float32)
    for step in tl.static_range(4):
        operation = tl.load(table + row * _WIDTH + _STEPS + step).to(tl.int32)
        red, green, blue = _jitter(red, green, blue, operation, table, mean)
    if tl.load(table + row * _WIDTH + _GREY) > 0:
        red = _luma(red, green, blue)
        green, blue = red, red
    if tl.load(table + row * _WIDTH + _BLUR) > 0:
        place = tl.load(table + row * _WIDTH + _PLACE).to(tl.int32)
        _store_planes(planes, place, pixels, S, red, green, blue)
    else:
        _finish(
            views, table, row, pixels, S, red, green, blue, scale_r, scale_g, scale_b, shift_r, shift_g, shift_b
        )  # fmt: skip


@triton.jit
def _blur(
    planes, table, out, S, radius, scale_r, scale_g, scale_b, shift_r, shift_g, shift_b,
    ALONG_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gaussian blur of fp32 planes, reflecting at the edges: along rows to planes again, along columns to the views."""
    place = tl.program_id(0)
    row = tl.load(table + place * _WIDTH + _BLURRED).to(tl.int32)
    sigma = tl.load(table + row * _WIDTH + _SIGMA)
    radius = tl.minimum(radius, (4.5 * sigma).to(tl.int32) + 1)  # as on the CPU: 7e-6 of the weights lie beyond
    pixels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x, y, inside = pixels % S, pixels // S, pixels < S * S
    source = planes + place.to(tl.int64) * 3 * S * S
    total = 0.0
    red = tl.zeros([BLOCK], dtype=tl.float32)
    green = tl.zeros([BLOCK], dtype=tl.float32)
    blue = tl.zeros([BLOCK], dtype=tl.float32)
    for step in range(-radius, radius + 1):
        away = step / sigma
        weight = tl.exp(-0.5 * away * away)
        total += weight
        along = tl.abs((x if ALONG_ROWS else y) + step)
        along = tl.minimum(along, 2 * (S - 1) - along)
        here = source + (y * S + along if ALONG_ROWS else along * S + x)
        red += weight * tl.load(here, mask=inside, other=0.0)
        green += weight * tl.load(here + S * S, mask=inside, other=0.0)
        blue += weight * tl.load(here + 2 * S * S, mask=inside, other=0.0)
    red, green, blue = red / total, green / total, blue / total
    if ALONG_ROWS:
        _store_planes(out, place, pixels, S, red, green, blue)
    else:
        _finish(
            out, table, row, pixels, S, red, green, blue, scale_r, scale_g, scale_b, shift_r, shift_g, shift_b
        )  # fmt: skip
