"""How much of a layer a factor of the image takes: the weight that a linear probe finds, and how even weights are.

After Xue et al. 2024, whose layers weigh features the less evenly the deeper they are: where a layer is the factor
times its weight along some direction, plus what else there is, a linear probe finds the direction, and the weight is
how far the layer moves along it.

Legend: n images, D a layer's width, C values of the factor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

RIDGE = 1e-3  # of the mean variance of a feature


def factor_weight(x_train: np.ndarray, y_train: np.ndarray, x_test: np.ndarray, y_test: np.ndarray) -> float:
    """A factor's weight, from features (n, D) and its values (n,) from 0 to C - 1: 0 where no probe reads it.

    For each value a ridge regression on the training rows gives a direction; the weight is the covariance, on the test
    rows, of features along it with whether the value is there, both in units of one standard deviation (of features
    all D together, so that the scale of a layer is no matter). Root mean square over values, a negative one as 0.
    """
    num_values = int(max(y_train.max(), y_test.max())) + 1
    mean = np.mean(x_train, axis=0, dtype=np.float64)
    x_train, x_test = (np.asarray(x, dtype=np.float64) - mean for x in (x_train, x_test))
    covariance = x_train.T @ x_train / len(x_train)
    total = np.trace(covariance)
    if total <= 0:
        return 0.0
    train, test = (_standardised(np.eye(num_values)[y]) for y in (y_train, y_test))
    ridge = RIDGE * total / len(covariance)
    weights = np.linalg.solve(covariance + ridge * np.eye(len(covariance)), x_train.T @ train / len(train))
    directions = weights / np.linalg.norm(weights, axis=0).clip(min=1e-300)
    along = x_test @ directions / math.sqrt(total)
    found = ((along - along.mean(0)) * test).mean(0).clip(min=0)
    return float(np.sqrt((found**2).mean()))


def evenness(weights: Sequence[float]) -> float | None:
    """Pielou's: the entropy of the weights' shares by its largest; 1 where all are equal, None of fewer than two."""
    total = sum(weights)
    if len(weights) < 2 or total <= 0:
        return None
    return -sum(w / total * math.log(w / total) for w in weights if w > 0) / math.log(len(weights))


def _standardised(columns: np.ndarray) -> np.ndarray:
    return (columns - columns.mean(0)) / columns.std(0).clip(min=1e-300)
