"""What `batch_norm_triton` does, in plain torch: for fp64, for tests of what calls it on a CPU, and as its oracle.

Legend: N rows (of a batch, or of its pixels), C channels, P parts that the rows are cut into.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


MAX_BLOCK_C = 128
TILE = 4096  # elements of a step of a kernel's program
# Programs of a reduction: enough for any GPU, and not derived from it, so that another one sums in the same order.
PROGRAMS = 512


def blocks(c: int) -> dict[str, int]:
    """Rows and channels of a step of a kernel's program."""
    block_c = min(MAX_BLOCK_C, 1 << (c - 1).bit_length())
    return {"BLOCK_N": TILE // block_c, "BLOCK_C": block_c}


def split(n: int, c: int) -> tuple[int, int]:
    """(number of parts, rows of each but the last) of a sum over n rows of c channels."""
    block = blocks(c)
    tiles, wanted = math.ceil(n / block["BLOCK_N"]), math.ceil(PROGRAMS / math.ceil(c / block["BLOCK_C"]))
    rows = math.ceil(tiles / min(wanted, tiles)) * block["BLOCK_N"]
    return math.ceil(n / rows), rows


def moments(x: Tensor) -> Tensor:
    """(B, C) or (B, C, H, W) -> (P, 2C + 1): each part's means, sums of squared differences, count; fp32 at least."""
    rows_nc = _rows(x)
    parts = []
    for part in rows_nc.split(split(*rows_nc.shape)[1]):
        mean = part.mean(dim=0)
        parts.append(torch.cat([mean, (part - mean).square().sum(dim=0), mean.new_full((1,), len(part))]))
    return torch.stack(parts)


def merge(parts: Tensor) -> Tensor:
    """(P, 2C + 1) -> (2C + 1,): all parts as one (Chan et al. 1979), which is what a rank sends."""
    c = parts.shape[1] // 2
    means_pc, centred_pc, counts_p1 = parts.split([c, c, 1], dim=1)
    count = counts_p1.sum(dim=0)
    mean = (means_pc * counts_p1).sum(dim=0) / count
    centred = (centred_pc + counts_p1 * (means_pc - mean).square()).sum(dim=0)
    return torch.cat([mean, centred, count])


def statistics(
    parts: Tensor,
    eps: float,
    momentum: float,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(P, 2C + 1) -> mean (C,), inverse standard deviation (C,), count (1,); running statistics are moved in place."""
    c = parts.shape[1] // 2
    mean, centred, count = (part.clone() for part in merge(parts).split([c, c, 1]))
    if running_mean is not None and running_var is not None and num_batches is not None:
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_((centred / (count - 1).clamp(min=1)).to(running_var.dtype), momentum)
        num_batches.add_(1)
    return mean, torch.rsqrt(centred / count + eps), count


def normalise(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, mean: Tensor, inverse_std: Tensor, relu: bool
) -> Tensor:
    """x, residual -> y, all in the same format and dtype."""
    y = (_rows(x) - mean) * (weight * inverse_std) + bias
    if residual is not None:
        y += _rows(residual)
    return _like(x, y.relu_() if relu else y)


def gradient_sums(
    dy: Tensor, x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor, mean: Tensor, inverse_std: Tensor, relu: bool
) -> tuple[Tensor, Tensor]:
    """dy, x -> sums over rows of g and of g xhat, (2, C), where g is dy behind the ReLU; and g itself, if y is given."""
    if y is None and relu:
        y = normalise(x, None, weight, bias, mean, inverse_std, relu=True)
        return gradient_sums(dy, x, y, weight, bias, mean, inverse_std, relu)[0], x.new_empty(0)
    g = dy if y is None else torch.where(y <= 0, 0.0, dy)  # as torch's ReLU, which lets NaN pass
    xhat = (_rows(x) - mean) * inverse_std
    return torch.stack([_rows(g).sum(dim=0), (_rows(g) * xhat).sum(dim=0)]), x.new_empty(0) if y is None else g


def gradient(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    inverse_std: Tensor,
    sums: Tensor,
    count: Tensor,
    relu: bool,
) -> Tensor:
    """dy (or g, with relu=False), x and the sums (2, C) of all `count` rows -> dx."""
    if relu:
        dy = torch.where(normalise(x, None, weight, bias, mean, inverse_std, relu) <= 0, 0.0, dy)
    mean_g, mean_g_xhat = sums / count
    xhat = (_rows(x) - mean) * inverse_std
    return _like(x, (_rows(dy) - mean_g - xhat * mean_g_xhat) * (weight * inverse_std))


def _rows(x: Tensor) -> Tensor:
    """(B, C) or (B, C, H, W) -> (N, C), in fp32 at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide.movedim(1, -1).reshape(-1, x.shape[1])


def _like(x: Tensor, rows_nc: Tensor) -> Tensor:
    """(N, C) -> the shape, format and dtype of x."""
    shaped = rows_nc.view(len(x), *x.shape[2:], x.shape[1]).movedim(-1, 1)
    return torch.empty_like(x).copy_(shaped)
