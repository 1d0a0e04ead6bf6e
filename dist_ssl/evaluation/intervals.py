"""Intervals over the test set, and the spread over seeds. Every reported accuracy goes through here.

Shares of images have Wilson's interval, which is right at the edges too (all of 80 images right is no certainty);
other values have the bootstrap's.

Legend: S seeds, n test images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

LEVEL, Z = 0.95, 1.959964  # the normal's two-sided quantile of that level
RESAMPLES = 2000
# Student's t at that level for 1 to 30 degrees of freedom; of more it is a little smaller than the last.
T_QUANTILES = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def bootstrap_interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """The 95% percentile bootstrap interval of the mean of (n,) values (Efron 1979).

    Images with equal values are interchangeable, so a resample is one multinomial draw over the distinct values
    instead of n indices: the same distribution, at a cost that does not grow with n for 0/1 values.
    """
    if len(values) == 0:
        raise ValueError("expected at least one test value, got none")
    distinct, counts = np.unique(np.asarray(values, dtype=np.float64), return_counts=True)
    generator, shares = np.random.default_rng(seed), counts / len(values)
    at_once = max(4_000_000 // len(distinct), 1)  # bounds the draws held in memory
    sizes = [min(at_once, RESAMPLES - start) for start in range(0, RESAMPLES, at_once)]
    means = np.concatenate(
        [generator.multinomial(len(values), shares, size=size) @ distinct / len(values) for size in sizes]
    )
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(low), float(high)


def share_interval(values: np.ndarray) -> tuple[float, float]:
    """The 95% interval of the mean of (n,) values in [0, 1]: the share of images that are answered right (Wilson 1927).

    An image's value is the mean over seeds. Where seeds disagree it varies less than a right or wrong answer of that
    mean would: as if there were more images, by the ratio of the two variances. Both are taken with z^2 more images,
    half of them right (Agresti and Coull 1998), so that the ratio is 1 where all images are right, or all wrong.
    """
    if len(values) == 0:
        raise ValueError("expected at least one test value, got none")
    values = np.asarray(values, dtype=np.float64)
    share, square = values.mean(), Z**2
    mean = (values.sum() + square / 2) / (len(values) + square)
    variance = ((values**2).sum() + square / 2) / (len(values) + square) - mean**2
    images = len(values) * mean * (1 - mean) / variance
    middle = (share + square / (2 * images)) / (1 + square / images)
    half = Z / (1 + square / images) * (share * (1 - share) / images + square / (4 * images**2)) ** 0.5
    return max(float(middle - half), 0.0), min(float(middle + half), 1.0)


def summarize(correct_sn: np.ndarray) -> dict[str, Any]:
    """{top1, interval, seeds, spread} of (S, n) correct answers in [0, 1]; spread is the standard deviation over seeds.

    The interval is over test images, of the mean over seeds; spread is 0 for one seed.
    """
    correct_sn = np.atleast_2d(np.asarray(correct_sn, dtype=np.float64))
    per_seed = correct_sn.mean(axis=1)
    return {
        "top1": float(per_seed.mean()),
        "interval": list(share_interval(correct_sn.mean(axis=0))),
        "seeds": [float(value) for value in per_seed],
        "spread": float(per_seed.std(ddof=1)) if len(per_seed) > 1 else 0.0,
    }


def difference(a_sn: np.ndarray, b_sn: np.ndarray) -> dict[str, Any]:
    """{difference, interval} of mean accuracy a - b on the same test images, paired (Bonett and Price 2012).

    Two images more, one that only a and one that only b answers, keep a width where no image tells a from b.
    """
    paired = np.atleast_2d(a_sn).astype(np.float64).mean(axis=0) - np.atleast_2d(b_sn).astype(np.float64).mean(axis=0)
    widened = np.append(paired, (1.0, -1.0))
    middle, half = widened.mean(), Z * widened.std() / len(widened) ** 0.5
    interval = [max(float(middle - half), -1.0), min(float(middle + half), 1.0)]
    return {"difference": float(paired.mean()), "interval": interval}


def mean_interval(values: list[float]) -> tuple[float, float]:
    """A 95% t interval for the mean of a few independent runs; the values themselves where there is only one."""
    if len(values) < 2:
        return values[0], values[0]
    half = T_QUANTILES[min(len(values) - 2, len(T_QUANTILES) - 1)] * float(np.std(values, ddof=1)) / len(values) ** 0.5
    mean = float(np.mean(values))
    return mean - half, mean + half


def t_test(values: Sequence[float]) -> float:
    """p of a mean as far from 0 as that of a few independent runs, where it is 0: Student's t, two-sided.

    The distribution's closed form for whole degrees of freedom: Abramowitz and Stegun 1964, 26.7.3 and 26.7.4.
    """
    if len(values) < 2:
        raise ValueError(f"expected at least 2 runs, got {len(values)}")
    freedom, mean, std = len(values) - 1, float(np.mean(values)), float(np.std(values, ddof=1))
    if std == 0:
        return 0.0 if mean else 1.0
    angle = math.atan(abs(mean) / std * (len(values) / freedom) ** 0.5)
    odd, square = freedom % 2, math.cos(angle) ** 2
    term = math.cos(angle) if odd else 1.0
    total = term if freedom > 1 else 0.0
    for n in range(2 + odd, freedom - 1, 2):
        term *= square * (n - 1) / n
        total += term
    within = math.sin(angle) * total
    return max(1 - (2 / math.pi * (angle + within) if odd else within), 0.0)


def holm(p_values: Sequence[float]) -> list[float]:
    """Corrected for their number: rejecting those below 5% rejects a true hypothesis in 5% of all cases (Holm 1979)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, largest = [1.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min((len(p_values) - rank) * p_values[i], 1.0))
        corrected[i] = largest
    return corrected
