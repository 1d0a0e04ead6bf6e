"""Everything that knows ranks: the process group, gathers of rows, errors raised on all ranks, global batch norm.

With no process group initialised every function here is that of a world of one and calls no collective.

Legend: W world size, m rows of this rank, M rows of all ranks, B rows of a tensor, C channels.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from dist_ssl.ranks import ranks_in_environment

# torch 2.14 renamed it and warns of the old name; 2.11 knows only that one.
all_gather_single = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


@dataclass(frozen=True)
class World:
    """This process's place among the ranks, and the device it computes on."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def initialize(timeout_minutes: float = 30.0) -> World:
    """Join the process group that the environment describes; alone, a world of one that has a group too.

    Collective. A rank that waits longer than the timeout for its peers fails with torch's error.
    """
    values = ranks_in_environment()
    if values is None:
        values = {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
        }
        values["MASTER_PORT"] = "0"
    os.environ.update(values)  # DeepSpeed reads them again
    local_rank, cuda = int(values["LOCAL_RANK"]), torch.cuda.is_available()
    if cuda and local_rank >= torch.cuda.device_count():
        raise RuntimeError(
            f"local rank {local_rank} has no GPU of its own: this node shows {torch.cuda.device_count()}; "
            "start one rank a GPU"
        )
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        timeout = timedelta(minutes=timeout_minutes)
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        if int(values["WORLD_SIZE"]) == 1:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        else:
            dist.init_process_group(backend, timeout=timeout, device_id=device if cuda else None)
    return World(dist.get_rank(), dist.get_world_size(), local_rank, int(values["LOCAL_WORLD_SIZE"]), device)


def shutdown() -> None:
    """Leave the process group, so that no rank is torn down while another still waits for it. Collective."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def gather_rows(rows: Tensor, rows_per_rank: Sequence[int]) -> Tensor:
    """(m, ...) of each rank -> (M, ...), in rank order, without gradient. Collective: one all-gather.

    gloo and NCCL gather equal shapes only, so uneven ranks are padded to the largest.
    """
    if len(rows_per_rank) == 1:
        return rows
    largest = max(rows_per_rank)
    sent = rows.contiguous()
    if rows.shape[0] < largest:
        sent = torch.cat([sent, sent.new_zeros(largest - rows.shape[0], *rows.shape[1:])])
    received = sent.new_empty(len(rows_per_rank) * largest, *rows.shape[1:])
    all_gather_single(received, sent)
    if min(rows_per_rank) == largest:
        return received
    return torch.cat([received[r * largest : r * largest + n] for r, n in enumerate(rows_per_rank)])


def gather_objects(value: Any) -> list[Any]:
    """Small picklable values of all ranks, in rank order. Collective."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def broadcast_object(value: Any) -> Any:
    """Rank 0's value on every rank. Collective."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def agree(loss: Tensor, flags: Sequence[bool]) -> tuple[float, list[bool]]:
    """The mean of the ranks' losses, and for each flag whether any rank raised it. Collective: one small all-reduce.

    It is made on the host, and reading the loss waits for the forward only: called when backward is queued behind it,
    a GPU stays busy meanwhile.
    """
    values = torch.tensor([float(loss), *flags], dtype=torch.float64)
    if world_size() > 1:
        dist.all_reduce(values)
    mean, *raised = values.tolist()
    return mean / world_size(), [count > 0 for count in raised]


def raise_together(error: BaseException | None) -> None:
    """Raise the first rank's error on every rank, or on none. Collective.

    For a check that may fail on one rank only: the others would wait in the next collective for ever.
    """
    described = None if error is None else (type(error), str(error))
    for failed_rank, failure in enumerate(gather_objects(described)):
        if failure is not None:
            kind, message = failure
            if error is not None and rank() == failed_rank:
                raise error
            raise kind(f"rank {failed_rank}: {message}")


@contextlib.contextmanager
def together() -> Iterator[None]:
    """An error in this block on any rank is raised on all of them at its end. Collective; no collective inside."""
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    raise_together(error)


# --- global batch norm -----------------------------------------------------------------------------------------

MOMENTS_BLOCK = 2**18  # elements
_statistics_frozen = False


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


class GlobalBatchNorm(nn.BatchNorm2d):
    """Batch norm whose training statistics are those of all ranks' rows, for (B, C) and (B, C, H, W), on any device.

    torch's SyncBatchNorm refuses CPU tensors. Statistics are merged as counts, means and centred sums (Chan et al.
    1979), never as E[x^2] - E[x]^2. They are merged in fp64, and on a CPU taken in fp64 too: rounded to fp32 they then
    are the same bits however the rows are spread over ranks, and so is all that the forward makes of them. In fp32 a
    last bit turns a ReLU over now and then, which moves a small net's gradient by 1e-4 to 3e-3. Collective in training
    mode: one all-gather of 2C + 1 fp64 numbers forward, one all-reduce of 2C numbers backward.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in (2, 4):
            raise ValueError(f"expected (B, C) or (B, C, H, W), got {tuple(input.shape)}")

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        if not self.training:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            # Statistics of bf16 activations are taken in fp32.
            wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
            y, mean, variance, count = _GlobalBatchNorm.apply(wide, self.weight, self.bias, self.eps)
        if self.track_running_stats and not _statistics_frozen:
            self._track(mean, variance, count)
        return y.to(x.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        self.num_batches_tracked.add_(1)
        momentum = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        unbiased = variance * (count / (count - 1).clamp(min=1))
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, sum of squared differences from it) of each channel of this rank's x, fp64 (C,) each.

    On a CPU in two passes over blocks that stay in its cache: 3 to 5 times faster than torch.var_mean, whose running
    updates do not vectorise. On a GPU by one fp32 kernel, which reads x once.
    """
    if x.is_cuda:
        variance, mean = torch.var_mean(x, dim=[d for d in range(x.dim()) if d != 1], correction=0)
        return mean.double(), variance.double() * (x.numel() / x.shape[1])
    rows_rc = x.movedim(1, -1).reshape(-1, x.shape[1])  # no copy where x is in channels-last format
    blocks = rows_rc.split(max(1, MOMENTS_BLOCK // x.shape[1]))
    total = torch.stack([block.double().sum(dim=0) for block in blocks]).sum(dim=0)
    mean = total / len(rows_rc)
    centred = torch.stack([(block - mean).square_().sum(dim=0) for block in blocks]).sum(dim=0)
    return mean, centred


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
            mean = (means_wc * counts_w1).sum(dim=0) / count
            centred = (centred_wc + counts_w1 * (means_wc - mean).square()).sum(dim=0)
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
