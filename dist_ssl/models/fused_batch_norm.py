"""Global batch norm with the addition and the ReLU that follow it, in as few passes over memory as there can be.

Forward: one kernel reads x for its statistics, which ranks merge, one makes y. Backward: one makes the sums over rows,
which ranks add, and one dx. The kernels are those of `batch_norm_triton`, launched directly: custom operators would
cost the host more than a launch does.

Legend: W peers, B rows of a tensor on this rank, C channels, P parts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from dist_ssl.distributed import Peers
from dist_ssl.models import moments


def batch_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    relu: bool,
    among: Peers,
) -> Tensor:
    """relu(norm(x) + residual), (B, C) or (B, C, H, W) in channels-last format, copied to it where they are not.

    bf16, fp16 or fp32, with statistics in fp32 of the peers' rows; updates the running ones if given. The gradients of
    weight and bias are those of this rank's rows. Collective among more than one: `moments.exchange` forward, one
    all-reduce of 2C numbers backward.
    """
    if residual is not None:
        residual = residual.to(x.dtype)
    y: Tensor = _BatchNorm.apply(x, residual, weight, bias, running_mean, running_var, momentum, eps, relu, among)
    return y


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
        relu: bool,
        among: Peers,
    ) -> Tensor:
        kernels, x = _kernels(), _channels_last(x)
        parts = kernels.moments(x)
        if among.size > 1:
            parts = moments.exchange(kernels.merge(parts), among)
        mean, inverse_std, count = kernels.statistics(parts, eps, momentum, running_mean, running_var)
        if residual is not None:
            residual = _channels_last(residual)
        y: Tensor = kernels.normalise(x, residual, weight, bias, mean, inverse_std, relu)
        # Behind an addition the mask can't be made from x alone; y is the next layer's input and kept for it anyway.
        masked_by = y if relu and residual is not None else None
        ctx.save_for_backward(x, masked_by, weight, bias, mean, inverse_std, count)
        ctx.relu, ctx.added, ctx.among = relu, residual is not None, among
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, y, *of_channels, count = ctx.saved_tensors
        kernels, dy = _kernels(), _channels_last(gradients[0])
        sums, g = kernels.gradient_sums(dy, x, y, *of_channels, ctx.relu)
        if y is None:
            g = dy  # and where there is a ReLU, its mask is made again
        dbias, dweight = sums.to(of_channels[0].dtype)
        if ctx.among.size > 1:
            sums = sums.clone()
            dist.all_reduce(sums, group=ctx.among.group)
        dx = kernels.gradient(g, x, *of_channels, sums, count, ctx.relu and y is None)
        return dx, g if ctx.added else None, dweight, dbias, None, None, None, None, None, None


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.contiguous_format)


def _kernels() -> Any:
    from dist_ssl.models import batch_norm_triton  # torch's builds without CUDA bring no triton

    return batch_norm_triton
