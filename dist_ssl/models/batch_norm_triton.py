"""The kernels of `fused_batch_norm`: batch norm with the addition and the ReLU that follow it, in Triton.

A tensor is seen as rows of channels, (N, C) with C innermost: (B, C), or (B, C, H, W) in channels-last format. What is
elementwise is one kernel over tiles. What is summed over rows goes in two stages, each program its own rows, then the
parts in a fixed order: no atomics, so results are the same bits every time and on every GPU.

Bytes an element in bf16, where torch's kernels, a ReLU and an addition of their own move 26, with the addition 32:

| kernel | reads | writes | bytes |
|---|---|---|---|
| `moments` | x | | 2 |
| `normalise` | x (residual) | y | 4 (6) |
| `gradient_sums` | dy, x (y) | (the residual's gradient) | 4 (8) |
| `gradient` | dy or the residual's gradient, x | dx | 6 |

The ReLU's mask is made again from x where there is no residual, and read from y, which the next layer keeps anyway,
where there is one. So nothing is kept for backward that a network without fusion would not keep.

Legend: N rows, C channels, P parts that the rows are cut into.
"""

# mypy: disable-error-code="no-untyped-def"
# (a kernel's arguments are pointers, numbers of the device and constants of the compiler)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK_C = 128
TILE = 4096  # elements of a step of a kernel's program
# Programs of a reduction: enough for any GPU, and not derived from it, so that another one sums in the same order.
PROGRAMS = 512
MERGED_P, MERGED_C = 64, 16  # a step of `_merge`


def moments(x: Tensor) -> Tensor:
    """(B, C) or channels-last (B, C, H, W) -> (P, 2C + 1) fp32: means, sums of squared differences, count."""
    n, c = x.numel() // x.shape[1], x.shape[1]
    num_parts, rows = _split(n, c)
    parts = x.new_empty((num_parts, 2 * c + 1), dtype=torch.float32)
    block = _blocks(c)
    _moments[(triton.cdiv(c, block["BLOCK_C"]), num_parts)](x, parts, n, c, rows, **block, num_warps=8)
    return parts


def merge(parts: Tensor) -> Tensor:
    """(P, 2C + 1) -> (2C + 1,): all parts as one, which is what a rank sends."""
    c = parts.shape[1] // 2
    merged = parts.new_empty(parts.shape[1])
    _merge[(triton.cdiv(c, MERGED_C),)](
        parts, merged, merged, merged, merged, merged, len(parts), c, 0.0, 0.0,
        FINAL=False, TRACK=False, BLOCK_P=MERGED_P, BLOCK_C=MERGED_C,
    )  # fmt: skip
    return merged


