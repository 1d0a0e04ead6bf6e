"""The two passes over all pairs of views as Triton kernels: what `tiles` does, for CUDA.

A program owns a tile of this rank's views and walks over the columns, as attention does, without a running maximum
(see `objective.MAX_SCALE_FP32`) and without atomics, so results are the same bits every time. Tensor cores multiply
z as it came, bf16 or fp32; lengths, temperature and exponentials are fp32 and applied to the products. Where there
are fewer row tiles than processors, columns are split among programs and the parts added in a fixed order.

With M views there are three M x m x d products: one forward, two backward. Symmetry would save a third of them, as
on the CPU, but two programs would then add to the same row, which needs atomics or a second pass.

Tile sizes are fixed, not autotuned: another size is another order of summation, and a resumed run has to repeat the
bits of the one that was interrupted. `python -m tests.benchmarks.objective --sweep` times others.

Legend: M views of all ranks, m of this rank (rows `own` of M), d dimensions.
"""

# mypy: disable-error-code="no-untyped-def"
# (a kernel's arguments are pointers, numbers of the device and constants of the compiler)
from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK_D = 128
# Hopper and newer: two programs of the forward pass fit a processor, so one's products hide the other's exponentials.
FORWARD = {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2}
BACKWARD = {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3}
SMALL = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}  # bf16 on other GPUs
# fp32, whose products by three tf32 ones take many registers: larger tiles spill them.
SINGLE = {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}
SINGLE_BACKWARD = {"BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2}  # Hopper, d up to 128: 180 KB
SINGLE_BACKWARD_SMALL = {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}
INTERPRETED = triton.knobs.runtime.interpret


def exponential_sums(z: Tensor, inverse_norm: Tensor, key: Tensor, own: slice, scale: float) -> Tensor:
    """sum_j exp(s_ij) of this rank's rows i: z (M, d), inverse_norm (M,), key (M,) -> (m,) fp32."""
    grid, launch = _plan(z, own, FORWARD, SINGLE, SINGLE)
    rows = own.stop - own.start
    parts = inverse_norm.new_empty(grid[1], rows)
    _exponential_sums[grid](z, inverse_norm, key, parts, own.start, rows, len(z), scale * math.log2(math.e), **launch)
    return parts.sum(dim=0)


def weighted_sums(z: Tensor, inverse_norm: Tensor, key: Tensor, weight: Tensor, own: slice, scale: float) -> Tensor:
    """sum_j exp(s_ij) (weight_i + weight_j) u_j of this rank's rows i: (M, d), (M,), (M,), (M,) -> (m, d) fp32."""
    single = SINGLE_BACKWARD if z.shape[1] <= MAX_BLOCK_D else SINGLE_BACKWARD_SMALL
    grid, launch = _plan(z, own, BACKWARD, single, SINGLE_BACKWARD_SMALL)
    rows, d = own.stop - own.start, z.shape[1]
    parts = inverse_norm.new_empty(grid[1], rows, d)
    chunks_of_d = triton.cdiv(d, launch["BLOCK_D"])
    scale *= math.log2(math.e)
    _weighted_sums[(*grid, chunks_of_d)](z, inverse_norm, key, weight, parts, own.start, rows, len(z), scale, **launch)
    return parts[0] if len(parts) == 1 else parts.sum(dim=0)


def _plan(
    z: Tensor, own: slice, large: dict[str, int], large_single: dict[str, int], single: dict[str, int]
) -> tuple[tuple[int, int], dict[str, Any]]:
    """The grid (row tiles, column splits) and the kernel's constants; the large tiles are for Hopper and newer."""
    block, processors = single if z.dtype == torch.float32 else SMALL, 1
    if z.is_cuda:
        device = triton.runtime.driver.active.utils.get_device_properties(z.device.index)
        processors = device["multiprocessor_count"]
        if device["max_shared_mem"] >= 200 * 1024:
            block = large_single if z.dtype == torch.float32 else large
    row_tiles = triton.cdiv(own.stop - own.start, block["BLOCK_M"])
    column_tiles = triton.cdiv(len(z), block["BLOCK_N"])
    splits = min(max(1, 2 * processors // row_tiles), column_tiles)
    per_split = triton.cdiv(column_tiles, splits)
    d = z.shape[1]
    constants = {
        "D": d,
        "BLOCK_D": min(max(16, triton.next_power_of_2(d)), MAX_BLOCK_D),
        "SPLIT": per_split * block["BLOCK_N"],
        # fp32 products by three tf32 ones, which keeps fp32's precision. The interpreter's bf16 product is broken.
        "PRECISION": "tf32x3" if z.dtype == torch.float32 else "tf32",
        "PRODUCT": tl.float32 if INTERPRETED or z.dtype == torch.float32 else tl.bfloat16,
    }
    return (row_tiles, triton.cdiv(column_tiles, per_split)), {**block, **constants}


@triton.jit
def _load(z, rows, offset, M, D: tl.constexpr, BLOCK_D: tl.constexpr, PRODUCT: tl.constexpr):
    """Dimensions [offset, offset + BLOCK_D) of some rows of z, zero beyond its edges."""
    dims = offset + tl.arange(0, BLOCK_D)
    inside = (rows < M)[:, None] & (dims < D)[None, :]
    return tl.load(z + rows.to(tl.int64)[:, None] * D + dims[None, :], mask=inside, other=0.0).to(PRODUCT)


@triton.jit
def _exponentials(
    z, z_rows, z_columns, rows, columns, row_scale, column_scale, row_key, key, M,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """exp(s) of a tile, zero where keys are equal and beyond the last column."""
    s = tl.dot(z_rows, tl.trans(z_columns), input_precision=PRECISION)
    for offset in tl.static_range(BLOCK_D, D, BLOCK_D):
        more_rows = _load(z, rows, offset, M, D, BLOCK_D, PRODUCT)
        more_columns = _load(z, columns, offset, M, D, BLOCK_D, PRODUCT)
        s = tl.dot(more_rows, tl.trans(more_columns), s, input_precision=PRECISION)
    e = tl.exp2(s * row_scale[:, None] * column_scale[None, :])
    column_key = tl.load(key + columns, mask=columns < M, other=0)
    counts = (row_key[:, None] != column_key[None, :]) & (columns < M)[None, :]
    return tl.where(counts, e, 0.0)


@triton.jit
def _exponential_sums(
    z, inverse_norm, key, parts, first, m, M, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    own_rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = first + own_rows
    z_rows = _load(z, rows, 0, M, D, BLOCK_D, PRODUCT)
    row_scale = tl.load(inverse_norm + rows, mask=rows < M, other=0.0) * scale
    row_key = tl.load(key + rows, mask=rows < M, other=0)
    sums = tl.zeros([BLOCK_M], dtype=tl.float32)
    begin = tl.program_id(1) * SPLIT
    for start in range(begin, min(begin + SPLIT, M), BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        z_columns = _load(z, columns, 0, M, D, BLOCK_D, PRODUCT)
        column_scale = tl.load(inverse_norm + columns, mask=columns < M, other=0.0)
        e = _exponentials(
            z, z_rows, z_columns, rows, columns, row_scale, column_scale, row_key, key, M,
            D, BLOCK_D, PRECISION, PRODUCT,
        )  # fmt: skip
        sums += tl.sum(e, axis=1)
    tl.store(parts + tl.program_id(1) * m + own_rows, sums, mask=own_rows < m)


@triton.jit
def _weighted_sums(
    z, inverse_norm, key, weight, parts, first, m, M, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    own_rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = first + own_rows
    offset = tl.program_id(2) * BLOCK_D  # the dimensions of the sum that this program makes
    z_rows = _load(z, rows, 0, M, D, BLOCK_D, PRODUCT)
    row_scale = tl.load(inverse_norm + rows, mask=rows < M, other=0.0) * scale
    row_weight = tl.load(weight + rows, mask=rows < M, other=0.0)
    row_key = tl.load(key + rows, mask=rows < M, other=0)
    sums = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    begin = tl.program_id(1) * SPLIT
    for start in range(begin, min(begin + SPLIT, M), BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        z_columns = _load(z, columns, 0, M, D, BLOCK_D, PRODUCT)
        column_scale = tl.load(inverse_norm + columns, mask=columns < M, other=0.0)
        e = _exponentials(
            z, z_rows, z_columns, rows, columns, row_scale, column_scale, row_key, key, M,
            D, BLOCK_D, PRECISION, PRODUCT,
        )  # fmt: skip
        column_weight = tl.load(weight + columns, mask=columns < M, other=0.0)
        w = e * (row_weight[:, None] + column_weight[None, :]) * column_scale[None, :]
        if D > BLOCK_D:
            z_columns = _load(z, columns, offset, M, D, BLOCK_D, PRODUCT)
        # Rounded to z's dtype as the tensor cores want it; PRODUCT differs from that in the interpreter only.
        w = w.to(z.dtype.element_ty).to(PRODUCT)
        sums = tl.dot(w, z_columns, sums, input_precision=PRECISION)
    dims = offset + tl.arange(0, BLOCK_D)
    inside = (own_rows < m)[:, None] & (dims < D)[None, :]
    part = parts + tl.program_id(1).to(tl.int64) * m * D
    tl.store(part + own_rows.to(tl.int64)[:, None] * D + dims[None, :], sums, mask=inside)
