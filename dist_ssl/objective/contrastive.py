"""NT-Xent over the global batch, exact on any number of ranks, and two losses that share its machinery.

With s_ij = u_i.u_j / tau of unit vectors u and the positive p(i), the other view of i's image,

    L = (1/M) sum_i ( LSE_i - s_i,p(i) ),      LSE_i = log sum_{j != i} exp(s_ij)
    dL/du_k = (1/(M tau)) [ sum_j (P_kj + P_jk) u_j - 2 u_p(k) ],   P_kj = exp(s_kj - LSE_k),  P_jk = exp(s_kj - LSE_j)

s is symmetric, so a rank that knows all z and all LSE has its own rows' whole gradient at hand: one all-gather of z
and one of M numbers forward, no collective in backward. The pairs are visited in tiles that are computed again in
backward (`tiles`; `tiles_triton` on CUDA), so memory is O(M d), never O(M m).

Legend: W ranks; n images of this rank, N of all; m = 2n and M = 2N views; d dimensions. Rows of (M, d) are ordered
by rank, image, view: row r belongs to image r // 2 and its positive is row r ^ 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dist_ssl import distributed
from dist_ssl.distributed import HAS_TRITON, on_gpu
from dist_ssl.objective import checks, tiles

# |s| <= 64 keeps exp(s) and sums of 10^10 of them inside fp32, so no running maximum is needed. A smaller
# temperature is computed in fp64, whose range ends at `checks.MIN_TEMPERATURE`.
MAX_SCALE_FP32 = 64.0
CHUNK_VIEWS = 8192  # even: both views of an image in one chunk


def nt_xent(
    z1: Tensor,
    z2: Tensor,
    temperature: float | Tensor,
    *,
    rows_per_rank: Sequence[int] | None = None,
    sample_ids: Tensor | None = None,
    validate: bool = False,
) -> Tensor:
    """The normalised temperature-scaled cross-entropy of Chen et al. 2020 (SimCLR, section 2.1), a scalar.

    z1, z2: (n, d), row i the two views of image i, not normalised; fp32, fp64, or bf16 and fp16 with fp32 inside.
    temperature: a number or a scalar tensor, whose gradient is exact too.
    rows_per_rank: n of every rank. With it a call costs two all-gathers; without it, one more of a few numbers,
        which also finds input that does not fit together and raises the same ValueError on every rank.
    sample_ids: (n,) int64; copies of one image in the global batch are then not negatives of each other.
    validate: raise ValueError on every rank, naming rank and images, where z is not finite.

    The mean over ranks of what is returned, and of the parameter gradients that follow, is the loss of the global
    batch and its gradient: rank r returns (W/M) times the sum over its own views. Collective in forward only.
    """
    return _contrast("nt_xent", z1, z2, temperature, rows_per_rank, sample_ids, None, validate)


def decoupled(
    z1: Tensor,
    z2: Tensor,
    temperature: float | Tensor,
    *,
    rows_per_rank: Sequence[int] | None = None,
    sample_ids: Tensor | None = None,
    validate: bool = False,
) -> Tensor:
    """NT-Xent without the positive in the denominator (Yeh et al. 2021, DCL, equation 6). Arguments: `nt_xent`."""
    return _contrast("decoupled", z1, z2, temperature, rows_per_rank, sample_ids, None, validate)


def supervised(
    z1: Tensor,
    z2: Tensor,
    temperature: float | Tensor,
    labels: Tensor,
    *,
    rows_per_rank: Sequence[int] | None = None,
    sample_ids: Tensor | None = None,
    validate: bool = False,
) -> Tensor:
    """Every view of an image's class is a positive (Khosla et al. 2020, L_out of equation 2).

    labels: (n,) int64; a negative one means unlabelled: only the views of that image are its positives.
    Other arguments: `nt_xent`. Where no two images share a label it is `nt_xent`.
    """
    return _contrast("supervised", z1, z2, temperature, rows_per_rank, sample_ids, labels, validate)


def _contrast(
    form: str,
    z1: Tensor,
    z2: Tensor,
    temperature: float | Tensor,
    rows_per_rank: Sequence[int] | None,
    sample_ids: Tensor | None,
    labels: Tensor | None,
    validate: bool,
) -> Tensor:
    value = float(temperature.detach()) if isinstance(temperature, Tensor) else temperature
    rows_per_rank = checks.agree(form, z1, z2, value, rows_per_rank, sample_ids, labels)
    device = z1.device
    ids = None if sample_ids is None else sample_ids.to(device, torch.int64)
    if labels is not None:
        if ids is None:
            ids = sum(rows_per_rank[: distributed.rank()]) + torch.arange(len(z1), device=device)
        ids = torch.where(labels.to(device) < 0, -1 - ids, labels.to(device, torch.int64))
    if not isinstance(temperature, Tensor):
        temperature = torch.tensor(value)
    with torch.autocast(device.type, enabled=False):
        loss: Tensor = _Contrast.apply(form, z1, z2, temperature, 1.0 / value, ids, tuple(rows_per_rank), validate)
    return loss


class _Contrast(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        form: str,
        z1: Tensor,
        z2: Tensor,
        temperature: Tensor,
        scale: float,
        ids: Tensor | None,
        rows_per_rank: tuple[int, ...],
        validate: bool,
    ) -> Tensor:
        z, ids = _gather(z1, z2, ids, rows_per_rank)
        if validate:
            checks.check_finite(form, z, rows_per_rank)
        first = 2 * sum(rows_per_rank[: distributed.rank()])
        own = slice(first, first + 2 * len(z1))
        if scale > MAX_SCALE_FP32:
            z = z.double()
        elif z.dtype == torch.float16:
            z = z.float()  # its range is too short for the weights in backward
        wide = torch.promote_types(z.dtype, torch.float32)
        # As F.normalize: a vector shorter than 1e-12 is divided by that.
        inverse_norm = torch.linalg.vector_norm(z, dim=1, dtype=wide).clamp(min=1e-12).reciprocal()
        key = _keys(form, ids, z)
        lse = _kernels(z).exponential_sums(z, inverse_norm, key, own, scale).log()
        s_positive = torch.empty_like(lse)
        for rows, unit, positive in _anchors(form, z, inverse_norm, ids, own):
            s_positive[rows] = (unit * positive).sum(dim=1) * scale
        if form == "nt_xent":
            # The positive joins the denominator last: where it dominates, LSE_i - s_i,p(i) would cancel.
            losses = -F.logsigmoid(s_positive - lse)
            pull = torch.sigmoid(lse - s_positive)
            lse = torch.logaddexp(lse, s_positive)
        else:
            losses = lse - s_positive
            pull = torch.ones_like(lse)
        weight = distributed.gather_rows(lse, [2 * n for n in rows_per_rank]).neg_().exp_()
        ctx.save_for_backward(z, inverse_norm, key, ids, weight, pull, temperature)
        ctx.form, ctx.own, ctx.scale, ctx.dtype = form, own, scale, z1.dtype
        ctx.factor = len(rows_per_rank) / len(z)  # W/M
        loss = losses.sum() * ctx.factor
        return loss.to(torch.promote_types(z1.dtype, torch.float32))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        z, inverse_norm, key, ids, weight, pull, temperature = ctx.saved_tensors
        with torch.autocast(z.device.type, enabled=False):
            du = _kernels(z).weighted_sums(z, inverse_norm, key, weight, ctx.own, ctx.scale)
            pulls = pull + pull.view(-1, 2).flip(1).flatten()  # u_k is pulled as an anchor and as a positive
            factor = gradients[0].to(du.dtype) * (ctx.factor * ctx.scale)
            radial = torch.empty_like(pull)
            dz = torch.empty(2, len(du) // 2, du.shape[1], dtype=ctx.dtype, device=du.device)
            for rows, unit, positive in _anchors(ctx.form, z, inverse_norm, ids, ctx.own):
                du_k = (du[rows] - pulls[rows, None] * positive) * factor
                radial[rows] = (unit * du_k).sum(dim=1)
                dz_k = (du_k - radial[rows, None] * unit) * inverse_norm[ctx.own][rows, None]
                dz[:, rows.start // 2 : rows.stop // 2] = dz_k.view(-1, 2, dz.shape[2]).transpose(0, 1)
            dtemperature = None
            if ctx.needs_input_grad[3]:  # a plain number's would be copied to the host, which waits for the device
                # s is homogeneous in u: sum_k u_k.dL/du_k = 2 sum_ij s_ij dL/ds_ij = -2 tau dL/dtau.
                dtemperature = (radial.sum() * (-0.5 * ctx.scale)).to(temperature).view(temperature.shape)
        return None, dz[0], dz[1], dtemperature, None, None, None, None


def _kernels(z: Tensor) -> Any:
    """The module whose `exponential_sums` and `weighted_sums` suit this device and dtype."""
    if not on_gpu(z) or z.dtype == torch.float64 or not HAS_TRITON:
        return tiles
    from dist_ssl.objective import tiles_triton  # torch's builds without CUDA bring no triton

    return tiles_triton


def _gather(z1: Tensor, z2: Tensor, ids: Tensor | None, rows_per_rank: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """z (M, d) and ids (N,) of all ranks, by one all-gather: an id travels as the last elements of its image's row."""
    d = z1.shape[1]
    parts = [z1, z2] if ids is None else [z1, z2, ids[:, None].view(z1.dtype)]
    rows = distributed.gather_rows(torch.cat(parts, dim=1), rows_per_rank)
    if ids is not None:
        ids = rows[:, 2 * d :].contiguous().view(ids.dtype).flatten()
    return rows[:, : 2 * d].reshape(-1, d), ids


