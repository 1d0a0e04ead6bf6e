"""What the losses of `objective` refuse, before it hangs or misleads, and in the same words on every rank."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dist_ssl import distributed

MIN_TEMPERATURE = 0.002  # exp(1 / temperature) and its sums stay inside fp64
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def agree(
    form: str,
    rows: Mapping[str, Tensor],
    rows_per_rank: Sequence[int] | None,
    *,
    least: Mapping[str, tuple[float, float]] | None = None,
    per_image: Mapping[str, Tensor | None] | None = None,
    shape: str = "(n, d)",
) -> Sequence[int]:
    """rows_per_rank, checked. Collective where it is None: then every rank sees what every rank was given.

    rows: what has a row an image, by name, of one shape and dtype. least: name -> (number, the least it may be).
    per_image: integers (n,) by name, or None where they were not given.
    Raises ValueError: on every rank where it is collective, else on the rank whose own input is wrong.
    """
    least, per_image, first = least or {}, per_image or {}, next(iter(rows.values()))
    problem = _problem(rows, rows_per_rank, least, per_image, shape)
    if rows_per_rank is None:
        mine: dict[str, Any] = {"shape": tuple(first.shape[1:]), "dtype": first.dtype}
        mine |= {name: number for name, (number, _) in least.items()}
        mine |= {name: ids is not None for name, ids in per_image.items()}
        answers = distributed.gather_objects((problem, len(first) if first.dim() else 0, mine))
        for rank, (other_problem, _, other) in enumerate(answers):
            if other_problem is None and other != answers[0][2]:
                other_problem = f"expected the same as on rank 0, {answers[0][2]}, got {other}"
            if other_problem is not None:
                raise ValueError(f"{form}: rank {rank}: {other_problem}")
        rows_per_rank = [count for _, count, _ in answers]
    elif problem is not None:
        raise ValueError(f"{form}: {problem}")
    if sum(rows_per_rank) < 2:
        raise ValueError(f"{form}: expected at least two images in the global batch, got {sum(rows_per_rank)}")
    return rows_per_rank


def check_finite(form: str, z: Tensor, rows_per_rank: Sequence[int]) -> None:
    """Raise ValueError where z (M, d) of all ranks holds NaN or infinity; every rank holds it, so every rank raises."""
    bad = (~z.isfinite().all(dim=1)).view(sum(rows_per_rank), -1).any(dim=1).cpu()
    for rank, images in enumerate(bad.split(list(rows_per_rank))):
        if images.any():
            listed = images.nonzero().flatten().tolist()
            more = f" and {len(listed) - 8} more" if len(listed) > 8 else ""
            raise ValueError(f"{form}: expected finite z, got NaN or infinity on rank {rank}, rows {listed[:8]}{more}")


def _problem(
    rows: Mapping[str, Tensor],
    rows_per_rank: Sequence[int] | None,
    least: Mapping[str, tuple[float, float]],
    per_image: Mapping[str, Tensor | None],
    shape: str,
) -> str | None:
    """What is wrong with this rank's input taken alone."""
    names, first = " and ".join(rows), next(iter(rows.values()))
    shapes = {tuple(x.shape): None for x in rows.values()}
    if first.dim() != shape.count(",") + 1 or len(shapes) > 1 or 0 in first.shape:
        got, *more = shapes
        return f"expected {names} of one shape {shape}, n and d at least 1, got {' and '.join(map(str, (got, *more)))}"
    dtypes = {x.dtype: None for x in rows.values()}
    if first.dtype not in DTYPES or len(dtypes) > 1:
        return f"expected {names} of one dtype among {DTYPES}, got {' and '.join(map(str, dtypes))}"
    for name, (number, minimum) in least.items():
        if not minimum <= number < math.inf:
            return f"expected {'an' if name[0] in 'aeiou' else 'a'} {name} of at least {minimum}, got {number}"
    for name, ids in per_image.items():
        if ids is not None and (ids.shape != first.shape[:1] or ids.is_floating_point()):
            return f"expected integer {name} of shape ({len(first)},), got {ids.dtype} {tuple(ids.shape)}"
    if rows_per_rank is not None:
        rank, size = distributed.rank(), distributed.world_size()
        if len(rows_per_rank) != size or rows_per_rank[rank] != len(first):
            return f"expected rows_per_rank of {size} ranks with {len(first)} at {rank}, got {list(rows_per_rank)}"
    return None
