"""Losses as they are found in the wild, each wrong in one way, to see that the gates of test_objective.py and
test_objective_methods.py turn each of them down. Signatures and reduction over ranks are those of `objective`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from dist_ssl import distributed
from dist_ssl.objective.gaussian import slices


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


# --- beside NT-Xent: signatures are those of `objective` --------------------------------------------------------


class _Sum(torch.autograd.Function):
    """An all-reduce whose backward sums over ranks too."""

    @staticmethod
    def forward(ctx, values):
        return distributed.sum_over_ranks(values.clone())

    @staticmethod
    def backward(ctx, gradient):
        return distributed.sum_over_ranks(gradient.clone())


def _rows(x: Tensor, rows_per_rank: Sequence[int], with_gradient: bool = True) -> Tensor:
    """All ranks' rows; their gradient summed over ranks, or reaching the own rows only."""
    first, total = sum(rows_per_rank[: distributed.rank()]), sum(rows_per_rank)
    if with_gradient:
        return _Sum.apply(F.pad(x, (0, 0, first, total - first - len(x))))
    everyone = distributed.gather_rows(x.detach(), rows_per_rank)
    return torch.cat([everyone[:first], x, everyone[first + len(x) :]])


def _vicreg(z1, z2, all1, all2):
    """The invariance of own rows, the rest of all rows."""
    loss = 25 * F.mse_loss(z1, z2)
    for z in (all1, all2):
        c = torch.cov(z.T)
        loss = loss + 12.5 * F.relu(1 - (c.diagonal() + 1e-4).sqrt()).mean()
        loss = loss + (c.square().sum() - c.diagonal().square().sum()) / len(c)
    return loss


def vicreg_gather_without_gradient(z1, z2, *, rows_per_rank):
    """Covariance of gathered z whose gradient reaches the own rows only: W times too small after the mean."""
    return _vicreg(z1, z2, *(_rows(z, rows_per_rank, with_gradient=False) for z in (z1, z2)))


def vicreg_mean_of_means(z1, z2, *, rows_per_rank):
    """The right covariance, but invariance as a mean over own rows."""
    return _vicreg(z1, z2, *(_rows(z, rows_per_rank) for z in (z1, z2)))


def vicreg_of_each_rank(z1, z2, *, rows_per_rank):
    """Statistics of each rank's batch: another loss, that depends on the number of ranks."""
    return _vicreg(z1, z2, z1, z2)


def _barlow_twins(c):
    off = c.square().sum() - c.diagonal().square().sum()
    return (1 - c.diagonal()).square().sum() + 0.0051 * off


def _normalised(z):
    return F.batch_norm(z, None, None, training=True, eps=1e-5)


def barlow_twins_reduced_without_gradient(z1, z2, *, rows_per_rank):
    """Right but for an all-reduce of the matrix that autograd does not see: the gradient is W times too small."""
    first, n = sum(rows_per_rank[: distributed.rank()]), len(z1)
    a, b = (_normalised(_rows(z, rows_per_rank))[first : first + n] for z in (z1, z2))
    c = a.T @ b / sum(rows_per_rank)
    distributed.sum_over_ranks(c.data)
    return _barlow_twins(c)


def barlow_twins_normalised_on_each_rank(z1, z2, *, rows_per_rank):
    """The matrix is summed over ranks as it should, of dimensions normalised by each rank's own statistics."""
    a, b = (_normalised(z) for z in (z1, z2))
    return _barlow_twins(_Sum.apply(a.T @ b / sum(rows_per_rank)))


def barlow_twins_of_raw_moments(z1, z2, *, rows_per_rank):
    """Exact in exact arithmetic, but covariances are E[xy] - E[x] E[y], which cancels where means are large."""
    total = sum(rows_per_rank)
    mean1, mean2, square1, square2 = (_Sum.apply(x.sum(dim=0)) / total for x in (z1, z2, z1.square(), z2.square()))
    std1, std2 = (square1 - mean1**2 + 1e-5).sqrt(), (square2 - mean2**2 + 1e-5).sqrt()
    c = _Sum.apply(z1.T @ z2) / total - mean1[:, None] * mean2
    return _barlow_twins(c / (std1[:, None] * std2))


