"""Batch norm whose training statistics are those of the global batch, on any device and any number of ranks.

Legend: W world size, B rows of a tensor on this rank, C channels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from dist_ssl.distributed import HAS_TRITON, Peers, everyone, in_backward, on_gpu, peers, world_size
from dist_ssl.models import batch_norm_cuda, fused_batch_norm, moments

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


@dataclass(frozen=True)
class Slices:
    """Slices of a batch, each with statistics of its own: `held` whole ones on a rank, or one that `peers` share."""

    held: int
    peers: Peers


def slices_of(count: int) -> Slices | None:
    """What this rank holds of `count` equal slices of a batch, one of count and world size dividing the other.

    None where all ranks' rows are one slice. Collective, once a number of ranks to a slice.
    """
    if count == 1:
        return None
    return Slices(max(1, count // world_size()), peers(max(1, world_size() // count)))


class GlobalBatchNorm(nn.BatchNorm2d):
    """Batch norm whose training statistics are those of all ranks' rows, for (B, C) and (B, C, H, W), on any device.
    Of slices of them where `slices` is set (Hoffer et al. 2017, ghost batch norm); running statistics then move by the
    mean over this rank's, and are to be averaged over ranks.

    torch's SyncBatchNorm refuses CPU tensors. Statistics are merged as counts, means and centred sums (Chan et al.
    1979), never as E[x^2] - E[x]^2. On a CPU they are taken and merged in fp64: rounded to fp32 they then are the same
    bits however the rows are spread over ranks, and so is all that the forward makes of them. In fp32 a last bit turns
    a ReLU over now and then, which moves a small net's gradient by 1e-4 to 3e-3. On a GPU see `fused_batch_norm`.
    Collective in training mode, among those who share a slice: one all-gather of 2C + 1 numbers forward or, of many
    ranks, two all-reduces (`moments`); one all-reduce of 2C numbers backward.
    """

    slices: Slices | None = None

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in (2, 4):
            raise ValueError(f"expected (B, C) or (B, C, H, W), got {tuple(input.shape)}")

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """relu(norm(x) + residual): the addition and the ReLU where they are asked for, on a GPU in the same pass."""
        self._check_input_dim(x)
        if not self.training:
            return _added(super().forward(x), residual, relu)
        running, momentum = self._running()
        if self.slices is None or self.slices.held == 1:
            among = everyone() if self.slices is None else self.slices.peers
            return self._normalise(x, residual, relu, running, momentum, among)
        held = self.slices.held
        moved = [[None if t is None else t.clone() for t in running] for _ in range(held)]
        residuals = [None] * held if residual is None else residual.chunk(held)
        parts = zip(x.chunk(held), residuals, moved, strict=True)
        y = torch.cat([self._normalise(*part[:2], relu, part[2], momentum, self.slices.peers) for part in parts])
        for buffer, of_slices in zip(running, zip(*moved, strict=True), strict=True):
            if buffer is not None:
                buffer.copy_(torch.stack(of_slices).mean(dim=0))
        return y

    def _running(self) -> tuple[list[Tensor | None], float]:
        """([running mean, variance], or Nones where they are not to move; momentum) of this batch, which is counted."""
        if not self.track_running_stats or _statistics_frozen or in_backward():
            return [None, None], 0.0
        if not _counted:
            cast(Tensor, self.num_batches_tracked).add_(1)
        momentum = self.momentum
        if momentum is None:  # a cumulative average
            momentum = 1.0 / float(cast(Tensor, self.num_batches_tracked))
        return [self.running_mean, self.running_var], momentum

    def _normalise(
        self,
        x: Tensor,
        residual: Tensor | None,
        relu: bool,
        running: Sequence[Tensor | None],
        momentum: float,
        among: Peers,
    ) -> Tensor:
        """In training mode, by the statistics of one slice, which `among` hold together; `running` moves."""
        mean, variance = running
        scale, shift = self.weight, self.bias
        if scale is None:  # affine=False
            ones = x.new_ones(self.num_features, dtype=torch.promote_types(x.dtype, torch.float32))
            scale, shift = ones, torch.zeros_like(ones)
        of_channels = scale, shift, mean, variance, momentum, self.eps
        if _has_kernels(x):
            return fused_batch_norm.batch_norm(x, residual, *of_channels, relu=relu, among=among)
        with torch.autocast(x.device.type, enabled=False):
            if on_gpu(x):
                return _added(batch_norm_cuda.batch_norm(x, *of_channels, among), residual, relu)
            # Statistics of bf16 activations are taken in fp32.
            wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
            y, *found = _GlobalBatchNorm.apply(wide, scale, shift, self.eps, among)
        _track(running, found, momentum)
        return _added(y.to(x.dtype), residual, relu)


@torch.no_grad()
def _track(running: Sequence[Tensor | None], found: Sequence[Tensor], momentum: float) -> None:
    mean, variance, count = found
    unbiased = variance * (count / (count - 1).clamp(min=1))
    for buffer, value in zip(running, (mean, unbiased), strict=True):
        if buffer is not None:
            buffer.lerp_(value.to(buffer.dtype), momentum)


def _added(y: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    if residual is not None:
        y += residual
    return y.relu_() if relu else y


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
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, among: Peers
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, centred = _moments(x)
        count = mean.new_full((1,), x.numel() / x.shape[1])
        if among.size > 1:
            parts = moments.exchange(torch.cat([mean, centred, count]), among)
            means_wc, centred_wc, counts_w1 = parts.split([x.shape[1], x.shape[1], 1], dim=1)
            count = counts_w1.sum(dim=0)
            mean, centred = _merge(means_wc, centred_wc, counts_w1)
        mean, variance, count = mean.to(x.dtype), (centred / count).to(x.dtype), count.to(x.dtype)
        inverse_std = torch.rsqrt(variance + eps)
        # In evaluation mode torch's kernel normalises by what it is given: one fused pass over x.
        y = F.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps)
        ctx.save_for_backward(x, weight, mean, inverse_std, count)
        ctx.among = among
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
        if ctx.among.size > 1:
            dist.all_reduce(sums, group=ctx.among.group)
        mean_dy, mean_dy_xhat = (sums / count).chunk(2)
        shape = [1, -1] + [1] * (x.dim() - 2)
        scale = weight * inverse_std
        per_x = -(scale * inverse_std * mean_dy_xhat)
        constant = -(scale * mean_dy) - per_x * mean
        dx = dx.add_(constant.view(shape)).addcmul_(x, per_x.view(shape))
        return dx, dweight, dbias, None, None
