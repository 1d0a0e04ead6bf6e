"""The two passes over all pairs of views, in plain torch: tile by tile, each tile made, used and forgotten.

The path of CPUs, of fp64 and of very small temperatures, and the oracle of the GPU kernels in `tiles_triton`,
which offers the same two functions. Memory is O(M d + tile); a tile stays in a core's cache, in a reused buffer.

Legend: M views of all ranks, m of this rank (rows `own` of M), d dimensions; u_i = z_i / |z_i|, s_ij = scale u_i.u_j.
Pair (i, j) counts unless key_i == key_j, which leaves out a view itself, its positive, and copies of its image.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# |s| <= 64 keeps exp(s) and sums of 10^10 of them inside fp32, so no running maximum is needed. A smaller
# temperature is computed in fp64, whose range ends at `checks.MIN_TEMPERATURE`.
MAX_SCALE_FP32 = 64.0
TILE_ROWS = 256
TILE_ENTRIES_CPU = 2**18  # 1 MiB of fp32: a core's second-level cache
TILE_ENTRIES = 2**26


def exponential_sums(z: Tensor, inverse_norm: Tensor, key: Tensor, own: slice, scale: float) -> Tensor:
    """sum_j exp(s_ij) of this rank's rows i: z (M, d), inverse_norm (M,), key (M,) -> (m,)."""
    unit = z * inverse_norm[:, None]
    sums = unit.new_zeros(len(z))
    for rows, columns, e, mirrored in _tiles(unit, key, own, scale):
        sums[rows] += e.sum(dim=1)
        if mirrored:
            sums[columns] += e.sum(dim=0)
    return sums[own]


def weighted_sums(z: Tensor, inverse_norm: Tensor, key: Tensor, weight: Tensor, own: slice, scale: float) -> Tensor:
    """sum_j exp(s_ij) (weight_i + weight_j) u_j of this rank's rows i: (M, d), (M,), (M,), (M,) -> (m, d)."""
    unit = z * inverse_norm[:, None]
    sums = unit.new_zeros(own.stop - own.start, z.shape[1])
    pair_weight = unit.new_empty(0)
    for rows, columns, e, mirrored in _tiles(unit, key, own, scale):
        torch.add(weight[rows, None], weight[columns], out=pair_weight.resize_(e.shape))
        e.mul_(pair_weight)
        sums[_within(rows, own)].addmm_(e, unit[columns])
        if mirrored:
            sums[_within(columns, own)].addmm_(e.T, unit[rows])
    return sums


def query_sums(u: Tensor, v: Tensor, own: slice, scale: float) -> tuple[Tensor, Tensor]:
    """sum_j exp(s_ij) and sum_j exp(s_ij) v_j, s_ij = scale u_i.v_j: (n, d), (N, d) -> (n,), (n, d).

    Row i of u has its positive in row i of v[own], which is left out of both.
    """
    sums, pulls = u.new_zeros(len(u)), torch.zeros_like(u)
    entries = min(TILE_ENTRIES_CPU if u.device.type == "cpu" else TILE_ENTRIES, TILE_ROWS * len(v))
    width, buffer = entries // TILE_ROWS, u.new_empty(entries)
    for first in range(0, len(u), TILE_ROWS):
        rows = slice(first, min(first + TILE_ROWS, len(u)))
        for column in range(0, len(v), width):
            columns = slice(column, min(column + width, len(v)))
            shape = rows.stop - rows.start, columns.stop - columns.start
            e = buffer[: shape[0] * shape[1]].view(shape)
            torch.addmm(e, u[rows], v[columns].T, beta=0, alpha=scale, out=e).exp_()
            e.diagonal(own.start + first - column).zero_()
            sums[rows] += e.sum(dim=1)
            pulls[rows].addmm_(e, v[columns])
    return sums, pulls


def _within(part: slice, whole: slice) -> slice:
    return slice(part.start - whole.start, part.stop - whole.start)


def _tiles(
    unit: Tensor, key: Tensor, own: slice, scale: float, symmetric: bool = True
) -> Iterator[tuple[slice, slice, Tensor, bool]]:
    """(rows, columns, exp(s) with zeros where keys are equal, mirrored), over own rows and all columns.

    s is symmetric, so of the pairs within `own` only the upper triangle is visited: `mirrored` says that a tile
    stands for its transpose too. The tensor may be overwritten and is valid until the next step.
    """
    label = torch.unique(key, return_inverse=True)[1]
    in_rows = torch.zeros(len(label), dtype=torch.bool, device=label.device)
    largest = TILE_ENTRIES_CPU if unit.device.type == "cpu" else TILE_ENTRIES
    entries = min(largest, TILE_ROWS * len(unit))
    width = entries // TILE_ROWS
    buffer = unit.new_empty(entries)
    for first in range(own.start, own.stop, TILE_ROWS):
        rows = slice(first, min(first + TILE_ROWS, own.stop))
        in_rows.zero_()[label[rows]] = True
        equal = in_rows[label]
        outside = [(0, own.start, False), (own.stop, len(unit), False)]
        inside = [(rows.start, rows.stop, False), (rows.stop, own.stop, True)]
        if not symmetric:
            inside = [(own.start, own.stop, False)]
        for start, stop, mirrored in inside + outside:
            for column in range(start, stop, width):
                columns = slice(column, min(column + width, stop))
                shape = rows.stop - rows.start, columns.stop - columns.start
                e = buffer[: shape[0] * shape[1]].view(shape)
                torch.addmm(e, unit[rows], unit[columns].T, beta=0, alpha=scale, out=e).exp_()
                if equal[columns].any():
                    e.masked_fill_(label[rows, None] == label[columns], 0)
                yield rows, columns, e, mirrored
