"""NT-Xent over the global batch, exact on any number of ranks, and two losses that share its machinery.

With s_ij = u_i.u_j / tau of unit vectors u and the positive p(i), the other view of i's image,

    L = (1/M) sum_i ( LSE_i - s_i,p(i) ),      LSE_i = log sum_{j != i} exp(s_ij)
    dL/du_k = (1/(M tau)) [ sum_j (P_kj + P_jk) u_j - 2 u_p(k) ],   P_kj = exp(s_kj - LSE_k),  P_jk = exp(s_kj - LSE_j)

s is symmetric, so a rank that knows all z and all LSE has its own rows' whole gradient at hand: one all-gather of z
and one of M numbers forward, no collective in backward. The pairs are visited in tiles that are computed again in
backward (`tiles`; `tiles_triton` on CUDA), so memory is O(M d), never O(M m).

With V > 2 views an image's other views are all positives and all in the denominator, and s_i,p(i) is their mean.

Legend: W ranks; n images of this rank, N of all; V views of an image; m = V n and M = V N views; d dimensions. Rows of
(M, d) are ordered by rank, image, view: row r belongs to image r // V, and of two views the positive is row r ^ 1.
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
from dist_ssl.objective.closed_form import exact_products

CHUNK_VIEWS = 8192


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
    return _contrast("nt_xent", {"z1": z1, "z2": z2}, temperature, rows_per_rank, sample_ids, None, validate)


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
    return _contrast("decoupled", {"z1": z1, "z2": z2}, temperature, rows_per_rank, sample_ids, None, validate)


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
    return _contrast("supervised", {"z1": z1, "z2": z2}, temperature, rows_per_rank, sample_ids, labels, validate)


def nt_xent_views(
    z: Tensor,
    temperature: float | Tensor,
    *,
    rows_per_rank: Sequence[int] | None = None,
    sample_ids: Tensor | None = None,
    validate: bool = False,
) -> Tensor:
    """`nt_xent` over V views, z (n, V, d), as L_out of Khosla et al. 2020 with an image's views as its class.

    Positives are the other views of the image, their mean outside the logarithm; all of them are in the denominator.
    Other arguments: `nt_xent`, which it is for V = 2.
    """
    return _contrast("nt_xent", {"z": z}, temperature, rows_per_rank, sample_ids, None, validate)


def decoupled_views(
    z: Tensor,
    temperature: float | Tensor,
    *,
    rows_per_rank: Sequence[int] | None = None,
    sample_ids: Tensor | None = None,
    validate: bool = False,
) -> Tensor:
    """`decoupled` over V views, z (n, V, d): no view of the image is in the denominator. Arguments: `nt_xent`."""
    return _contrast("decoupled", {"z": z}, temperature, rows_per_rank, sample_ids, None, validate)


def supervised_views(
    z: Tensor,
    temperature: float | Tensor,
    labels: Tensor,
    *,
    rows_per_rank: Sequence[int] | None = None,
    sample_ids: Tensor | None = None,
    validate: bool = False,
) -> Tensor:
    """`supervised` over V views, z (n, V, d). Arguments: `supervised`."""
    return _contrast("supervised", {"z": z}, temperature, rows_per_rank, sample_ids, labels, validate)


def _contrast(
    form: str,
    rows: dict[str, Tensor],
    temperature: float | Tensor,
    rows_per_rank: Sequence[int] | None,
    sample_ids: Tensor | None,
    labels: Tensor | None,
    validate: bool,
) -> Tensor:
    value = float(temperature.detach()) if isinstance(temperature, Tensor) else temperature
    least, per_image = {"temperature": (value, checks.MIN_TEMPERATURE)}, {"sample_ids": sample_ids, "labels": labels}
    views, shape = tuple(rows.values()), "(n, d)"
    if "z" in rows:
        views, shape = (rows["z"].unbind(1) if rows["z"].dim() == 3 else ()), "(n, V, d)"
        least["number of views"] = len(views), 2
    rows_per_rank = checks.agree(form, rows, rows_per_rank, least=least, per_image=per_image, shape=shape)
    device, n = views[0].device, len(views[0])
    ids = None if sample_ids is None else sample_ids.to(device, torch.int64)
    if labels is not None:
        if ids is None:
            ids = sum(rows_per_rank[: distributed.rank()]) + torch.arange(n, device=device)
        ids = torch.where(labels.to(device) < 0, -1 - ids, labels.to(device, torch.int64))
    if not isinstance(temperature, Tensor):
        temperature = torch.tensor(value)
    with exact_products(device.type):
        loss: Tensor = _Contrast.apply(form, temperature, 1.0 / value, ids, tuple(rows_per_rank), validate, *views)
    return loss


class _Contrast(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        form: str,
        temperature: Tensor,
        scale: float,
        ids: Tensor | None,
        rows_per_rank: tuple[int, ...],
        validate: bool,
        *views: Tensor,
    ) -> Tensor:
        num_views, dtype = len(views), views[0].dtype
        z, ids = _gather(views, ids, rows_per_rank)
        if validate:
            checks.check_finite(form, z, rows_per_rank)
        first = num_views * sum(rows_per_rank[: distributed.rank()])
        own = slice(first, first + num_views * len(views[0]))
        if scale > tiles.MAX_SCALE_FP32:
            z = z.double()
        elif z.dtype == torch.float16:
            z = z.float()  # its range is too short for the weights in backward
        wide = torch.promote_types(z.dtype, torch.float32)
        # As F.normalize: a vector shorter than 1e-12 is divided by that.
        inverse_norm = torch.linalg.vector_norm(z, dim=1, dtype=wide).clamp(min=1e-12).reciprocal()
        key = _keys(form, ids, z, num_views)
        lse = _kernels(z).exponential_sums(z, inverse_norm, key, own, scale)
        s_positive = torch.empty_like(lse)
        for rows, unit, positive in _anchors(form, z, inverse_norm, ids, own, num_views):
            s_positive[rows] = (unit * positive).sum(dim=1) * scale
            if form == "nt_xent" and num_views > 2:
                lse[rows] += _within_images(unit, num_views, scale)[0].sum(dim=2).flatten()
        lse = lse.log()
        if form == "nt_xent" and num_views == 2:
            # The positive joins the denominator last: where it dominates, LSE_i - s_i,p(i) would cancel.
            losses = -F.logsigmoid(s_positive - lse)
            pull = torch.sigmoid(lse - s_positive)
            lse = torch.logaddexp(lse, s_positive)
        else:
            losses = lse - s_positive
            pull = torch.ones_like(lse)
        weight = distributed.gather_rows(lse, [num_views * n for n in rows_per_rank]).neg_().exp_()
        ctx.save_for_backward(z, inverse_norm, key, ids, weight, pull, temperature)
        ctx.form, ctx.own, ctx.scale, ctx.num_views, ctx.dtype = form, own, scale, num_views, dtype
        ctx.factor = len(rows_per_rank) / len(z)  # W/M
        loss = losses.sum() * ctx.factor
        return loss.to(torch.promote_types(dtype, torch.float32))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        z, inverse_norm, key, ids, weight, pull, temperature = ctx.saved_tensors
        num_views = ctx.num_views
        with exact_products(z.device.type):
            du = _kernels(z).weighted_sums(z, inverse_norm, key, weight, ctx.own, ctx.scale)
            # u_k is pulled as an anchor and as a positive. Of more views than two each pulls in full.
            pulls = pull + pull.view(-1, 2).flip(1).flatten() if num_views == 2 else 2 * pull
            factor = gradients[0].to(du.dtype) * (ctx.factor * ctx.scale)
            radial = torch.empty_like(pull)
            dz = torch.empty(num_views, len(du) // num_views, du.shape[1], dtype=ctx.dtype, device=du.device)
            for rows, unit, positive in _anchors(ctx.form, z, inverse_norm, ids, ctx.own, num_views):
                if ctx.form == "nt_xent" and num_views > 2:
                    e, unit_nvd = _within_images(unit, num_views, ctx.scale)
                    w = weight[ctx.own][rows].view(-1, num_views, 1)
                    du[rows] += (e * (w + w.mT) @ unit_nvd).flatten(0, 1)
                du_k = (du[rows] - pulls[rows, None] * positive) * factor
                radial[rows] = (unit * du_k).sum(dim=1)
                dz_k = (du_k - radial[rows, None] * unit) * inverse_norm[ctx.own][rows, None]
                images = slice(rows.start // num_views, rows.stop // num_views)
                dz[:, images] = dz_k.view(-1, num_views, dz.shape[2]).transpose(0, 1)
            # s is homogeneous in u: sum_k u_k.dL/du_k = 2 sum_ij s_ij dL/ds_ij = -2 tau dL/dtau.
            dtemperature = None
            if ctx.needs_input_grad[1]:  # to bring it to the host a GPU is waited for
                dtemperature = (radial.sum() * (-0.5 * ctx.scale)).to(temperature).view(temperature.shape)
        return None, dtemperature, None, None, None, None, *dz


def _kernels(z: Tensor) -> Any:
    """The module whose `exponential_sums` and `weighted_sums` suit this device and dtype."""
    if not on_gpu(z) or z.dtype == torch.float64 or not HAS_TRITON:
        return tiles
    from dist_ssl.objective import tiles_triton  # torch's builds without CUDA bring no triton

    return tiles_triton


def _gather(views: Sequence[Tensor], ids: Tensor | None, rows_per_rank: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """z (M, d) and ids (N,) of all ranks, by one all-gather: an id travels as the last elements of its image's row."""
    d = views[0].shape[1]
    parts = [*views] if ids is None else [*views, ids[:, None].view(views[0].dtype)]
    rows = distributed.gather_rows(torch.cat(parts, dim=1), rows_per_rank)
    if ids is not None:
        ids = rows[:, len(views) * d :].contiguous().view(ids.dtype).flatten()
    return rows[:, : len(views) * d].reshape(-1, d), ids


