"""Few labels: balanced, seeded samples of the training images, and the linear probe on them from any layer.

Samples of a smaller fraction are contained in those of a larger one with the same seed, so that fractions compare.

Legend: n training images, C classes, S seeds, P problems.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dist_ssl.config import UserError
from dist_ssl.evaluation.linear import (
    WEIGHT_DECAYS,
    Fit,
    LinearResult,
    Rows,
    Standardizer,
    fit,
    predict,
    standardize,
)

FOLDS = 5


def balanced(labels: np.ndarray, fraction: float) -> tuple[np.ndarray, int]:
    """The classes, and how many images of each a sample has: fraction * n / C, at least one.

    Raises UserError where a class has fewer images than that.
    """
    classes, counts = np.unique(labels, return_counts=True)
    each = max(round(fraction * len(labels) / len(classes)), 1)
    if counts.min() < each:
        raise UserError(
            f"few labels: expected {each} images of every class for a fraction of {fraction:g}, class "
            f"{classes[counts.argmin()]} has {counts.min()}; use a smaller fraction"
        )
    return classes, each


def sample(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Rows of a sample that is `balanced`, which raises UserError; ascending."""
    classes, each = balanced(labels, fraction)
    order = np.random.Generator(np.random.Philox(key=[seed, 0xFE3])).permutation(len(labels))
    of_class = [order[labels[order] == label][:each] for label in classes]
    return np.sort(np.concatenate(of_class))


def few_label_probe(train: Rows, test: Rows, num_classes: int, fraction: float, num_seeds: int) -> LinearResult:
    """The linear probe's result for another sample of labels each seed. Collective."""
    correct, chosen, fits = [], [], []
    for seed in range(num_seeds):
        rows = sample(np.asarray(train.labels), fraction, seed)
        few = Rows(np.asarray(train.features[rows]), train.labels[rows], train.device)
        solution = solve(few, num_classes, seed)
        predicted = predict(test, solution.standardizer, solution.weights[None])[0].cpu().numpy()
        correct.append(predicted == np.asarray(test.labels))
        chosen.append(solution.decay)
        fits.append(solution.fit)
    at_edge = bool({WEIGHT_DECAYS[0], WEIGHT_DECAYS[-1]} & set(chosen))
    return LinearResult(np.stack(correct), chosen, fits, at_edge)


@dataclass(frozen=True)
class Solution:
    """Weights (D + 1, C) on standardised features, and how they were found."""

    weights: Tensor
    standardizer: Standardizer
    decay: float
    fit: Fit


def solve(few: Rows, num_classes: int, seed: int) -> Solution:
    """The linear probe on a few rows. Collective.

    With a handful of images a class a held-out tenth says nothing: the decay is chosen by cross-validation, all folds
    and decays as one batched problem.
    """
    standardizer = standardize(few)
    fold_of = folds(few.labels, seed)
    problems = [(fold, decay) for fold in range(FOLDS) for decay in WEIGHT_DECAYS]
    out = np.stack([fold_of == fold for fold, _ in problems])

    def kept(start: int, stop: int) -> Tensor:
        return torch.from_numpy(~out[:, start:stop]).float()

    sweep, _ = fit(few, standardizer, num_classes, [d for _, d in problems], row_weights=kept, max_iterations=100)
    hits = (predict(few, standardizer, sweep).cpu().numpy() == few.labels[None]) & out
    scores = hits.sum(1).reshape(FOLDS, len(WEIGHT_DECAYS)).sum(0)
    decay = WEIGHT_DECAYS[len(WEIGHT_DECAYS) - 1 - int(np.argmax(scores[::-1]))]
    (weights,), (ended,) = fit(few, standardizer, num_classes, [decay])
    return Solution(weights, standardizer, decay, ended)


def folds(labels: np.ndarray, seed: int) -> np.ndarray:
    """A fold for every row, balanced within each class."""
    fold_of = np.empty(len(labels), dtype=np.int64)
    order = np.random.Generator(np.random.Philox(key=[seed, 0xF01D])).permutation(len(labels))
    offset = 0
    for label in np.unique(labels):
        rows = order[labels[order] == label]
        fold_of[rows] = (np.arange(len(rows)) + offset) % FOLDS
        offset += len(rows)
    return fold_of
