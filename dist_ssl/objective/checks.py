"""What the losses of `objective` refuse, before it hangs or misleads, and in the same words on every rank."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dist_ssl import distributed

MIN_TEMPERATURE = 0.002  # exp(1 / temperature) and its sums stay inside fp64
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def agree(
    form: str,
    z1: Tensor,
    z2: Tensor,
    temperature: float,
    rows_per_rank: Sequence[int] | None,
    ids: Tensor | None,
    labels: Tensor | None,
) -> Sequence[int]:
    """rows_per_rank, checked. Collective where it is None: then every rank sees what every rank was given.

    Raises ValueError: on every rank where it is collective, else on the rank whose own input is wrong.
    """
    problem = _problem(z1, z2, temperature, rows_per_rank, ids, labels)
    if rows_per_rank is None:
        mine = {"shape": tuple(z1.shape[1:]), "dtype": z1.dtype, "temperature": temperature}
        mine |= {"sample_ids": ids is not None, "labels": labels is not None}
        answers = distributed.gather_objects((problem, len(z1) if z1.dim() else 0, mine))
        for rank, (other_problem, _, other) in enumerate(answers):
            if other_problem is None and other != answers[0][2]:
                other_problem = f"expected the same as on rank 0, {answers[0][2]}, got {other}"
            if other_problem is not None:
                raise ValueError(f"{form}: rank {rank}: {other_problem}")
        rows_per_rank = [rows for _, rows, _ in answers]
    elif problem is not None:
        raise ValueError(f"{form}: {problem}")
    if sum(rows_per_rank) < 2:
        raise ValueError(f"{form}: expected at least two images in the global batch, got {sum(rows_per_rank)}")
    return rows_per_rank


def check_finite(form: str, z: Tensor, rows_per_rank: Sequence[int]) -> None:
    """Raise ValueError where z (M, d) of all ranks holds NaN or infinity; every rank holds it, so every rank raises."""
    bad = (~z.isfinite().all(dim=1)).view(-1, 2).any(dim=1).cpu()
    for rank, images in enumerate(bad.split(list(rows_per_rank))):
        if images.any():
            listed = images.nonzero().flatten().tolist()
            more = f" and {len(listed) - 8} more" if len(listed) > 8 else ""
            raise ValueError(f"{form}: expected finite z, got NaN or infinity on rank {rank}, rows {listed[:8]}{more}")


def _problem(
    z1: Tensor,
    z2: Tensor,
    temperature: float,
    rows_per_rank: Sequence[int] | None,
    ids: Tensor | None,
    labels: Tensor | None,
) -> str | None:
    """What is wrong with this rank's input taken alone."""
    if z1.dim() != 2 or z1.shape != z2.shape or 0 in z1.shape:
        got = f"{tuple(z1.shape)} and {tuple(z2.shape)}"
        return f"expected z1 and z2 of one shape (n, d), n and d at least 1, got {got}"
    if z1.dtype not in DTYPES or z1.dtype != z2.dtype:
        return f"expected z1 and z2 of one dtype among {DTYPES}, got {z1.dtype} and {z2.dtype}"
    if not MIN_TEMPERATURE <= temperature < math.inf:
        return f"expected a temperature of at least {MIN_TEMPERATURE}, got {temperature}"
    for name, per_image in (("sample_ids", ids), ("labels", labels)):
        if per_image is not None and (per_image.shape != z1.shape[:1] or per_image.is_floating_point()):
            return f"expected integer {name} of shape ({len(z1)},), got {per_image.dtype} {tuple(per_image.shape)}"
    if rows_per_rank is not None:
        rank, size = distributed.rank(), distributed.world_size()
        if len(rows_per_rank) != size or rows_per_rank[rank] != len(z1):
            return f"expected rows_per_rank of {size} ranks with {len(z1)} at {rank}, got {list(rows_per_rank)}"
    return None
