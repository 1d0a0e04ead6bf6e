"""The augmentation on a CPU, in place and in blocks of as many rows as stay in a core's cache. Rows are sorted by their
order of jitter, so that a block's rows go through each operation in few slices: at 28 pixels a call costs as much as
what it computes. A row's pixels are the same bits in whatever batch it stands and however many threads compute it:
operations are elementwise, or sums whose order does not matter.

Legend: R rows (views), S pixels a side, P parameters.
"""

from __future__ import annotations

from itertools import groupby

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dist_ssl.augment.parameters import (
    BLUR,
    BRIGHTNESS,
    CONTRAST,
    FLIP,
    GREY,
    JITTER,
    ORDER,
    ORDERS,
    SATURATION,
    SIGMA,
    SOLARISE,
    blur_size,
)
from dist_ssl.config import AugmentConfig

CACHED_PIXELS = 2**16  # rows of a block on a CPU: with its scratch space it should fit in a core's second-level cache


def colours(rows_u8: Tensor, drawn: Tensor, config: AugmentConfig) -> Tensor:
    """uint8 (R, 3, S, S), parameters (R, P) on the CPU -> float32 (R, 3, S, S), to the last operation."""
    device, size = rows_u8.device, rows_u8.shape[-1]
    largest = max(1, CACHED_PIXELS // size**2)
    std = torch.tensor(config.std, device=device).view(3, 1, 1)
    scale, shift = 1 / std, torch.tensor(config.mean, device=device).view(3, 1, 1) / -std
    # numpy asks the kernel for huge pages, whose first touch costs a fifth: half a millisecond an image.
    views = torch.from_numpy(np.empty(rows_u8.shape, np.float32)).to(device)
    scratch = torch.empty((3, min(largest, len(rows_u8)), 3, size, size), dtype=torch.float32, device=device)
    kinds = (drawn[:, ORDER] + 1) * drawn[:, JITTER]
    for rows in kinds.argsort(stable=True).split(largest):
        of_rows = drawn[rows]
        x, spare, other = scratch[:, : len(rows)].unbind()
        alone = int(rows[0]) if len(rows) == 1 else None
        if alone is None:
            block = rows_u8[rows.to(device)]
        else:
            block, x = rows_u8[alone : alone + 1], views[alone : alone + 1]
        x.copy_(block)
        for flipped in _chosen(of_rows[:, FLIP] > 0, device):
            x[flipped] = x[flipped].flip(-1)
        x.mul_(1 / 255)
        _jitter(x, of_rows, spare, other)
        for grey in _chosen(of_rows[:, GREY] > 0, device):
            of_grey = x[grey]
            x[grey] = _grey(of_grey, spare[: len(of_grey)], other[: len(of_grey)]).expand(-1, 3, -1, -1)
        _blur_rows(x, of_rows)
        for i in of_rows[:, SOLARISE].nonzero().flatten().tolist():
            torch.minimum(x[i], 1 - x[i], out=x[i])  # 1 - x from 0.5 on
        x.mul_(scale).add_(shift)
        if alone is None:
            views[rows.to(device)] = x
    return views


def _chosen(mask: Tensor, device: torch.device) -> list[Tensor | slice]:
    """An index of the rows that a mask (R,) chooses, if any; of all of them a slice, which copies nothing."""
    if mask.all():
        return [slice(None)]
    return [mask.nonzero().flatten().to(device)] if mask.any() else []


def _jitter(x: Tensor, drawn: Tensor, spare: Tensor, other: Tensor) -> None:
    """Colour jitter of (R, 3, S, S) by (R, P), in place. Rows are sorted: those without first, then by order."""
    jittered = drawn[:, JITTER].tolist()
    orders = [ORDERS[int(order)] for order in drawn[:, ORDER].tolist()]
    factors = drawn.to(x.device)[:, :, None, None, None]
    for turn in range(len(ORDERS[0])):
        start = jittered.count(0.0)
        for operation, run in groupby(order[turn] for order in orders[start:]):
            rows = slice(start, start + len(list(run)))
            _adjust(operation, x[rows], factors[rows, operation], spare[rows], other[rows])
            start = rows.stop


def _adjust(operation: int, x: Tensor, factor: Tensor, spare: Tensor, other: Tensor) -> None:
    """One operation of the jitter, on all these rows, in place; a factor a row, (R, 1, 1, 1)."""
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


def _blur_rows(x: Tensor, drawn: Tensor) -> None:
    """Gaussian blur of the rows of (R, 3, S, S) that are to be blurred, in place, reflecting at the edges.

    Beyond 4.5 sigma lie 7e-6 of the weights: left out, which saves half of the work.
    """
    largest, sigmas = blur_size(x.shape[-1]) // 2, drawn[:, SIGMA]
    radii = (4.5 * sigmas.double()).long().add_(1).clamp_(max=largest).mul_(drawn[:, BLUR] > 0)
    for radius in filter(None, radii.unique().tolist()):
        for rows in _chosen(radii == radius, x.device):
            x[rows] = _blur_by_convolution(x[rows], sigmas[radii == radius], radius)


def _blur_by_convolution(x: Tensor, sigmas: Tensor, radius: int) -> Tensor:
    """(R, 3, S, S), sigmas (R,) -> (R, 3, S, S).

    Every line is a channel of its own: three times S short convolutions a row take half the time of three large ones.
    """
    count, _, size, _ = x.shape
    steps = torch.arange(-radius, radius + 1, dtype=torch.float32)
    weights = torch.exp(-0.5 * (steps / sigmas[:, None]).square())
    weights = (weights / weights.sum(dim=1, keepdim=True)).to(x.device)
    along = weights.repeat_interleave(3 * size, dim=0)[:, None, None, :]
    for _ in range(2):  # rows, then columns as rows of the transposed image
        lines = functional.pad(x, (radius, radius, 0, 0), "reflect").reshape(1, len(along), 1, -1)
        x = functional.conv2d(lines, along, groups=len(along)).view(count, 3, size, size).mT
    return x