def statistics(
    parts: Tensor, eps: float, momentum: float, running_mean: Tensor | None, running_var: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(P, 2C + 1) -> mean (C,), inverse standard deviation (C,), count (1,); running statistics are moved in place."""
    c = parts.shape[1] // 2
    mean, inverse_std, count = parts.new_empty(c), parts.new_empty(c), parts.new_empty(1)
    track = running_mean is not None
    running = (running_mean, running_var) if track else (mean, mean)
    _merge[(triton.cdiv(c, MERGED_C),)](
        parts, mean, inverse_std, count, *running, len(parts), c, eps, momentum,
        FINAL=True, TRACK=track, BLOCK_P=MERGED_P, BLOCK_C=MERGED_C,
    )  # fmt: skip
    return mean, inverse_std, count


def normalise(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, mean: Tensor, inverse_std: Tensor, relu: bool
) -> Tensor:
    """x, residual -> y, all in the same format and dtype."""
    y = torch.empty_like(x)
    n, c, block = x.numel() // x.shape[1], x.shape[1], _blocks(x.shape[1])
    grid = triton.cdiv(n, block["BLOCK_N"]), triton.cdiv(c, block["BLOCK_C"])
    _normalise[grid](
        x, x if residual is None else residual, weight, bias, mean, inverse_std, y, n, c,
        RESIDUAL=residual is not None, RELU=relu, **block,
    )  # fmt: skip
    return y


def gradient_sums(
    dy: Tensor, x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor, mean: Tensor, inverse_std: Tensor, relu: bool
) -> tuple[Tensor, Tensor]:
    """dy, x -> sums over rows of g and of g xhat, (2, C) fp32, where g is dy behind the ReLU; and g, if y is given."""
    n, c = x.numel() // x.shape[1], x.shape[1]
    num_parts, rows = _split(n, c)
    parts = x.new_empty((num_parts, 2, c), dtype=torch.float32)
    g = x.new_empty(0) if y is None else torch.empty_like(dy)
    block = _blocks(c)
    _gradient_sums[(triton.cdiv(c, block["BLOCK_C"]), num_parts)](
        dy, x, x if y is None else y, weight, bias, mean, inverse_std, g, parts, n, c, rows,
        RELU=relu, FROM_Y=y is not None, **block, num_warps=8,
    )  # fmt: skip
    return parts.sum(dim=0), g


def gradient(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    inverse_std: Tensor,
    sums: Tensor,
    count: Tensor,
    relu: bool,
) -> Tensor:
    """dy (or g, with relu=False), x and the sums (2, C) of all `count` rows -> dx."""
    dx = torch.empty_like(x)
    n, c, block = x.numel() // x.shape[1], x.shape[1], _blocks(x.shape[1])
    grid = triton.cdiv(n, block["BLOCK_N"]), triton.cdiv(c, block["BLOCK_C"])
    _gradient[grid](dy, x, weight, bias, mean, inverse_std, sums, count, dx, n, c, RELU=relu, **block)
    return dx


def _split(n: int, c: int) -> tuple[int, int]:
    """(number of parts, rows of each but the last) of a sum over n rows of c channels."""
    block = _blocks(c)
    tiles, wanted = triton.cdiv(n, block["BLOCK_N"]), triton.cdiv(PROGRAMS, triton.cdiv(c, block["BLOCK_C"]))
    rows = triton.cdiv(tiles, min(wanted, tiles)) * block["BLOCK_N"]
    return triton.cdiv(n, rows), rows


def _blocks(c: int) -> dict[str, int]:
    """Rows and channels of a program's step."""
    block_c = min(MAX_BLOCK_C, triton.next_power_of_2(c))
    return {"BLOCK_N": TILE // block_c, "BLOCK_C": block_c}


@triton.jit
def _tile(rows, last, channels, C):
    """(offsets, which of them are there) of rows below `last` and some channels."""
    inside = (rows < last)[:, None] & (channels < C)[None, :]
    return rows.to(tl.int64)[:, None] * C + channels[None, :], inside


@triton.jit
def _channel(values, channels, C):
    return tl.load(values + channels, mask=channels < C, other=0.0).to(tl.float32)


@triton.jit
def _moments(x, parts, N, C, part_rows, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = tl.program_id(1) * part_rows
    last = min(first + part_rows, N)
    lanes = tl.arange(0, BLOCK_N)
    # Welford's recurrence in each lane, which sees every BLOCK_N-th row, then Chan's formula over the lanes.
    mean = tl.zeros([BLOCK_N, BLOCK_C], dtype=tl.float32)
    centred = tl.zeros([BLOCK_N, BLOCK_C], dtype=tl.float32)
    seen = 0.0
    for start in range(first, last, BLOCK_N):
        offsets, inside = _tile(start + lanes, last, channels, C)
        value = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
        seen += 1.0
        difference = tl.where(inside, value - mean, 0.0)
        mean += difference * (1.0 / seen)
        centred += difference * (value - mean)
    counts = ((last - first - lanes + BLOCK_N - 1) // BLOCK_N).to(tl.float32)[:, None]
    total = (last - first).to(tl.float32)
    part_mean = tl.sum(counts * mean, axis=0) / total
    apart = mean - part_mean[None, :]
    part_centred = tl.sum(centred + counts * apart * apart, axis=0)
    part = parts + tl.program_id(1) * (2 * C + 1)
    tl.store(part + channels, part_mean, mask=channels < C)
    tl.store(part + C + channels, part_centred, mask=channels < C)
    tl.store(part + 2 * C, total, mask=tl.program_id(0) == 0)


@triton.jit
def _merge(
    parts, mean_out, other_out, count_out, running_mean, running_var, P, C, eps, momentum,
    FINAL: tl.constexpr, TRACK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Chan's formula over parts. FINAL gives what the normalisation needs, else one part in the parts' format."""
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    lanes = tl.arange(0, BLOCK_P)
    pitch = 2 * C + 1
    counts = tl.zeros([BLOCK_P], dtype=tl.float32)
    sums = tl.zeros([BLOCK_P, BLOCK_C], dtype=tl.float32)
    for start in range(0, P, BLOCK_P):
        inside = (start + lanes < P)[:, None] & (channels < C)[None, :]
        part = parts + (start + lanes) * pitch
        count = tl.load(part + 2 * C, mask=start + lanes < P, other=0.0)
        counts += count
        sums += count[:, None] * tl.load(part[:, None] + channels[None, :], mask=inside, other=0.0)
    total = tl.sum(counts, axis=0)
    mean = tl.sum(sums, axis=0) / total
    sums = tl.zeros([BLOCK_P, BLOCK_C], dtype=tl.float32)
    for start in range(0, P, BLOCK_P):
        inside = (start + lanes < P)[:, None] & (channels < C)[None, :]
        part = parts + (start + lanes) * pitch
        count = tl.load(part + 2 * C, mask=start + lanes < P, other=0.0)
        apart = tl.load(part[:, None] + channels[None, :], mask=inside, other=0.0) - mean[None, :]
        sums += tl.load(part[:, None] + C + channels[None, :], mask=inside, other=0.0)
        sums += count[:, None] * apart * apart
    centred = tl.sum(sums, axis=0)
    here, is_first = channels < C, tl.program_id(0) == 0
    tl.store(mean_out + channels, mean, mask=here)
    if FINAL:
        tl.store(other_out + channels, 1.0 / tl.sqrt_rn(centred / total + eps), mask=here)
        tl.store(count_out, total, mask=is_first)
        if TRACK:
            before = _channel(running_mean, channels, C)
            tl.store(running_mean + channels, before + momentum * (mean - before), mask=here)
            before = _channel(running_var, channels, C)
            unbiased = centred / tl.maximum(total - 1.0, 1.0)
            tl.store(running_var + channels, before + momentum * (unbiased - before), mask=here)
    else:
        tl.store(other_out + C + channels, centred, mask=here)
        tl.store(count_out + 2 * C, total, mask=is_first)


@triton.jit
def _normalise(
    x, residual, weight, bias, mean, inverse_std, y, N, C,
    RESIDUAL: tl.constexpr, RELU: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    scale = _channel(weight, channels, C) * _channel(inverse_std, channels, C)
    offsets, inside = _tile(tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), N, channels, C)
    value = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    value = _affine(value, scale, bias, mean, channels, C)
    if RESIDUAL:
        value += tl.load(residual + offsets, mask=inside, other=0.0).to(tl.float32)
    if RELU:
        value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(y + offsets, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _affine(value, scale, bias, mean, channels, C):
    """One expression for forward and backward, which have to agree on its sign."""
    return (value - _channel(mean, channels, C)[None, :]) * scale[None, :] + _channel(bias, channels, C)[None, :]


@triton.jit
def _gradient_sums(
    dy, x, y, weight, bias, mean, inverse_std, g_out, parts, N, C, part_rows,
    RELU: tl.constexpr, FROM_Y: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = tl.program_id(1) * part_rows
    last = min(first + part_rows, N)
    inverse = _channel(inverse_std, channels, C)
    scale, centre = _channel(weight, channels, C) * inverse, _channel(mean, channels, C)
    sums = tl.zeros([BLOCK_N, BLOCK_C], dtype=tl.float32)
    sums_x = tl.zeros([BLOCK_N, BLOCK_C], dtype=tl.float32)
    for start in range(first, last, BLOCK_N):
        offsets, inside = _tile(start + tl.arange(0, BLOCK_N), last, channels, C)
        g = tl.load(dy + offsets, mask=inside, other=0.0)
        value = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
        if FROM_Y:
            g = tl.where(tl.load(y + offsets, mask=inside, other=0.0) <= 0, 0.0, g)
            tl.store(g_out + offsets, g, mask=inside)
        elif RELU:
            forward = _affine(value, scale, bias, mean, channels, C).to(x.dtype.element_ty)
            g = tl.where(forward <= 0, 0.0, g)
        g = g.to(tl.float32)
        sums += g
        sums_x += g * (value - centre[None, :])
    part = parts + tl.program_id(1) * 2 * C
    tl.store(part + channels, tl.sum(sums, axis=0), mask=channels < C)
    tl.store(part + C + channels, tl.sum(sums_x, axis=0) * inverse, mask=channels < C)


@triton.jit
def _gradient(
    dy, x, weight, bias, mean, inverse_std, sums, count, dx, N, C,
    RELU: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inverse, centre = _channel(inverse_std, channels, C), _channel(mean, channels, C)
    scale, rows = _channel(weight, channels, C) * inverse, tl.load(count)
    mean_g = _channel(sums, channels, C) / rows
    mean_g_x = _channel(sums + C, channels, C) * inverse / rows
    offsets, inside = _tile(tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), N, channels, C)
    g = tl.load(dy + offsets, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    if RELU:
        forward = _affine(value, scale, bias, mean, channels, C).to(x.dtype.element_ty)
        g = tl.where(forward <= 0, 0.0, g)
    g = (g - mean_g[None, :] - (value - centre[None, :]) * mean_g_x[None, :]) * scale[None, :]
    tl.store(dx + offsets, g.to(dx.dtype.element_ty), mask=inside)
