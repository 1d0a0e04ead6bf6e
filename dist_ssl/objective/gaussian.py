"""SIGReg over the global batch, and LeJEPA: z is pushed towards an isotropic Gaussian, seen along random directions.

For K unit vectors a_k, u_nk = z_n.a_k and points t_q with weights w_q of the trapezoidal rule times exp(-t_q^2 / 2),

    E_kq = (1/N) sum_n exp(i t_q u_nk) - exp(-t_q^2 / 2)
    L    = (N/K) sum_kq w_q |E_kq|^2                             (Epps and Pulley's statistic, the mean over slices)
    dL/dz_n = (2/K) sum_k a_k Re sum_q i w_q t_q conj(E_kq) exp(i t_q u_nk)

The points are equally spaced and the sums even in t, so only t_q = q dt > 0 are visited, and exp(i t_q u) is the q-th
power of one rotation: a sum of powers for the value, a polynomial by Horner's rule for the gradient, one complex
product a point and no further sine. Rows are visited in tiles, so memory is O(n d + tile).

LeJEPA = (1 - weight) / (N V d) sum_nv |z_nv - mean_g z_ng|^2 + weight SIGReg, g the global views, mean_g with gradient.

Sends: one all-reduce of the sums (2 V K Q numbers in fp64, Q the points with t > 0) forward; nothing backward.

Legend: n images of this rank, N of all, V views, d dimensions, K slices.

The paper's equation weighs by exp(-t^2 / s^2) with s = 1, its listing (Algorithm 1) by exp(-t^2 / 2): taken is the
listing's, with its 17 points on [-5, 5] and 256 slices. The prediction is a mean over dimensions too in the listing
(Algorithm 2), a sum over them in equation 8: taken is the listing's, as is the weight of 0.05 that goes with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from dist_ssl import distributed
from dist_ssl.objective import checks, closed_form

TILE_ENTRIES_CPU = 2**16  # complex numbers: half a megabyte of fp32, a few of which share a core's cache
TILE_ENTRIES = 2**24


def sigreg(
    z: Tensor,
    seed: int,
    step: int,
    num_slices: int = 256,
    num_points: int = 17,
    largest_t: float = 5.0,
    *,
    rows_per_rank: Sequence[int] | None = None,
) -> Tensor:
    """Sketched isotropic Gaussian regularisation (Balestriero and LeCun 2025, LeJEPA, Algorithm 1), a scalar.

    z: (n, d), or (n, V, d), V views of an image: each view is held against the Gaussian alone, and the mean is taken.
        fp32, fp64, or bf16 and fp16 with fp32 inside.
    seed, step: they choose the slices, which are the same on all ranks, for all views and on any device.
    num_points: odd; they lie on [-largest_t, largest_t].
    rows_per_rank: n of every rank, as of `vicreg`.

    The mean over ranks of what is returned, and of the parameter gradients that follow, is the loss of the global
    batch and its gradient. Collective in forward only.
    """
    least: dict[str, tuple[float, float]] = {"seed": (seed, 0), "step": (step, 0), "num_slices": (num_slices, 1)}
    least |= {"num_points": (num_points, 3), "largest_t": (largest_t, 1e-6)}
    shape = "(n, V, d)" if z.dim() == 3 else "(n, d)"
    rows_per_rank = checks.agree("sigreg", {"z": z}, rows_per_rank, least=least, shape=shape)
    if num_points % 2 == 0:
        raise ValueError(f"sigreg: expected an odd num_points, so that t = 0 is among them, got {num_points}")
    directions = slices(z.shape[-1], num_slices, seed, step)
    return closed_form.scalar(partial(_sigreg, rows_per_rank, directions, num_points // 2, largest_t), z)


def lejepa(
    z: Tensor,
    seed: int,
    step: int,
    weight: float = 0.05,
    num_slices: int = 256,
    num_points: int = 17,
    largest_t: float = 5.0,
    *,
    global_views: slice = slice(None),
    rows_per_rank: Sequence[int] | None = None,
) -> Tensor:
    """LeJEPA (Balestriero and LeCun 2025, Algorithm 2): (1 - weight) * prediction + weight * `sigreg`, a scalar.

    z: (n, V, d). weight: the paper's lambda. global_views: those among the V whose mean all views predict.
    Other arguments, and what is returned: `sigreg`. Collective in forward only.
    """
    least: dict[str, tuple[float, float]] = {"weight": (weight, 0), "1 - weight": (1 - weight, 0)}
    rows_per_rank = checks.agree("lejepa", {"z": z}, rows_per_rank, least=least, shape="(n, V, d)")
    spread = sigreg(z, seed, step, num_slices, num_points, largest_t, rows_per_rank=rows_per_rank)
    mean = len(rows_per_rank) / (sum(rows_per_rank) * z.shape[1] * z.shape[2])
    return squared_distances(z, global_views) * ((1 - weight) * mean) + weight * spread


def squared_distances(z: Tensor, global_views: slice = slice(None)) -> Tensor:
    """The sum of the squared distances of all views (n, V, d) to the mean of their image's global ones."""
    wide = z.to(closed_form.wide(z.dtype))
    return (wide - wide[:, global_views].mean(dim=1, keepdim=True)).square().sum()


