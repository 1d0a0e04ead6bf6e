"""Losses of a predictor against a slower encoder's output, which gets no gradient: MoCo v3, BYOL, SimSiam.

With unit vectors u_i of queries (or predictions) of one view and v_j of keys of the other, s_ij = u_i.v_j / tau,

    MoCo v3 = (2 tau / N) sum_views sum_i ( log sum_j exp(s_ij) - s_ii )        i of this rank, j of all
    d/du_i  = (2 / N) ( sum_j P_ij v_j - v_i ),   P_ij = exp(s_ij) / sum_j exp(s_ij)
    BYOL    = (1 / N) sum_views sum_i |u_i - v_i|^2 = (1 / N) sum_views sum_i (2 - 2 u_i.v_i)
    SimSiam = -(1 / (2 N)) sum_views sum_i u_i.v_i
    d/dq_i  = ( d/du_i - (u_i.d/du_i) u_i ) / |q_i|

A query's gradient needs its own row of s only, so a single pass over tiles of s gives loss and gradient: two products
a pair, and memory O(N d), never O(n N).

Sends: MoCo v3 one all-gather of both views' keys forward; BYOL and SimSiam nothing; nothing backward.

Legend: n images of this rank, N of all, d dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from dist_ssl import distributed
from dist_ssl.distributed import HAS_TRITON, on_gpu
from dist_ssl.objective import checks, closed_form, tiles


def moco_v3(
    q1: Tensor,
    q2: Tensor,
    k1: Tensor,
    k2: Tensor,
    temperature: float,
    *,
    rows_per_rank: Sequence[int] | None = None,
) -> Tensor:
    """2 tau times the cross-entropies of q1 against k2 and q2 against k1 (Chen et al. 2021, Algorithm 1), a scalar.

    q1, q2: (n, d), queries of the two views, from the predictor; k1, k2: (n, d), keys, from the momentum encoder,
        which get no gradient. Not normalised; of one dtype, fp32, fp64, or bf16 and fp16 with fp32 inside.
    temperature: a number. rows_per_rank: n of every rank, as of `vicreg`.

    The mean over ranks of what is returned, and of the parameter gradients that follow, is the loss of the global
    batch and its gradient. Collective in forward only.
    """
    rows, least = {"q1": q1, "q2": q2, "k1": k1, "k2": k2}, {"temperature": (temperature, checks.MIN_TEMPERATURE)}
    rows_per_rank = checks.agree("moco_v3", rows, rows_per_rank, least=least)
    keys = distributed.gather_rows(torch.cat([k2.detach(), k1.detach()], dim=1), rows_per_rank)
    return closed_form.scalar(partial(_moco_v3, rows_per_rank, keys, 1 / temperature), q1, q2)


def byol(p1: Tensor, p2: Tensor, k1: Tensor, k2: Tensor, *, rows_per_rank: Sequence[int] | None = None) -> Tensor:
    """Squared distances of unit vectors, p1 to k2 and p2 to k1, added (Grill et al. 2020, equation 2), a scalar.

    p1, p2: (n, d), predictions; k1, k2: (n, d), the target network's projections, which get no gradient.
    Arguments and what is returned otherwise: `moco_v3`. Collective only without rows_per_rank.
    """
    rows_per_rank = checks.agree("byol", {"p1": p1, "p2": p2, "k1": k1, "k2": k2}, rows_per_rank)
    # Not 2 - 2 u.v, which cancels where predictions are good.
    (u1, v2), (u2, v1) = _directions(p1, k2), _directions(p2, k1)
    return ((u1 - v2).square().sum() + (u2 - v1).square().sum()) * (len(rows_per_rank) / sum(rows_per_rank))


def simsiam(p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor, *, rows_per_rank: Sequence[int] | None = None) -> Tensor:
    """The negative cosine of p1 and z2 and that of p2 and z1, halved (Chen and He 2021, equation 4), a scalar.

    p1, p2: (n, d), predictions; z1, z2: (n, d), the same encoder's projections, which get no gradient here.
    Arguments and what is returned otherwise: `moco_v3`. Collective only without rows_per_rank.
    """
    rows_per_rank = checks.agree("simsiam", {"p1": p1, "p2": p2, "z1": z1, "z2": z2}, rows_per_rank)
    (u1, v2), (u2, v1) = _directions(p1, z2), _directions(p2, z1)
    return ((u1 * v2).sum() + (u2 * v1).sum()) * (-0.5 * len(rows_per_rank) / sum(rows_per_rank))


def _directions(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    dtype = closed_form.wide(prediction.dtype)
    return F.normalize(prediction.to(dtype), dim=1), F.normalize(target.detach().to(dtype), dim=1)


def _moco_v3(
    rows_per_rank: Sequence[int], keys: Tensor, scale: float, *queries: Tensor
) -> tuple[Tensor, *tuple[Tensor, ...]]:
    size, total = len(rows_per_rank), sum(rows_per_rank)
    first = sum(rows_per_rank[: distributed.rank()])
    own = slice(first, first + len(queries[0]))
    dtype = torch.float64 if scale > tiles.MAX_SCALE_FP32 else closed_form.wide(keys.dtype)
    losses, gradients = [], []
    for query, key in zip(queries, keys.chunk(2, dim=1), strict=True):
        # As F.normalize: a vector shorter than 1e-12 is divided by that.
        length = torch.linalg.vector_norm(query, dim=1, keepdim=True, dtype=dtype).clamp(min=1e-12)
        u, v_own = query / length, F.normalize(key[own].to(dtype), dim=1)
        sums, pulls = _negatives(query, key, length, own, scale)
        s_positive = (u * v_own).sum(dim=1) * scale
        # The positive joins the denominator last: where it dominates, LSE_i - s_ii would cancel.
        lse = sums.log()
        losses.append(-F.logsigmoid(s_positive - lse).sum())
        pulls *= torch.logaddexp(lse, s_positive).neg().exp()[:, None]
        du = (pulls - torch.sigmoid(lse - s_positive)[:, None] * v_own) * (2 * size / total)
        gradients.append((du - (u * du).sum(dim=1, keepdim=True) * u) / length)
    return (losses[0] + losses[1]) * (2 * size / (scale * total)), *gradients


def _negatives(query: Tensor, key: Tensor, length: Tensor, own: slice, scale: float) -> tuple[Tensor, Tensor]:
    """`tiles.query_sums` of queries (n, d) with their lengths (n, 1) and keys (N, d), in the lengths' dtype."""
    dtype = length.dtype
    if on_gpu(query) and HAS_TRITON and dtype == torch.float32:
        from dist_ssl.objective import queries_triton  # torch's builds without CUDA bring no triton

        if query.dtype == torch.float16:  # its range is too short for the weights of the keys
            query, key = query.float(), key.float()
        key_length = torch.linalg.vector_norm(key, dim=1, dtype=dtype).clamp(min=1e-12)
        return queries_triton.query_sums(query, key, 1 / length.flatten(), 1 / key_length, own, scale)
    return tiles.query_sums(query / length, F.normalize(key.to(dtype), dim=1), own, scale)
