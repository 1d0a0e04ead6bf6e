"""torch's CUDA kernels for global batch norm, in plain torch for CPU tensors: as `torch.nn.SyncBatchNorm` wants them.

Importing this gives them to torch's CPU backend, which has none. Statistics are fp32, fp64 for fp64 input, as on CUDA;
what a CUDA kernel would read wrongly (another memory format, another dtype of the counts) is an error here.
"""

from __future__ import annotations

import torch
from torch import Tensor


def per_channel(values_c: Tensor, x: Tensor) -> Tensor:
    return values_c.view(1, -1, *[1] * (x.dim() - 2))


def wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def over_rows(x: Tensor) -> list[int]:
    return [d for d in range(x.dim()) if d != 1]


def check_formats(*tensors: Tensor) -> None:
    last = [x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) for x in tensors]
    assert all(last) or all(x.is_contiguous() for x in tensors)


def stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    check_formats(x)
    variance, mean = torch.var_mean(wide(x), dim=over_rows(x), correction=0)
    return mean, torch.rsqrt(variance + eps)


def gather_stats(
    x: Tensor,
    means_wc: Tensor,
    inverse_stds_wc: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    counts_w: Tensor,
) -> tuple[Tensor, Tensor]:
    assert x.dtype == means_wc.dtype == inverse_stds_wc.dtype == counts_w.dtype
    mean, centred, total = means_wc[0], torch.zeros_like(means_wc[0]), torch.zeros_like(counts_w[0])
    for their_mean, their_inverse, count in zip(means_wc, inverse_stds_wc, counts_w, strict=True):
        difference = their_mean - mean
        centred = centred + (their_inverse**-2 - eps) * count + difference**2 * total * count / (total + count)
        mean, total = mean + difference * count / (total + count), total + count
    if running_mean is not None and running_var is not None:
        assert running_mean.dtype == mean.dtype
        running_mean.mul_(1 - momentum).add_(mean, alpha=momentum)
        running_var.mul_(1 - momentum).add_(centred / (total - 1), alpha=momentum)
    return mean, torch.rsqrt(centred / total + eps)


def elemt(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inverse_std: Tensor, eps: float) -> Tensor:
    check_formats(x)
    centred = wide(x) - per_channel(mean, x)
    return (centred * per_channel(inverse_std * weight, x) + per_channel(bias, x)).to(x.dtype)


def backward_reduce(
    dy: Tensor, x: Tensor, mean: Tensor, inverse_std: Tensor, weight: Tensor, *wanted: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_formats(dy, x)
    assert dy.dtype == x.dtype
    sum_dy = wide(dy).sum(dim=over_rows(x))
    sum_dy_centred = (wide(dy) * (wide(x) - per_channel(mean, x))).sum(dim=over_rows(x))
    return sum_dy, sum_dy_centred, (sum_dy_centred * inverse_std).to(weight.dtype), sum_dy.to(weight.dtype)


def backward_elemt(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    inverse_std: Tensor,
    weight: Tensor,
    sum_dy: Tensor,
    sum_dy_centred: Tensor,
    counts_w: Tensor,
) -> Tensor:
    check_formats(dy, x)
    assert counts_w.dtype == torch.int32
    assert counts_w.is_contiguous()
    total = int(counts_w.sum())
    slope = per_channel(inverse_std**2 * sum_dy_centred / total, x)
    dx = wide(dy) - per_channel(sum_dy / total, x) - (wide(x) - per_channel(mean, x)) * slope
    return (dx * per_channel(inverse_std * weight, x)).to(x.dtype)


library = torch.library.Library("aten", "IMPL")
for name, kernel in {
    "batch_norm_stats": stats,
    "batch_norm_gather_stats_with_counts": gather_stats,
    "batch_norm_elemt": elemt,
    "batch_norm_backward_reduce": backward_reduce,
    "batch_norm_backward_elemt": backward_elemt,
}.items():
    library.impl(name, kernel, "CPU")
