"""MoCo v3's pass over all pairs of a query and a key as a Triton kernel: what `tiles.query_sums` does, for CUDA.

As `tiles_triton`: a program owns a tile of queries and walks over the keys, without a running maximum and without
atomics. Tensor cores multiply queries and keys as they came, bf16 or fp32; lengths, temperature and exponentials are
fp32. One pass gives the loss and the gradient, two products a pair. Tile sizes are fixed, so that bits repeat.

Legend: n queries of this rank, N keys of all ranks, d dimensions.
"""

# mypy: disable-error-code="no-untyped-def"
# (a kernel's arguments are pointers, numbers of the device and constants of the compiler)
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dist_ssl.objective.tiles_triton import INTERPRETED, MAX_BLOCK_D, _load

HALF = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}  # bf16
SINGLE = {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}  # fp32: larger tiles spill registers
SINGLE_WIDE = SINGLE | {"num_stages": 1}  # d beyond MAX_BLOCK_D: two stages take more shared memory than most GPUs have


def query_sums(
    q: Tensor, k: Tensor, q_inverse_norm: Tensor, k_inverse_norm: Tensor, own: slice, scale: float
) -> tuple[Tensor, Tensor]:
    """sum_j exp(s_ij) and sum_j exp(s_ij) v_j, fp32: q (n, d), k (N, d), (n,), (N,) -> (n,), (n, d).

    s_ij = scale u_i.v_j of the unit vectors u of q and v of k. Key own.start + i is query i's positive, which is left
    out of both.
    """
    q, k = q.contiguous(), k.contiguous()
    block, processors = block_of(q.dtype, q.shape[1]), 1
    if q.is_cuda:
        processors = triton.runtime.driver.active.utils.get_device_properties(q.device.index)["multiprocessor_count"]
    (n, d), total = q.shape, len(k)
    row_tiles, column_tiles = triton.cdiv(n, block["BLOCK_M"]), triton.cdiv(total, block["BLOCK_N"])
    per_split = triton.cdiv(column_tiles, min(max(1, 2 * processors // row_tiles), column_tiles))
    splits, block_d = triton.cdiv(column_tiles, per_split), min(max(16, triton.next_power_of_2(d)), MAX_BLOCK_D)
    sums, pulls = q_inverse_norm.new_empty(splits, n), q_inverse_norm.new_empty(splits, n, d)
    _query_sums[(row_tiles, splits, triton.cdiv(d, block_d))](
        q, k, q_inverse_norm, k_inverse_norm, sums, pulls, own.start, n, total, scale * math.log2(math.e),
        D=d, BLOCK_D=block_d, SPLIT=per_split * block["BLOCK_N"],
        # fp32 products by three tf32 ones, which keeps fp32's precision. The interpreter's bf16 product is broken.
        PRECISION="tf32x3" if q.dtype == torch.float32 else "tf32",
        PRODUCT=tl.float32 if INTERPRETED or q.dtype == torch.float32 else tl.bfloat16, **block,
    )  # fmt: skip
    return sums.sum(dim=0), pulls[0] if splits == 1 else pulls.sum(dim=0)


def block_of(dtype: torch.dtype, d: int) -> dict[str, int]:
    """The tile's sizes."""
    if dtype == torch.float32:
        return SINGLE if d <= MAX_BLOCK_D else SINGLE_WIDE
    return HALF


@triton.jit
def _query_sums(
    q, k, q_inverse_norm, k_inverse_norm, sums, pulls, first, n, N, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offset = tl.program_id(2) * BLOCK_D  # the dimensions of the pull that this program makes
    q_rows = _load(q, rows, 0, n, D, BLOCK_D, PRODUCT)
    row_scale = tl.load(q_inverse_norm + rows, mask=rows < n, other=0.0) * scale
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    pulled = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    begin = tl.program_id(1) * SPLIT
    for start in range(begin, min(begin + SPLIT, N), BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        k_columns = _load(k, columns, 0, N, D, BLOCK_D, PRODUCT)
        s = tl.dot(q_rows, tl.trans(k_columns), input_precision=PRECISION)
        for more in tl.static_range(BLOCK_D, D, BLOCK_D):
            more_rows = _load(q, rows, more, n, D, BLOCK_D, PRODUCT)
            more_columns = _load(k, columns, more, N, D, BLOCK_D, PRODUCT)
            s = tl.dot(more_rows, tl.trans(more_columns), s, input_precision=PRECISION)
        column_scale = tl.load(k_inverse_norm + columns, mask=columns < N, other=0.0)
        e = tl.exp2(s * row_scale[:, None] * column_scale[None, :])
        counts = (columns[None, :] != first + rows[:, None]) & (columns < N)[None, :]
        e = tl.where(counts, e, 0.0)
        total += tl.sum(e, axis=1)
        if D > BLOCK_D:
            k_columns = _load(k, columns, offset, N, D, BLOCK_D, PRODUCT)
        # Rounded to k's dtype as the tensor cores want it; PRODUCT differs from that in the interpreter only.
        w = (e * column_scale[None, :]).to(k.dtype.element_ty).to(PRODUCT)
        pulled = tl.dot(w, k_columns, pulled, input_precision=PRECISION)
    if offset == 0:
        tl.store(sums + tl.program_id(1) * n + rows, total, mask=rows < n)
    dims = offset + tl.arange(0, BLOCK_D)
    inside = (rows < n)[:, None] & (dims < D)[None, :]
    part = pulls + tl.program_id(1).to(tl.int64) * n * D
    tl.store(part + rows.to(tl.int64)[:, None] * D + dims[None, :], pulled, mask=inside)
