"""The objectives against their peers: time, memory, bytes on the wire. `python -m tests.benchmarks.objective [FILE]`.

Prints tables, and writes JSON to FILE. Needs the `bench` extra. On a machine with a GPU it measures the Triton kernels
too, `--sweep` times other tile sizes there, `--gpu-only` leaves the CPU part out, `--methods-only` leaves NT-Xent out.
A few minutes on two quiet cores.

Every CPU rank is a process with one thread on gloo. Times are of forward and backward, of the slowest rank,
candidates in turn, medians with the smallest and largest; cpu_ms is the time that the process ran, which a busy
machine disturbs less. Memory is the growth of the peak resident size in a process
of its own, after a small warm-up. Bytes are what one rank sends, by ring algorithms.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dist_ssl import distributed
from dist_ssl.objective import barlow_twins, byol, moco_v3, nt_xent, sigreg, simsiam, tiles, vicreg
from tests.counting import Count
from tests.pool import Pool
from tests.wrong_objectives import textbook

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
TEMPERATURE = 0.1


# --- candidates ------------------------------------------------------------------------------------------------


def candidate(name: str) -> Loss:
    """A loss of (z1, z2) whose gradients, averaged over ranks, are those of the global batch."""
    warnings.simplefilter("ignore")  # the peers', on import
    size = distributed.world_size()
    match name:
        case "dist_ssl":
            return lambda z1, z2: nt_xent(z1, z2, TEMPERATURE, rows_per_rank=[len(z1)] * size)
        case "dist_ssl, no symmetry":
            tiles._tiles = functools.partial(_TILES, symmetric=False)
            return candidate("dist_ssl")
        case "textbook":
            return lambda z1, z2: textbook(z1, z2, TEMPERATURE)
        case "textbook, compiled":
            return torch.compile(lambda z1, z2: textbook(z1, z2, TEMPERATURE))
        case "lightly":
            from lightly.loss import NTXentLoss

            return NTXentLoss(temperature=TEMPERATURE, gather_distributed=size > 1)
        case "open_clip":  # each view against the other views only: half of the pairs
            from open_clip.loss import ClipLoss
            from torch.nn.functional import normalize

            clip = ClipLoss(local_loss=True, gather_with_grad=True, rank=distributed.rank(), world_size=size)
            return lambda z1, z2: clip(normalize(z1, dim=1), normalize(z2, dim=1), 1 / TEMPERATURE)
        case "pytorch-metric-learning":
            from pytorch_metric_learning.losses import NTXentLoss as MetricLearningNTXentLoss

            loss = MetricLearningNTXentLoss(temperature=TEMPERATURE)
            return lambda z1, z2: loss(torch.cat([z1, z2]), torch.arange(len(z1), device=z1.device).repeat(2))
    return method(name)


def method(name: str) -> Loss:
    """The objectives beside NT-Xent, ours and lightly's, under the same definitions. Targets are the other view."""
    size = distributed.world_size()

    def even(z: torch.Tensor) -> list[int]:
        return [len(z)] * size

    match name:
        case "vicreg":
            return lambda z1, z2: vicreg(z1, z2, rows_per_rank=even(z1))
        case "vicreg, lightly":
            from lightly.loss import VICRegLoss

            return VICRegLoss(gather_distributed=size > 1)
        case "barlow_twins":
            return lambda z1, z2: barlow_twins(z1, z2, rows_per_rank=even(z1))
        case "barlow_twins, lightly":
            from lightly.loss import BarlowTwinsLoss

            return BarlowTwinsLoss(lambda_param=0.0051, gather_distributed=size > 1)
        case "sigreg":
            return lambda z1, z2: sigreg(torch.stack([z1, z2], dim=1), 0, 0, rows_per_rank=even(z1))
        case "sigreg, lightly":
            from lightly.loss.lejepa_loss import SIGReg

            theirs = SIGReg(knots=9, t_max=5.0, num_vectors=256, gather_distributed=size > 1)
            return lambda z1, z2: theirs(torch.stack([z1, z2]))
        case "moco_v3":
            return lambda z1, z2: moco_v3(z1, z2, z1.detach(), z2.detach(), TEMPERATURE, rows_per_rank=even(z1))
        case "byol":
            return lambda z1, z2: byol(z1, z2, z1, z2, rows_per_rank=even(z1))
        case "simsiam":
            return lambda z1, z2: simsiam(z1, z2, z1, z2, rows_per_rank=even(z1))
        case "simsiam, lightly":
            from lightly.loss import NegativeCosineSimilarity

            cosine = NegativeCosineSimilarity()
            return lambda z1, z2: 0.5 * (cosine(z1, z2.detach()) + cosine(z2, z1.detach()))
    raise ValueError(name)