def _keys(form: str, ids: Tensor | None, z: Tensor, num_views: int) -> Tensor:
    """(M,) int32: views with equal keys are kept out of each other's denominator."""
    if ids is not None and form != "supervised":
        return _ranks(ids).repeat_interleave(num_views)
    view = torch.arange(len(z), device=z.device, dtype=torch.int32)
    return view if form == "supervised" else view // num_views


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
    form: str, z: Tensor, inverse_norm: Tensor, ids: Tensor | None, own: slice, num_views: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(rows of m, u, the mean of each view's positives), a chunk of own views at a time, since M d is much on a GPU."""
    if form == "supervised":
        assert ids is not None
        image_class = _ranks(ids).long()
        images = torch.zeros_like(image_class).scatter_add_(0, image_class, torch.ones_like(image_class))
        view_class = image_class.repeat_interleave(num_views)
        sums = inverse_norm.new_zeros(len(images), z.shape[1])
        for views in _chunks(0, len(z), num_views):
            sums.index_add_(0, view_class[views], z[views] * inverse_norm[views, None])
    for views in _chunks(own.start, own.stop, num_views):
        unit = z[views] * inverse_norm[views, None]
        if form == "supervised":
            of_view = view_class[views]
            positive = (sums[of_view] - unit) / (num_views * images[of_view, None] - 1)
        else:
            unit_nvd = unit.view(-1, num_views, unit.shape[1])
            if num_views == 2:
                positive = unit_nvd.flip(1).reshape(unit.shape)
            else:
                positive = ((unit_nvd.sum(dim=1, keepdim=True) - unit_nvd) / (num_views - 1)).flatten(0, 1)
        yield slice(views.start - own.start, views.stop - own.start), unit, positive


def _within_images(unit: Tensor, num_views: int, scale: float) -> tuple[Tensor, Tensor]:
    """(exp(s) of the views of each image, zero on the diagonal: (n, V, V), u (n, V, d))."""
    unit_nvd = unit.view(-1, num_views, unit.shape[1])
    e = (unit_nvd @ unit_nvd.mT * scale).exp_()
    e.diagonal(dim1=1, dim2=2).zero_()
    return e, unit_nvd


def _chunks(start: int, stop: int, num_views: int) -> list[slice]:
    """All views of an image are in one chunk."""
    size = max(CHUNK_VIEWS // num_views, 1) * num_views
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]
