"""VICReg and Barlow Twins over the global batch: losses of the dimensions' variances and correlations.

With centred views x (N, d) and y of all ranks, S = x'x and T = y'y, and var_j = S_jj / (N - 1), std = sqrt(var + 1e-4),

    VICReg = (invariance / (N d)) |z1 - z2|^2 + (variance / (2 d)) sum_views sum_j max(0, 1 - std_j)
             + (covariance / d) sum_views sum_{i != j} (S_ij / (N - 1))^2
    d/dz1  = (2 invariance / (N d)) (z1 - z2) - (variance / (2 d (N - 1))) x_j [std_j < 1] / std_j
             + (4 covariance / (d (N - 1)^2)) x off(S)

and with a = x / sqrt(S_jj / N + 1e-5), b likewise of y, C = a'b / N, G_ij = 2 off_diagonal C_ij, G_ii = 2 (C_ii - 1),

    Barlow Twins = sum_i (1 - C_ii)^2 + off_diagonal sum_{i != j} C_ij^2
    d/dz1        = (b G' - a (sum_k G_jk C_jk)_j) / (N sqrt(S_jj / N + 1e-5))

so a rank that knows the global statistics has its own rows' exact gradient. They are had in one of two ways, and
`exchange` says which of them sends less and how much:

- all ranks' z are gathered, and x off(S) = (x x') x - x diag(S) comes from this rank's n rows of the N x N matrix x x',
  which is small where N < d: no d x d matrix is ever made. In fp32 the subtraction costs digits where one dimension
  outgrows the others: 1e-4 of the gradient along one of 30 times their standard deviation, 1e-3 at 100 times;
- the d x d matrix of sums is reduced, of both views in one where it is symmetric.

Sends: an all-gather of z (Barlow Twins: and an all-reduce of 2 d sums), or an all-reduce of 2 d sums and one of
(d + 2) d, forward; nothing backward. Sums are of centred values, never E[x^2] - E[x]^2: means are global before
anything is squared.

Where text and code differ, the code is taken, since the papers' weights belong to it: VICReg's invariance is a mean
over dimensions too and its variance a mean over views (text: a sum over both), Barlow Twins' epsilon (text: none).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from dist_ssl import distributed
from dist_ssl.objective import checks, closed_form

HINGE_EPSILON = 1e-4  # Bardes et al. 2022, section 4.1
NORM_EPSILON = 1e-5  # of the batch norm in Zbontar et al. 2021


def vicreg(
    z1: Tensor,
    z2: Tensor,
    invariance: float = 25.0,
    variance: float = 25.0,
    covariance: float = 1.0,
    *,
    rows_per_rank: Sequence[int] | None = None,
) -> Tensor:
    """Variance-invariance-covariance regularisation (Bardes et al. 2022), a scalar.

    z1, z2: (n, d), row i the two views of image i; fp32, fp64, or bf16 and fp16 with fp32 inside.
    rows_per_rank: n of every rank. Without it a gather of a few numbers more, which finds input that does not fit
        together and raises the same ValueError on every rank.

    The mean over ranks of what is returned, and of the parameter gradients that follow, is the loss of the global
    batch and its gradient. Collective in forward only.
    """
    least = {"invariance": (invariance, 0.0), "variance": (variance, 0.0), "covariance": (covariance, 0.0)}
    rows_per_rank = checks.agree("vicreg", {"z1": z1, "z2": z2}, rows_per_rank, least=least)
    return closed_form.scalar(partial(_vicreg, rows_per_rank, invariance, variance, covariance), z1, z2)


def barlow_twins(
    z1: Tensor, z2: Tensor, off_diagonal: float = 0.0051, *, rows_per_rank: Sequence[int] | None = None
) -> Tensor:
    """Barlow Twins (Zbontar et al. 2021, equation 1), a scalar; each dimension is normalised over the global batch.

    off_diagonal: the paper's lambda. Arguments and what is returned otherwise: `vicreg`. Collective in forward only.
    """
    least = {"off_diagonal": (off_diagonal, 0.0)}
    rows_per_rank = checks.agree("barlow_twins", {"z1": z1, "z2": z2}, rows_per_rank, least=least)
    return closed_form.scalar(partial(_barlow_twins, rows_per_rank, off_diagonal), z1, z2)


def exchange(form: str, rows_per_rank: Sequence[int], d: int, dtype: torch.dtype) -> tuple[bool, int]:
    """(z is gathered, bytes that a rank sends by a ring) of `form`, "vicreg" or "barlow_twins", whichever way is less.

    z of `dtype` travels as it is, sums in fp32 at least. With one rank both send nothing, and the same comparison
    tells which way has fewer products.
    """
    size, width = len(rows_per_rank), closed_form.wide(dtype).itemsize
    gather = size * max(rows_per_rank) * 2 * d * dtype.itemsize
    if form == "barlow_twins":
        gather += 2 * 2 * d * width  # a ring's all-reduce sends everything twice
    reduce = 2 * (d + 4) * d * width
    return gather <= reduce, min(gather, reduce) * (size - 1) // size


def _vicreg(
    rows_per_rank: Sequence[int], invariance: float, variance: float, covariance: float, z1: Tensor, z2: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    size, total, d = len(rows_per_rank), sum(rows_per_rank), z1.shape[1]
    gathered, _ = exchange("vicreg", rows_per_rank, d, z1.dtype)
    views, own = _centred(z1, z2, rows_per_rank, gathered)
    squares = torch.stack([x.square().sum(dim=0) for x in views])  # S_jj of both views, (2, d)
    crossed = []  # own rows of x off(S)
    if gathered:
        off_squares = -squares.square().sum()  # sum_{i != j} S_ij^2 of both views: |x x'|^2 = |S|^2
        for x, square in zip(views, squares, strict=True):
            gram = x[own] @ x.T  # (n, N)
            off_squares += size * gram.square().sum()
            crossed.append((gram @ x).addcmul_(x[own], square, value=-1))
    else:
        # Of symmetric matrices half travels: one above, the other below the diagonal. They are 0 on it.
        sums = squares.new_empty(d + 2, d)
        torch.mm(views[0].T, views[0], out=sums[:d]).triu_(1).add_((views[1].T @ views[1]).tril_(-1))
        sums[d:] = squares
        distributed.sum_over_ranks(sums)
        squares = sums[d:]
        off_squares = 2 * sums[:d].square().sum()
        for x, half in zip(views, (sums[:d].triu(), sums[:d].tril()), strict=True):
            crossed.append(x @ half.add_(half.T.clone()))
    difference = z1.to(squares.dtype) - z2
    std = (squares / (total - 1) + HINGE_EPSILON).sqrt()
    loss = (
        difference.square().sum() * (invariance * size / (total * d))
        + (1 - std).clamp(min=0).mean() * variance
        + off_squares * (covariance / (d * (total - 1) ** 2))
    )
    hinge = (std < 1) / std * (-0.5 * variance / (d * (total - 1)))
    difference *= 2 * invariance / (total * d)
    factor = 4 * covariance / (d * (total - 1) ** 2)
    dz1, dz2 = (c.mul_(factor).addcmul_(x[own], h) for x, h, c in zip(views, hinge, crossed, strict=True))
    return loss, dz1.add_(difference).mul_(size), dz2.sub_(difference).mul_(size)


def _barlow_twins(
    rows_per_rank: Sequence[int], off_diagonal: float, z1: Tensor, z2: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    size, total, d = len(rows_per_rank), sum(rows_per_rank), z1.shape[1]
    gathered, _ = exchange("barlow_twins", rows_per_rank, d, z1.dtype)
    (x, y), own = _centred(z1, z2, rows_per_rank, gathered)
    squares = torch.stack([x.square().sum(dim=0), y.square().sum(dim=0)])
    if gathered:
        inverse_std = (squares / total + NORM_EPSILON).rsqrt()
        a, b = x * inverse_std[0], y * inverse_std[1]
        diagonal = (a * b).mean(dim=0)
        a_own, b_own = a[own], b[own]
        # Own rows of b off(C)' and a off(C), and from all rows the sums of squares of off(C)'s rows and columns.
        b_crossed = (b_own @ b.T @ a / total).addcmul_(b_own, diagonal, value=-1)
        a_crossed = (a_own @ a.T @ b / total).addcmul_(a_own, diagonal, value=-1)
        off = torch.stack([(a_own * b_crossed).sum(dim=0), (b_own * a_crossed).sum(dim=0)]) / total
        distributed.sum_over_ranks(off)
    else:
        sums = distributed.sum_over_ranks(torch.cat([x.T @ y, squares]))
        inverse_std = (sums[d:] / total + NORM_EPSILON).rsqrt()
        a_own, b_own = x * inverse_std[0], y * inverse_std[1]
        c = sums[:d].mul_(inverse_std[0][:, None] / total).mul_(inverse_std[1])
        diagonal = c.diagonal().clone()
        c.fill_diagonal_(0)
        b_crossed, a_crossed = b_own @ c.T, a_own @ c
        off = torch.stack([torch.linalg.vector_norm(c, dim=1), torch.linalg.vector_norm(c, dim=0)]).square()
    loss = (1 - diagonal).square().sum() + off_diagonal * off[0].sum()
    pull = diagonal - 1
    inner = off_diagonal * off + pull * diagonal
    factor = inverse_std * (2 * size / total)
    dz1 = b_crossed.mul_(off_diagonal).addcmul_(pull, b_own).addcmul_(inner[0], a_own, value=-1).mul_(factor[0])
    dz2 = a_crossed.mul_(off_diagonal).addcmul_(pull, a_own).addcmul_(inner[1], b_own, value=-1).mul_(factor[1])
    return loss, dz1, dz2


def _centred(
    z1: Tensor, z2: Tensor, rows_per_rank: Sequence[int], gathered: bool
) -> tuple[tuple[Tensor, Tensor], slice]:
    """Both views less the global mean, in fp32 at least, and which rows are this rank's: all (N, d), or own (n, d)."""
    own = slice(0, len(z1))
    z = torch.cat([z1, z2], dim=1)
    if gathered:
        first = sum(rows_per_rank[: distributed.rank()])
        own = slice(first, first + len(z1))
        z = distributed.gather_rows(z, rows_per_rank)
    z = z.to(closed_form.wide(z.dtype))
    mean = z.sum(dim=0)
    if not gathered:
        distributed.sum_over_ranks(mean)
    z -= mean / sum(rows_per_rank)
    x, y = z.chunk(2, dim=1)
    return (x, y), own