def slices(d: int, num_slices: int, seed: int, step: int) -> Tensor:
    """(d, num_slices) fp64 unit columns, drawn on the host, so that they don't depend on the device."""
    generator = np.random.Generator(np.random.Philox(key=[seed, step]))
    normal = torch.from_numpy(generator.standard_normal((d, num_slices)))
    return normal / torch.linalg.vector_norm(normal, dim=0)


def _sigreg(
    rows_per_rank: Sequence[int], directions: Tensor, num_points: int, largest_t: float, z: Tensor
) -> tuple[Tensor, Tensor]:
    total, dtype = sum(rows_per_rank), closed_form.wide(z.dtype)
    directions = directions.to(dtype)
    if z.is_cuda:  # from pinned memory, so that the host does not wait for the device
        directions = directions.pin_memory()
    directions = directions.to(z.device, non_blocking=True)
    z_vnd = z.to(dtype).reshape(len(z), -1, z.shape[-1]).transpose(0, 1)
    dt, num_slices = largest_t / num_points, directions.shape[1]
    t = dt * torch.arange(1, num_points + 1, dtype=torch.float64, device=z.device)[:, None]
    window = (-0.5 * t.square()).exp()
    weight = 2 * dt * window  # t and -t
    weight[-1] *= 0.5  # the rule's ends
    turns = directions * dt
    tile_rows = max(1, (TILE_ENTRIES if z.is_cuda else TILE_ENTRIES_CPU) // num_slices)

    sums = torch.zeros(len(z_vnd), num_points, num_slices, dtype=torch.complex128, device=z.device)
    for view, sums_of_view in zip(z_vnd, sums, strict=True):
        for rows in view.split(tile_rows):
            rotation = _rotations(rows, turns)
            power = rotation.clone()
            for point in range(num_points):
                sums_of_view[point] += power.sum(dim=0, dtype=torch.complex128)
                power *= rotation
    distributed.sum_over_ranks(torch.view_as_real(sums))
    error = sums / total - window
    loss = (error.abs().square() * weight).sum() * (total / (num_slices * len(z_vnd)))

    scale = 2 * len(rows_per_rank) / (num_slices * len(z_vnd))
    coefficients = (error.conj() * (1j * scale * weight * t)).to(turns.dtype.to_complex())
    dz = torch.empty_like(z_vnd)
    for view, dz_of_view, coefficient in zip(z_vnd, dz, coefficients, strict=True):
        for rows, dz_of_rows in zip(view.split(tile_rows), dz_of_view.split(tile_rows), strict=True):
            rotation = _rotations(rows, turns)
            polynomial = rotation * coefficient[-1]
            for point in range(num_points - 2, -1, -1):
                polynomial.add_(coefficient[point]).mul_(rotation)
            dz_of_rows.copy_(polynomial.real @ directions.T)
    return loss, dz.transpose(0, 1).reshape(z.shape)


def _rotations(z: Tensor, turns: Tensor) -> Tensor:
    """exp(i u dt) of some rows: (rows, d), (d, K) -> (rows, K), complex."""
    angle = z @ turns
    return torch.polar(torch.ones_like(angle), angle)
