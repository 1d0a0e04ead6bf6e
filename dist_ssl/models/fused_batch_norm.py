"""Batch norm with the addition and the ReLU that follow it, as one differentiable function of statistics.

What it is made of are operators of torch's, so that compilers see through and a trace on fake tensors counts them: the
kernels of `batch_norm_triton` on CUDA, plain torch elsewhere. Which ranks the statistics are of is the caller's to say:

    statistics(moments(x), ...)                   of this rank's rows: one pass over x
    statistics(gathered(merge(moments(x))), ...)  of all ranks' rows: 2C + 1 fp32 numbers sent

Every tensor of an image's size is (B, C) or (B, C, H, W) in channels-last format, in one dtype: bf16, fp16 or fp32 for
the kernels. Statistics and sums are fp32.

Legend: B rows of this rank, C channels, P parts.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import custom_op

from dist_ssl.models import batch_norm_torch


def fused_batch_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    inverse_std: Tensor,
    count: Tensor,
    relu: bool,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """relu((x - mean) * inverse_std * weight + bias + residual), with the gradient of batch norm in training.

    mean, inverse_std (C,) and count (1,): of `statistics`; the gradient knows that they are made of x.
    reduce: in backward, (2, C) of this rank -> their sum over the ranks that the statistics are of, its input kept.
    The gradients of weight and bias are those of this rank's rows.
    """
    y: Tensor = _FusedBatchNorm.apply(x, residual, weight, bias, mean, inverse_std, count, relu, reduce)
    return y


class _FusedBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        inverse_std: Tensor,
        count: Tensor,
        relu: bool,
        reduce: Callable[[Tensor], Tensor] | None,
    ) -> Tensor:
        y = normalise(x, residual, weight, bias, mean, inverse_std, relu)
        # Behind an addition the mask can't be made from x alone; y is the next layer's input and kept for it anyway.
        masked_by = y if relu and residual is not None else None
        ctx.save_for_backward(x, masked_by, weight, bias, mean, inverse_std, count)
        ctx.relu, ctx.reduce, ctx.added = relu, reduce, residual is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, y, *of_channels, count = ctx.saved_tensors
        dy = channels_last(gradients[0])
        sums, g = gradient_sums(dy, x, y, *of_channels, ctx.relu)
        if y is None:
            g = dy  # and where there is a ReLU, its mask is made again
        reduced = sums if ctx.reduce is None else ctx.reduce(sums)
        dx = gradient(g, x, *of_channels, reduced, count, ctx.relu and y is None)
        dbias, dweight = sums.to(of_channels[0].dtype)
        return dx, g if ctx.added else None, dweight, dbias, None, None, None, None, None


def channels_last(x: Tensor) -> Tensor:
    """(B, C) or (B, C, H, W) with C innermost in memory, copied where it is not."""
    return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.contiguous_format)


def _kernels(x: Tensor) -> Any:
    if not x.is_cuda:
        return batch_norm_torch
    from dist_ssl.models import batch_norm_triton  # torch's builds without CUDA bring no triton

    return batch_norm_triton


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


@custom_op("dist_ssl::batch_norm_moments", mutates_args=())
def moments(x: Tensor) -> Tensor:
    """x -> (P, 2C + 1): means, sums of squared differences from them and the count of each part of the rows."""
    return _kernels(x).moments(x)


@moments.register_fake
def _(x: Tensor) -> Tensor:
    c = x.shape[1]
    return x.new_empty((batch_norm_torch.split(x.numel() // c, c)[0], 2 * c + 1), dtype=_wide(x))


@custom_op("dist_ssl::batch_norm_merge", mutates_args=())
def merge(parts: Tensor) -> Tensor:
    """(P, 2C + 1) -> (2C + 1,): the parts as one (Chan et al. 1979)."""
    return _kernels(parts).merge(parts)


@merge.register_fake
def _(parts: Tensor) -> Tensor:
    return parts.new_empty(parts.shape[1])


@custom_op("dist_ssl::batch_norm_statistics", mutates_args=("running_mean", "running_var", "num_batches"))
def statistics(
    parts: Tensor,
    eps: float,
    momentum: float,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(P, 2C + 1) -> mean (C,), inverse standard deviation (C,), count (1,). Running statistics, if given, are moved."""
    return _kernels(parts).statistics(parts, eps, momentum, running_mean, running_var, num_batches)


@statistics.register_fake
def _(
    parts: Tensor,
    eps: float,
    momentum: float,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    c = parts.shape[1] // 2
    return parts.new_empty(c), parts.new_empty(c), parts.new_empty(1)


@custom_op("dist_ssl::batch_norm_normalise", mutates_args=())
def normalise(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, mean: Tensor, inverse_std: Tensor, relu: bool
) -> Tensor:
    """x, residual -> y."""
    return _kernels(x).normalise(x, residual, weight, bias, mean, inverse_std, relu)


@normalise.register_fake
def _(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, mean: Tensor, inverse_std: Tensor, relu: bool
) -> Tensor:
    return torch.empty_like(x)


@custom_op("dist_ssl::batch_norm_gradient_sums", mutates_args=())
def gradient_sums(
    dy: Tensor, x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor, mean: Tensor, inverse_std: Tensor, relu: bool
) -> tuple[Tensor, Tensor]:
    """dy, x -> sums over rows of g and of g xhat, (2, C), where g is dy behind the ReLU; and g, empty without y."""
    return _kernels(x).gradient_sums(dy, x, y, weight, bias, mean, inverse_std, relu)


@gradient_sums.register_fake
def _(
    dy: Tensor, x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor, mean: Tensor, inverse_std: Tensor, relu: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty((2, x.shape[1]), dtype=_wide(x)), x.new_empty(0) if y is None else torch.empty_like(dy)


@custom_op("dist_ssl::batch_norm_gradient", mutates_args=())
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
    """dy behind the ReLU, or before it and relu=True; x; the sums of all ranks' `count` rows -> dx."""
    return _kernels(x).gradient(dy, x, weight, bias, mean, inverse_std, sums, count, relu)


@gradient.register_fake
def _(
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
    return torch.empty_like(x)
