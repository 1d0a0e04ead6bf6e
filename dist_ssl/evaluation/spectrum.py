"""How many directions a layer uses: its singular spectrum, RankMe, condition number. Over all ranks' rows, in fp64.

Legend: n rows of all ranks, D features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dist_ssl.evaluation.linear import Rows, all_reduce

LEVELS = (1e-1, 1e-2, 1e-3, 1e-4)
POINTS = 64  # of a spectrum that are kept, evenly over the ranks of its values
RESOLVED = 1e-6  # of the largest singular value: below it is what fp32 rounded


def moments(rows: Rows) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D) of all ranks' rows, fp64, centred before they are squared.

    Collective: two all-reduces.
    """
    dim = rows.features.shape[1]
    total = torch.zeros(dim, dtype=torch.float64, device=rows.device)
    for start, stop in rows.blocks(dim):
        total += rows.x(start, stop).double().sum(0)
    all_reduce(total)
    mean = total / len(rows.labels)
    products = torch.zeros(dim, dim, dtype=torch.float64, device=rows.device)
    for start, stop in rows.blocks(dim):
        centred = rows.x(start, stop).double() - mean
        products.addmm_(centred.T, centred)
    all_reduce(products)
    return mean, products / len(rows.labels)


def spectrum(rows: Rows) -> dict[str, Any]:
    """What the covariance's singular values (Jing et al. 2021, figure 2) and the features' own say. Collective.

    spectrum: [[number, log10 of value / largest], ...] of the covariance's, downwards, those below RESOLVED^2 left out.
    above: how many of these are above each of LEVELS of the largest. rank: how many of the centred features' singular
    values (their square roots) are above RESOLVED of the largest; condition: the largest by the smallest of those.
    rankme: Garrido et al. 2023, equation 1, of the features as they are: exp of the entropy of the values' shares.
    """
    mean, covariance = moments(rows)
    values = torch.linalg.eigvalsh(covariance).flip(0).clamp(min=0)
    shares = values / values[0].clamp(min=1e-300)
    rank = int((shares > RESOLVED**2).sum())
    uncentred = torch.linalg.eigvalsh(covariance + torch.outer(mean, mean)).clamp(min=0).sqrt()
    chosen = sorted({round(i * (rank - 1) / max(POINTS - 1, 1)) for i in range(POINTS)}) if rank else []
    logs = shares.clamp(min=1e-300).log10().tolist()
    return {
        "dim": len(values),
        "spectrum": [[number, logs[number]] for number in chosen],
        "above": [int((shares > level).sum()) for level in LEVELS],
        "rank": rank,
        "condition": float((values[0] / values[rank - 1]).sqrt()) if rank else 1.0,
        "rankme": smooth_rank(uncentred),
    }


def smooth_rank(values: Tensor) -> float:
    """exp of the entropy of values' shares, plus 1e-7 each (Garrido et al. 2023, equation 1); at least 1."""
    shares = values / values.sum().clamp(min=1e-300) + 1e-7
    return max(float(torch.exp(-(shares * shares.log()).sum())), 1.0)
