"""What DeepSpeed 0.19 launches and sends under each ZeRO stage between the gradients and the next forward: its
tensor operations, in its order, on fake tensors, for `tests.benchmarks.traffic`.

Legend: P parameters of a tensor or group, W ranks.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from dist_ssl.distributed import all_gather_single
from dist_ssl.engine.optimizers import LARS, Segment
from dist_ssl.planning.estimate import OVERLAPPED_BUCKET, PERSISTENT

# torch 2.14's name for it, as with `all_gather_single`.
reduce_scatter_single = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def hand_parts_to(optimizer: torch.optim.Optimizer, ranks: int) -> None:
    """Of each group this rank's part, flat, with the parameters that begin in it for LARS."""
    segments, number = dict[Tensor, list[Segment]](), 0
    for group in optimizer.param_groups:
        sizes = [p.numel() for p in group["params"]]
        part = torch.nn.Parameter(torch.empty(-(-sum(sizes) // ranks)))
        segments[part], position = [], 0
        for size in sizes:
            if position < part.numel():
                segments[part].append(Segment(number, position, min(size, part.numel() - position)))
            position, number = position + size, number + 1
        group["params"] = [part]
    if isinstance(optimizer, LARS):
        optimizer.attach(segments, number, ranks > 1)


def reduce(stage: int, parameters: list[Tensor], ranks: int) -> None:
    """Averages the gradients of all ranks; this rank's part is a W-th of them, and of the tensors."""
    gradients = [torch.empty_like(p) for p in reversed(parameters)]  # as backward comes to them
    if stage == 0:
        flat = torch.cat([g.view(-1) for g in gradients])
        flat.mul_(1 / ranks)
        _all_reduce(flat, ranks)
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))
        return
    largest = max(g.numel() for g in gradients)
    size, bucket, filled = max(OVERLAPPED_BUCKET, largest), list[Tensor](), 0
    own = gradients[: -(-len(gradients) // ranks)]
    for gradient in gradients:
        if filled + gradient.numel() > size:
            _reduce_bucket(stage, bucket, ranks)
            bucket, filled = [], 0
        bucket.append(gradient)
        filled += gradient.numel()
    _reduce_bucket(stage, bucket, ranks)
    if stage < 3:
        for gradient in own:  # out of the reduction, and out of the bucket that is used again
            torch.empty_like(gradient).copy_(gradient)
            torch.empty_like(gradient).copy_(gradient)
    torch.cat([g.view(-1) for g in own])  # flat, as the optimizer takes it


def _reduce_bucket(stage: int, gradients: list[Tensor], ranks: int) -> None:
    bucket, position = gradients[0].new_empty(sum(g.numel() for g in gradients)), 0
    for gradient in gradients:
        bucket[position : position + gradient.numel()].copy_(gradient.view(-1))
        position += gradient.numel()
    bucket.div_(ranks)
    flat = torch.cat([bucket])
    if stage < 3:
        _all_reduce(flat, ranks)
        return
    part = flat.new_empty(-(-flat.numel() // ranks))
    if ranks > 1:
        reduce_scatter_single(part, flat.new_empty(part.numel() * ranks))
    for gradient in gradients:  # each parameter's part to its place
        part.new_empty(-(-gradient.numel() // ranks)).copy_(part[: -(-gradient.numel() // ranks)])


def gather(stage: int, groups: list[list[Tensor]], ranks: int) -> None:
    """The weights that the next forward uses: at once under ZeRO 1 and 2, each before its use under 3."""
    for group in groups:
        part = group[0].new_empty(-(-sum(p.numel() for p in group) // ranks))
        torch.empty_like(part).copy_(part)  # the master to the weights
        gathered = [part.numel()] if stage < 3 else [-(-p.numel() // ranks) for p in group if p.numel() >= PERSISTENT]
        if stage == 3:
            gathered.append(-(-sum(p.numel() for p in group if p.numel() < PERSISTENT) // ranks))
        for size in gathered:
            if ranks > 1 and size:
                all_gather_single(part.new_empty(size * ranks), part.new_empty(size))


def _all_reduce(tensor: Tensor, ranks: int) -> None:
    if ranks > 1:
        dist.all_reduce(tensor)