def _moco_v3(q1, q2, k1, k2, temperature, first):
    loss, positives = 0.0, torch.arange(len(q1)) + first
    for q, k in ((q1, k2), (q2, k1)):
        s = F.normalize(q, dim=1) @ F.normalize(k, dim=1).T / temperature
        loss = loss + 2 * temperature * F.cross_entropy(s, positives)
    return loss


def moco_v3_mean_of_means(q1, q2, k1, k2, temperature, *, rows_per_rank):
    """Keys of all ranks, but the mean over own queries: right only where ranks are even."""
    k1, k2 = (distributed.gather_rows(k.detach(), rows_per_rank) for k in (k1, k2))
    return _moco_v3(q1, q2, k1, k2, temperature, sum(rows_per_rank[: distributed.rank()]))


def moco_v3_positives_of_rank_0(q1, q2, k1, k2, temperature, *, rows_per_rank):
    """Positives are looked for in the first rows of the gathered keys, on every rank."""
    k1, k2 = (distributed.gather_rows(k.detach(), rows_per_rank) for k in (k1, k2))
    return _moco_v3(q1, q2, k1, k2, temperature, 0)


def moco_v3_keys_of_this_rank(q1, q2, k1, k2, temperature, *, rows_per_rank):
    """No gather: n keys instead of N."""
    return _moco_v3(q1, q2, k1.detach(), k2.detach(), temperature, 0)


def _cosine(p, k):
    return F.cosine_similarity(p, k.detach(), dim=1).mean()


def byol_mean_of_means(p1, p2, k1, k2, *, rows_per_rank):
    """The mean over own rows: right only where ranks are even."""
    return 4 - 2 * _cosine(p1, k2) - 2 * _cosine(p2, k1)


def byol_of_the_same_view(p1, p2, k1, k2, *, rows_per_rank):
    """Each prediction against the key of its own view."""
    return 4 - 2 * _cosine(p1, k1) - 2 * _cosine(p2, k2)


def simsiam_mean_of_means(p1, p2, z1, z2, *, rows_per_rank):
    """The mean over own rows: right only where ranks are even."""
    return -0.5 * (_cosine(p1, z2) + _cosine(p2, z1))


def simsiam_without_stop(p1, p2, z1, z2, *, rows_per_rank):
    """The targets get a gradient."""
    return -0.5 * (F.cosine_similarity(p1, z2, dim=1).mean() + F.cosine_similarity(p2, z1, dim=1).mean())


def _sigreg(z, seed, step, num_slices, total, reduce):
    u = z @ slices(z.shape[1], num_slices, seed, step).to(z.dtype)
    t = torch.linspace(-5, 5, 17, dtype=z.dtype)
    gaussian = torch.exp(-t.square() / 2)
    angles = u[:, :, None] * t
    cosines, sines = (reduce(x.sum(dim=0)) / total for x in (angles.cos(), angles.sin()))
    error = (cosines - gaussian).square() + sines.square()
    return total * torch.trapezoid(error * gaussian, t, dim=1).mean()


def _sum_without_gradient(values):
    distributed.sum_over_ranks(values.data)
    return values


def sigreg_reduced_without_gradient(z, seed, step, num_slices, *, rows_per_rank):
    """An all-reduce of the sums that autograd does not see: the gradient is W times too small."""
    return _sigreg(z, seed, step, num_slices, sum(rows_per_rank), _sum_without_gradient)


def sigreg_of_each_rank(z, seed, step, num_slices, *, rows_per_rank):
    """The statistic of each rank's batch."""
    return _sigreg(z, seed, step, num_slices, len(z), lambda values: values)


def sigreg_with_slices_of_each_rank(z, seed, step, num_slices, *, rows_per_rank):
    """Sums along directions that differ between ranks are added."""
    return _sigreg(z, seed + distributed.rank(), step, num_slices, sum(rows_per_rank), _Sum.apply)