METHODS = [
    # Fewer images than dimensions, as the papers have them: z is gathered. And more: sums are reduced.
    (["vicreg", "vicreg, lightly", "barlow_twins", "barlow_twins, lightly"], 1024, 2048),
    (["vicreg", "vicreg, lightly", "barlow_twins", "barlow_twins, lightly"], 8192, 256),
    (["sigreg", "sigreg, lightly"], 4096, 128),
    (["moco_v3", "byol", "simsiam", "simsiam, lightly"], 8192, 128),
]


_TILES = tiles._tiles


def inputs(views: int, d: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """z1 and z2 of this rank, for a global batch of `views`."""
    n = views // 2 // distributed.world_size()
    generator = torch.Generator().manual_seed(distributed.rank())
    return [torch.randn(n, d, generator=generator).to(device, dtype).requires_grad_() for _ in range(2)]


# --- on the CPU ------------------------------------------------------------------------------------------------


def time_on_rank(names: list[str], views: int, d: int, repetitions: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds by the clock, and of this process."""
    z1, z2 = inputs(views, d)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for repetition in range(repetitions + 1):
        for name in names:
            loss = candidate(name)
            dist.barrier()
            start = time.perf_counter(), time.process_time()
            loss(z1, z2).backward()
            busy = time.process_time() - start[1]
            dist.barrier()
            if repetition:  # the first is a warm-up
                seconds[name].append((time.perf_counter() - start[0], busy))
            tiles._tiles = _TILES
    return seconds


def cost_on_rank(name: str, views: int, d: int) -> tuple[int, int, int]:
    """Growth of the peak memory, bytes sent, collectives in backward."""
    loss = candidate(name)
    loss(*inputs(64, d)).backward()
    z1, z2 = inputs(views, d)
    z1.grad, z2.grad = torch.zeros_like(z1), torch.zeros_like(z2)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmRSS")
    loss(z1, z2).backward()
    growth = _status("VmHWM") - before
    with Count() as forward:
        value = loss(z1, z2)
    with Count() as backward:
        value.backward()
    ranks = distributed.world_size()
    sent = forward.wire_bytes(ranks) + backward.wire_bytes(ranks)
    return growth, sent, len(backward.collectives)


def gradients_on_rank(names: list[str], total: int, d: int) -> list[torch.Tensor]:
    """dL/dz1 of this rank's rows of one global batch in fp64, as it counts in the mean over ranks."""
    z = torch.randn(2, total, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z *= torch.linspace(0.3, 2, d, dtype=z.dtype)
    size, gradients = distributed.world_size(), []
    for name in names:
        torch.manual_seed(0)  # lightly draws SIGReg's slices from it
        z1, z2 = z.chunk(size, dim=1)[distributed.rank()].clone().requires_grad_().unbind()
        gradients += torch.autograd.grad(candidate(name)(z1, z2) / size, z1)
    return gradients


def gradient_errors(names: list[str], ranks: int, total: int = 24, d: int = 10) -> list[float]:
    """How far the averaged gradient on some ranks is from the same loss's on one, relatively."""
    one, many = Pool(1), Pool(ranks)
    (want,), parts = (pool.run(gradients_on_rank, names, total, d, timeout=1800) for pool in (one, many))
    one.close()
    many.close()
    got = [torch.cat(gradient) for gradient in zip(*parts, strict=True)]
    return [float((g - w).norm() / w.norm()) for g, w in zip(got, want, strict=True)]


def measure_methods(ranks: int, repetitions: int) -> list[dict[str, Any]]:
    rows = [row for case in METHODS for row in measure_cpu(ranks, *case, repetitions)]
    for row, error in zip(rows, gradient_errors([row["loss"] for row in rows], ranks), strict=True):
        row["gradient_error"] = f"{error:.0e}"
    return rows


def _status(field: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def measure_cpu(ranks: int, names: list[str], views: int, d: int, repetitions: int) -> list[dict[str, Any]]:
    seconds = []
    if repetitions:
        pool = Pool(ranks)
        seconds = pool.run(time_on_rank, names, views, d, repetitions, timeout=1800)
        pool.close()
    rows = []
    for name in names:
        pool = Pool(ranks)
        costs = pool.run(cost_on_rank, name, views, d, timeout=1800)
        pool.close()
        row = {"loss": name, "ranks": ranks, "views": views, "d": d}
        if seconds:
            slowest = [
                [max(t) for t in zip(*times, strict=True)] for times in zip(*(s[name] for s in seconds), strict=True)
            ]
            row |= spread([clock for clock, _ in slowest])
            row["cpu_ms"] = round(1e3 * statistics.median(busy for _, busy in slowest), 1)
        row["memory_mb"] = round(max(c[0] for c in costs) / 2**20, 1)
        row["sent_mb"], row["collectives_in_backward"] = round(costs[0][1] / 2**20, 3), costs[0][2]
        rows.append(row)
    return rows


def spread(seconds: list[float]) -> dict[str, float]:
    return {
        "ms": round(1e3 * statistics.median(seconds), 1),
        "ms_min": round(1e3 * min(seconds), 1),
        "ms_max": round(1e3 * max(seconds), 1),
    }


def least_bytes(ranks: int, views: int, d: int) -> float:
    """MB that one rank has to send: its z in fp32, and a number a view, to each other rank."""
    return (ranks - 1) * (views // ranks) * (d + 1) * 4 / 2**20


# --- on a GPU --------------------------------------------------------------------------------------------------


def measure_gpu(name: str, views: int, d: int, dtype: torch.dtype, repetitions: int = 10) -> dict[str, Any]:
    row: dict[str, Any] = {"loss": name, "ranks": 1, "views": views, "d": d, "dtype": str(dtype)}
    z1, z2 = inputs(views, d, "cuda", dtype)
    try:
        loss, seconds = candidate(name), []
        for _ in range(repetitions + 2):
            z1.grad = z2.grad = None
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            start = time.perf_counter()
            loss(z1, z2).backward()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
            row["memory_mb"] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
        row |= spread(seconds[2:])
    except torch.OutOfMemoryError:
        row["ms"] = "out of memory"
    tiles._tiles = _TILES
    gc.collect()
    torch.cuda.empty_cache()
    return row


def sweep(views: int, d: int) -> list[dict[str, Any]]:
    """Other tile sizes of both kernels, one changed at a time."""
    from dist_ssl.objective import tiles_triton

    rows = []
    for which in ("FORWARD", "BACKWARD"):
        kept = getattr(tiles_triton, which)
        for block_m, block_n, warps, stages in [
            (64, 64, 4, 3), (64, 128, 4, 2), (64, 128, 4, 3), (128, 64, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3),
            (128, 64, 8, 4), (128, 128, 8, 2), (128, 128, 8, 3), (128, 128, 4, 2), (128, 256, 8, 2), (256, 64, 8, 2),
        ]:  # fmt: skip
            tile = {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": stages}
            setattr(tiles_triton, which, tile)
            rows.append({which: str(tuple(tile.values()))} | measure_gpu("dist_ssl", views, d, torch.bfloat16, 5))
        setattr(tiles_triton, which, kept)
    return rows


# --- the report ------------------------------------------------------------------------------------------------


def show(title: str, rows: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    print(f"\n{title}\n\n| {' | '.join(names)} |\n|{'---|' * len(names)}")
    for row in rows:
        print(f"| {' | '.join(str(row.get(name, '')) for name in names)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", help="where JSON goes")
    parser.add_argument("--views", type=int, default=8192)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--gpu-only", action="store_true")
    parser.add_argument("--methods-only", action="store_true")
    parser.add_argument("--sweep", action="store_true")
    arguments = parser.parse_args()
    views, repetitions, d = arguments.views, arguments.repetitions, 128
    tables: dict[str, list[dict[str, Any]]] = {}

    def table(title: str, rows: list[dict[str, Any]]) -> None:
        tables[title] = rows
        show(title, rows)

    if not arguments.gpu_only:
        for ranks in (2, 1):
            table(f"Methods, {ranks} ranks", measure_methods(ranks, repetitions))
    if not arguments.gpu_only and not arguments.methods_only:
        two = measure_cpu(2, ["dist_ssl", "lightly", "open_clip"], views, d, repetitions)
        for row in two:
            row |= {
                f"{key}_of_lightly": round(row[key] / two[1][key], 3)
                for key in ("ms", "cpu_ms", "memory_mb", "sent_mb")
            }
            row["sent_of_least"] = round(row["sent_mb"] / least_bytes(2, views, d), 3)
        table("Two ranks", two)
        table(
            "One rank",
            measure_cpu(1, ["dist_ssl", "dist_ssl, no symmetry", "textbook", "lightly"], views, d, repetitions),
        )
        table("One rank, small", measure_cpu(1, ["dist_ssl", "pytorch-metric-learning"], views // 32, d, repetitions))
        growing = [views // 2 * 2**k for k in range(5)]
        table("Memory, one rank", [r for v in growing for r in measure_cpu(1, ["dist_ssl"], v, d, 0)])
        many = [r for w in (4, 8) for r in measure_cpu(w, ["dist_ssl", "lightly"], views, d, 0)]
        for row in many:
            row["sent_of_least"] = round(row["sent_mb"] / least_bytes(row["ranks"], views, d), 3)
        table("More ranks than cores: bytes and memory", many)
    if torch.cuda.is_available() and not arguments.methods_only:
        peers = ["dist_ssl", "textbook, compiled", "lightly"]
        for dtype in (torch.bfloat16, torch.float32):
            table(f"{torch.cuda.get_device_name()}, {dtype}", [measure_gpu(p, 65536, d, dtype) for p in peers])
        table("A million views", [measure_gpu("dist_ssl", 2**20, d, torch.bfloat16, 1)])
        if arguments.sweep:
            table("Tile sizes", sweep(65536, d))
    if arguments.file:
        machine = {
            "torch": torch.__version__,
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
        }
        Path(arguments.file).write_text(json.dumps({"machine": machine, "tables": tables}, indent=1))


if __name__ == "__main__":
    main()
