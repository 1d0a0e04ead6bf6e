"""Global batch norm by torch's fused CUDA kernels, those of its SyncBatchNorm: 16 bytes an element of bf16, as on one
rank. They read and write x in its own dtype and memory format and keep statistics in fp32; x itself is what is kept for
backward.

On a CPU the kernels exist only where a test brings them. They are called directly: as custom operators they would cost
25 to 75 microseconds more of host time a call (measured). `torch.compile` needs the fake forms below.

Legend: W peers, or 1 where their moments are merged, B rows of a tensor on this rank, C channels.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from dist_ssl.distributed import Peers, all_gather_single
from dist_ssl.models import moments


def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    among: Peers,
) -> Tensor:
    """(B, C) or (B, C, H, W), normalised by the statistics of the peers' rows; updates the running ones if given.

    Collective among more than one: what `moments` says forward, one all-reduce of 2C numbers backward.
    """
    if among.size == 1:
        if running_mean is None:
            # Without them torch keeps two tensors less, and a recomputation in backward must keep what forward kept.
            running_mean, running_var = torch.empty_like(weight), torch.empty_like(weight)
        return F.batch_norm(x, running_mean, running_var, weight, bias, True, momentum, eps)
    y: Tensor = _BatchNorm.apply(x, weight, bias, running_mean, running_var, momentum, eps, among)
    return y


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
        among: Peers,
    ) -> Tensor:
        x = x.contiguous(memory_format=_format(x))
        channels = x.shape[1]
        mean, inverse_std = torch.batch_norm_stats(x, eps)
        count = _constant(x.numel() // channels, mean.dtype, mean.device)
        if moments.is_gathered(channels, among.size, mean.element_size()):
            sent = torch.cat([mean, inverse_std, count])
            received = sent.new_empty(among.size * len(sent))
            all_gather_single(received, sent, among.group)
            means_wc, inverse_stds_wc, counts_w1 = received.view(among.size, -1).split([channels, channels, 1], dim=1)
        else:
            part = torch.cat([mean, count * (inverse_std.pow(-2) - eps), count])
            means_wc, centred_wc, counts_w1 = moments.exchange(part, among).split([channels, channels, 1], dim=1)
            inverse_stds_wc = (centred_wc / counts_w1 + eps).rsqrt()
        counts_w = counts_w1.squeeze(1)
        # From its first argument torch takes the dtype of counts where there are no running statistics (a bf16 x would
        # want them in bf16), and whether 32 bits index what it reads: of the means, W x C of them, they do.
        mean, inverse_std = torch.batch_norm_gather_stats_with_counts(
            mean, means_wc, inverse_stds_wc, running_mean, running_var, momentum, eps, counts_w
        )
        ctx.save_for_backward(x, weight, mean, inverse_std, counts_w.to(torch.int32))
        ctx.group = among.group
        return torch.batch_norm_elemt(x, weight, bias, mean, inverse_std, eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse_std, counts_w = ctx.saved_tensors
        dy = gradients[0].contiguous(memory_format=_format(x))
        sum_dy, sum_dy_centred, dweight, dbias = torch.batch_norm_backward_reduce(
            dy, x, mean, inverse_std, weight, True, True, True
        )
        sums = torch.cat([sum_dy, sum_dy_centred])
        dist.all_reduce(sums, group=ctx.group)
        sum_dy, sum_dy_centred = sums.chunk(2)
        dx = torch.batch_norm_backward_elemt(dy, x, mean, inverse_std, weight, sum_dy, sum_dy_centred, counts_w)
        return dx, dweight, dbias, None, None, None, None, None


def _format(x: Tensor) -> torch.memory_format:
    """The memory format that x has, or should have: the kernels read these two."""
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


@lru_cache(maxsize=256)
def _constant(value: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(1,), filled once and not in each layer of each step."""
    return torch.full((1,), value, dtype=dtype, device=device)


_FAKES = {
    "batch_norm_stats": lambda x, eps: _statistics(x, 2),
    "batch_norm_gather_stats_with_counts": lambda x, means, *rest: _statistics(means, 2),
    "batch_norm_elemt": lambda x, *rest: torch.empty_like(x),
    "batch_norm_backward_reduce": lambda dy, x, *rest: _statistics(x, 4),
    "batch_norm_backward_elemt": lambda dy, x, *rest: torch.empty_like(x),
}


def _statistics(x: Tensor, number: int) -> tuple[Tensor, ...]:
    wide = torch.promote_types(x.dtype, torch.float32)
    return tuple(x.new_empty(x.shape[1], dtype=wide) for _ in range(number))


_library = torch.library.Library("aten", "IMPL")
for _name, _fake in _FAKES.items():
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{_name}", "Meta"):
        _library.impl(_name, _fake, "Meta")
