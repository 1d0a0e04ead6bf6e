"""The functions of `dist_ssl.models.batch_norm_triton` in plain torch, for CPU tensors and for fp64.

Legend: N rows (of a batch, or of its pixels), C channels, P parts that the rows are cut into.
"""

from __future__ import annotations

import torch
from torch import Tensor


def moments(x: Tensor) -> Tensor:
    """(B, C) or (B, C, H, W) -> (P, 2C + 1): each part's means, sums of squared differences, count; fp32 at least."""
    parts = []
    for part in _rows(x).tensor_split(3):
        mean = part.sum(dim=0) / max(len(part), 1)
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
    parts: Tensor, eps: float, momentum: float, running_mean: Tensor | None, running_var: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(P, 2C + 1) -> mean (C,), inverse standard deviation (C,), count (1,); running statistics are moved in place."""
    c = parts.shape[1] // 2
    mean, centred, count = (part.clone() for part in merge(parts).split([c, c, 1]))
    if running_mean is not None and running_var is not None:
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_((centred / (count - 1).clamp(min=1)).to(running_var.dtype), momentum)
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
    """dy, x -> sums over rows of g and of g xhat, (2, C), where g is dy behind the ReLU; and g, if y is given."""
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