def _keys(form: str, ids: Tensor | None, z: Tensor) -> Tensor:
    """(M,) int32: views with equal keys are kept out of each other's denominator."""
    if ids is not None and form != "supervised":
        return _ranks(ids).repeat_interleave(2)
    view = torch.arange(len(z), device=z.device, dtype=torch.int32)
    return view if form == "supervised" else view // 2


def _ranks(ids: Tensor) -> Tensor:
    """(N,) int64 -> (N,) int32 in [0, N), equal where ids are.

    `torch.unique` would make the host wait for how many there are; with int64 in its tiles, a program of the kernels
    needs so many registers that a processor holds one instead of two.
    """
    ordered, order = ids.sort()
    starts = torch.zeros_like(ids, dtype=torch.int32)
    torch.ne(ordered[1:], ordered[:-1], out=starts[1:])
    return torch.empty_like(starts).scatter_(0, order, starts.cumsum(dim=0, dtype=torch.int32))


def _anchors(
    form: str, z: Tensor, inverse_norm: Tensor, ids: Tensor | None, own: slice
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(rows of m, u, the mean of each view's positives), a chunk of own views at a time, since M d is much on a GPU."""
    if form == "supervised":
        assert ids is not None
        image_class = _ranks(ids).long()
        images = torch.zeros_like(image_class).scatter_add_(0, image_class, torch.ones_like(image_class))
        view_class = image_class.repeat_interleave(2)
        sums = inverse_norm.new_zeros(len(images), z.shape[1])
        for views in _chunks(0, len(z)):
            sums.index_add_(0, view_class[views], z[views] * inverse_norm[views, None])
    for views in _chunks(own.start, own.stop):
        unit = z[views] * inverse_norm[views, None]
        if form == "supervised":
            of_view = view_class[views]
            positive = (sums[of_view] - unit) / (2 * images[of_view, None] - 1)
        else:
            positive = unit.view(-1, 2, unit.shape[1]).flip(1).reshape(unit.shape)
        yield slice(views.start - own.start, views.stop - own.start), unit, positive


def _chunks(start: int, stop: int) -> list[slice]:
    return [slice(first, min(first + CHUNK_VIEWS, stop)) for first in range(start, stop, CHUNK_VIEWS)]
