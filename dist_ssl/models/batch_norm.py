"""Batch norm whose training statistics are those of the global batch, on any device and any number of ranks.

Legend: W world size, B rows of a tensor on this rank, C channels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from dist_ssl.distributed import HAS_TRITON, all_gather_single, in_backward, on_gpu, world_size
from dist_ssl.models import batch_norm_cuda, fused_batch_norm

MOMENTS_BLOCK = 2**17  # elements
_statistics_frozen = False
_counted = False


@contextlib.contextmanager
def frozen_running_statistics() -> Iterator[None]:
    """Batch norm still normalises by its batch in here, but leaves its running statistics as they are.

    For forwards that are run a second time: activation checkpointing's recomputation, GradCache's first pass.
    """
    global _statistics_frozen
    before, _statistics_frozen = _statistics_frozen, True
    try:
        yield
    finally:
        _statistics_frozen = before


@contextlib.contextmanager
def counted_at_once(layers: Sequence[GlobalBatchNorm]) -> Iterator[None]:
    """Count a batch in all these layers by one launch instead of one each, for their forward in here."""
    global _counted
    tracking = [layer for layer in layers if layer.training and layer.track_running_stats]
    counters = [cast(Tensor, layer.num_batches_tracked) for layer in tracking]
    if counters and not _statistics_frozen:
        with torch.no_grad():
            torch._foreach_add_(counters, 1)
    before, _counted = _counted, True
    try:
        yield
    finally:
        _counted = before


class GlobalBatchNorm(nn.BatchNorm2d):
    """Batch norm whose training statistics are those of all ranks' rows, for (B, C) and (B, C, H, W), on any device.

    torch's SyncBatchNorm refuses CPU tensors. Statistics are merged as counts, means and centred sums (Chan et al.
    1979), never as E[x^2] - E[x]^2. On a CPU they are taken and merged in fp64: rounded to fp32 they then are the same
    bits however the rows are spread over ranks, and so is all that the forward makes of them. In fp32 a last bit turns
    a ReLU over now and then, which moves a small net's gradient by 1e-4 to 3e-3. On a GPU see `fused_batch_norm`.
    Collective in training mode: one all-gather of 2C + 1 numbers forward, one all-reduce of 2C numbers backward.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in (2, 4):
            raise ValueError(f"expected (B, C) or (B, C, H, W), got {tuple(input.shape)}")

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """relu(norm(x) + residual): the addition and the ReLU where they are asked for, on a GPU in the same pass."""
        self._check_input_dim(x)
        if self.training and _has_kernels(x):
            running, momentum = self._running()
            return fused_batch_norm.batch_norm(
                x, residual, self.weight, self.bias, *running, momentum, self.eps, relu=relu
            )
        y = self._normalise(x)
        if residual is not None:
            y += residual
        return y.relu_() if relu else y

    def _running(self) -> tuple[tuple[Tensor | None, Tensor | None], float]:
        """(running mean and variance, or None where they are not to move, momentum) of this batch, which is counted."""
        if not self.track_running_stats or _statistics_frozen or in_backward():
            return (None, None), 0.0
        if not _counted:
            cast(Tensor, self.num_batches_tracked).add_(1)
        momentum = self.momentum
        if momentum is None:  # a cumulative average
            momentum = 1.0 / float(cast(Tensor, self.num_batches_tracked))
        return (self.running_mean, self.running_var), momentum

    def _normalise(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        running, momentum = self._running()
        with torch.autocast(x.device.type, enabled=False):
            if on_gpu(x):
                return batch_norm_cuda.batch_norm(x, self.weight, self.bias, *running, momentum, self.eps)
            # Statistics of bf16 activations are taken in fp32.
            wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
            y, mean, variance, count = _GlobalBatchNorm.apply(wide, self.weight, self.bias, self.eps)
        if running[0] is not None:
            self._track(mean, variance, count, momentum)
        return y.to(x.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: Tensor, momentum: float) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        unbiased = variance * (count / (count - 1).clamp(min=1))
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)


def _has_kernels(x: Tensor) -> bool:
    """Whether the fused kernels take it; on a GPU without Triton, and in fp64, torch's own do (`batch_norm_cuda`)."""
    return on_gpu(x) and HAS_TRITON and x.dtype != torch.float64


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, sum of squared differences from it) of each channel of this rank's x, fp64 (C,) each.

    Block by block, each in fp64 while it is in a core's cache, by torch's kernel for channels-last format: the one that
    vectorises.
    """
    channels = x.shape[1]
    rows_rc = x.movedim(1, -1).reshape(-1, channels)  # no copy where x is in channels-last format
    means, variances, counts = [], [], []
    for block in rows_rc.split(max(1, MOMENTS_BLOCK // channels)):
        dense = block.double().contiguous()  # a single row in another format has strides of its own
        wide = dense.as_strided((1, channels, len(block), 1), (block.numel(), 1, channels, channels))
        mean, variance = torch.batch_norm_update_stats(wide, None, None, 0.0)
        means.append(mean)
        variances.append(variance)
        counts.append(len(block))
    means_nc, counts_n1 = torch.stack(means), x.new_tensor(counts, dtype=torch.float64)[:, None]
    return _merge(means_nc, counts_n1 * torch.stack(variances), counts_n1)


def _merge(means_nc: Tensor, centred_nc: Tensor, counts_n1: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, centred sum) of all rows from those of n parts of them (Chan et al. 1979), fp64 (C,) each."""
    mean = (means_nc * counts_n1).sum(dim=0) / counts_n1.sum()
    return mean, (centred_nc + counts_n1 * (means_nc - mean).square()).sum(dim=0)


class _GlobalBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, centred = _moments(x)
        count = mean.new_full((1,), x.numel() / x.shape[1])
        if world_size() > 1:
            sent = torch.cat([mean, centred, count])
            received = sent.new_empty(world_size() * sent.numel())
            all_gather_single(received, sent)
            means_wc, centred_wc, counts_w1 = received.view(world_size(), -1).split([x.shape[1], x.shape[1], 1], dim=1)
            count = counts_w1.sum(dim=0)
            mean, centred = _merge(means_wc, centred_wc, counts_w1)
        mean, variance, count = mean.to(x.dtype), (centred / count).to(x.dtype), count.to(x.dtype)
        inverse_std = torch.rsqrt(variance + eps)
        # In evaluation mode torch's kernel normalises by what it is given: one fused pass over x.
        y = F.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps)
        ctx.save_for_backward(x, weight, mean, inverse_std, count)
        ctx.mark_non_differentiable(mean, variance, count)
        return y, mean, variance, count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse_std, count = ctx.saved_tensors
        dy = gradients[0]
        # With train=False torch's kernel gives the two sums over rows, and dy * weight * inverse_std, in one pass.
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            dy, x, weight, mean, inverse_std.reciprocal().square(), mean, inverse_std, False, 0.0, [True, True, True]
        )
        sums = torch.cat([dbias, dweight])
        if world_size() > 1:
            dist.all_reduce(sums)
        mean_dy, mean_dy_xhat = (sums / count).chunk(2)
        shape = [1, -1] + [1] * (x.dim() - 2)
        scale = weight * inverse_std
        per_x = -(scale * inverse_std * mean_dy_xhat)
        constant = -(scale * mean_dy) - per_x * mean
        dx = dx.add_(constant.view(shape)).addcmul_(x, per_x.view(shape))
        return dx, dweight, dbias, None
