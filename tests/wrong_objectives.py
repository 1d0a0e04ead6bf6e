"""Contrastive losses as they are found in the wild, each wrong in one way, to see that the gate of
test_objective.py turns each of them down. Signature and reduction over ranks are those of `objective.nt_xent`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from dist_ssl import distributed


def _views(z1: Tensor, z2: Tensor) -> Tensor:
    """(2n, d), unit length, rows ordered by image and view."""
    return F.normalize(torch.stack([z1, z2], dim=1).flatten(0, 1), dim=1)


def _anchor_losses(own: Tensor, everyone: Tensor, first: int, temperature: Tensor) -> Tensor:
    """(2n,) losses of own views against all views: right, wherever own and everyone carry the right gradient."""
    index = torch.arange(first, first + len(own), device=own.device)
    s = own @ everyone.T / temperature
    s = s.masked_fill(index[:, None] == torch.arange(len(everyone), device=own.device), -torch.inf)
    return F.cross_entropy(s, index ^ 1, reduction="none")


def _everyone(own: Tensor, rows_per_rank: Sequence[int]) -> tuple[Tensor, int]:
    """All views without gradient, and where this rank's begin."""
    views = [2 * n for n in rows_per_rank]
    return distributed.gather_rows(own.detach(), views), sum(views[: distributed.rank()])


def gather_without_gradient(z1, z2, temperature, *, rows_per_rank, sample_ids=None):
    """The global loss on every rank, whose gradient reaches only the own rows: W times too small after the mean."""
    own = _views(z1, z2)
    everyone, first = _everyone(own, rows_per_rank)
    everyone = torch.cat([everyone[:first], own, everyone[first + len(own) :]])
    return _anchor_losses(everyone, everyone, 0, temperature).mean()


def local_loss_without_gradient(z1, z2, temperature, *, rows_per_rank, sample_ids=None):
    """Own anchors against gathered views that carry no gradient: the terms P_jk are missing, another direction."""
    own = _views(z1, z2)
    everyone, first = _everyone(own, rows_per_rank)
    everyone = torch.cat([everyone[:first], own, everyone[first + len(own) :]])
    return _anchor_losses(own, everyone, first, temperature).sum() * (len(rows_per_rank) / len(everyone))


class _Gather(torch.autograd.Function):
    """An all-gather whose backward sums over ranks."""

    @staticmethod
    def forward(ctx, own, rows_per_rank):
        everyone, first = _everyone(own, rows_per_rank)
        ctx.own = slice(first, first + len(own))
        return everyone

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient[ctx.own], None


def mean_of_means(z1, z2, temperature, *, rows_per_rank, sample_ids=None):
    """Right gathers, but each rank takes the mean over its own views: right only where ranks are even."""
    own = _views(z1, z2)
    _, first = _everyone(own, rows_per_rank)
    everyone = _Gather.apply(own, rows_per_rank) if len(rows_per_rank) > 1 else own
    return _anchor_losses(own, everyone, first, temperature).mean()


def self_mask_with_gradient(z1, z2, temperature, *, rows_per_rank, sample_ids=None):
    """The self-similarity is subtracted from the denominator as a constant: its gradient stays, and spoils d/dtau."""
    own = _views(z1, z2)
    _, first = _everyone(own, rows_per_rank)
    everyone = _Gather.apply(own, rows_per_rank) if len(rows_per_rank) > 1 else own
    index = torch.arange(first, first + len(own))
    s = own @ everyone.T / temperature
    exponentials = s.exp()
    itself = exponentials[torch.arange(len(own)), index]
    lse = (exponentials.sum(dim=1) - itself.detach()).log()
    losses = lse - s[torch.arange(len(own)), index ^ 1]
    return losses.sum() * (len(rows_per_rank) / len(everyone))


def self_mask_of_zero(z1, z2, temperature, *, rows_per_rank, sample_ids=None):
    """The self-similarity is multiplied by zero, so that exp(0) = 1 stays in the denominator."""
    own = _views(z1, z2)
    _, first = _everyone(own, rows_per_rank)
    everyone = _Gather.apply(own, rows_per_rank) if len(rows_per_rank) > 1 else own
    index = torch.arange(first, first + len(own))
    s = own @ everyone.T / temperature * (index[:, None] != torch.arange(len(everyone)))
    losses = F.cross_entropy(s, index ^ 1, reduction="none")
    return losses.sum() * (len(rows_per_rank) / len(everyone))


def unpadded_gather(z1, z2, temperature, *, rows_per_rank, sample_ids=None):
    """gloo's all_gather fed with uneven rows: garbage on one rank, an abort on another."""
    own = _views(z1, z2)
    received = [own.new_empty(2 * n, own.shape[1]) for n in rows_per_rank]
    dist.all_gather(received, own.detach())
    first = 2 * sum(rows_per_rank[: distributed.rank()])
    received[distributed.rank()] = own
    everyone = torch.cat(received)
    return _anchor_losses(own, everyone, first, temperature).sum() * (len(rows_per_rank) / len(everyone))


def textbook(z1, z2, temperature, *, rows_per_rank=None, sample_ids=None):
    """Right, on one rank, but copies of an image are each other's negatives, and small temperatures cancel in fp32."""
    own = _views(z1, z2)
    return _anchor_losses(own, own, 0, temperature).mean()
