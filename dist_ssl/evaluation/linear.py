"""The linear probe: multi-class logistic regression on frozen features, many weight decays fitted at once.

Every problem (a weight decay, on a subset of the rows) is a column block of one matrix product, so that a sweep reads
the features once an evaluation, not once a setting. Features are read in blocks, from memory or from memory-mapped
files, and never copied whole. With several ranks each reads its own rows and the sums are all-reduced.

Legend: n rows of all ranks, D features, C classes, P problems fitted together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dist_ssl.distributed import rank, world_size
from dist_ssl.evaluation.lbfgs import lbfgs

TOLERANCE = 5e-4  # of the gradient at zero weights: below it a fit has converged
WEIGHT_DECAYS = tuple(10.0**exponent for exponent in range(-6, 1))
HISTORY_BYTES = 2 * 2**30
BLOCK_BYTES = 16 * 2**20  # of a block's features and of its logits: bounds the memory, whatever n, D, C and P are


@dataclass
class Standardizer:
    """Mean and inverse standard deviation of each feature; a constant feature is left at zero."""

    mean_d: Tensor
    inverse_std_d: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return (x - self.mean_d) * self.inverse_std_d


@dataclass
class Rows:
    """Features (n, D) and labels (n,) of all ranks, in memory or memory-mapped; this rank works on its own slice."""

    features: np.ndarray
    labels: np.ndarray
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        if len(self.features) != len(self.labels) or len(self.labels) == 0:
            raise ValueError(f"expected as many labels as rows, got {len(self.labels)} and {len(self.features)}")
        cuts = np.linspace(0, len(self.labels), world_size() + 1).astype(int)
        self.start, self.stop = int(cuts[rank()]), int(cuts[rank() + 1])

    def blocks(self, columns: int) -> list[tuple[int, int]]:
        """This rank's row ranges such that neither the features nor `columns` logits a row exceed BLOCK_BYTES."""
        size = max(BLOCK_BYTES // (4 * max(self.features.shape[1], columns)), 16)
        return [(a, min(a + size, self.stop)) for a in range(self.start, self.stop, size)]

    def x(self, start: int, stop: int) -> Tensor:
        return torch.from_numpy(np.array(self.features[start:stop], dtype=np.float32)).to(self.device)

    def y(self, start: int, stop: int) -> Tensor:
        return torch.from_numpy(np.array(self.labels[start:stop], dtype=np.int64)).to(self.device)


def all_reduce(*tensors: Tensor) -> None:
    """Sums over ranks, in place. Collective."""
    if world_size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def standardize(rows: Rows) -> Standardizer:
    """The standardizer of all ranks' rows: two passes in fp64, centred in the second. Collective."""
    dim = rows.features.shape[1]
    total = torch.zeros(dim, dtype=torch.float64, device=rows.device)
    for start, stop in rows.blocks(1):
        total += rows.x(start, stop).double().sum(0)
    all_reduce(total)
    mean = total / len(rows.labels)
    squares = torch.zeros_like(mean)
    for start, stop in rows.blocks(1):
        squares += (rows.x(start, stop).double() - mean).square().sum(0)
    all_reduce(squares)
    std = (squares / len(rows.labels)).sqrt()
    # Relative to the features' size: what is constant but for rounding must not be blown up to unit variance.
    usable = std > 1e-6 * (mean.abs() + std.max()).clamp(min=1e-30)
    inverse = torch.where(usable, 1 / std.clamp(min=1e-30), 0.0)
    return Standardizer(mean.float(), inverse.float())


@dataclass(frozen=True)
class Fit:
    """How a fit ended: `gradient_norm` is its gradient's largest entry as a part of that at zero weights."""

    converged: bool
    iterations: int
    gradient_norm: float


def fit(
    rows: Rows,
    standardizer: Standardizer,
    num_classes: int,
    weight_decays: list[float],
    *,
    row_weights: Callable[[int, int], Tensor] | None = None,
    initial: Tensor | None = None,
    max_iterations: int = 300,
    tolerance: float = TOLERANCE,
    progress: Callable[[int], None] | None = None,
) -> tuple[Tensor, list[Fit]]:
    """Weights (P, D + 1, C) that minimise, for each problem p, its own objective, and how each fit ended

        sum_i a_pi CE(x_i W_p + b_p, y_i) / sum_i a_pi + weight_decays[p] / 2 |W_p|^2        (the bias is free)

    over standardised x; the last of the D + 1 rows is the bias. `row_weights(start, stop)` gives a (P, stop - start),
    all ones by default. L-BFGS for all problems in step, each with its own step lengths; a problem has converged when
    the largest entry of its gradient is at most `tolerance` of that at zero weights. Collective: one all-reduce an
    evaluation, on all of which every rank takes the same decisions.
    """
    problem = _Problem(rows, standardizer, num_classes, weight_decays, row_weights)
    shape = (len(weight_decays), rows.features.shape[1] + 1, num_classes)
    start = torch.zeros(shape, device=rows.device) if initial is None else initial.clone()
    # 10 pairs of steps as a rule, fewer where so many large problems would fill the memory with them.
    memory = int(min(max(HISTORY_BYTES // (2 * start.numel() * start.element_size()), 3), 10))
    found, gradient, iterations = lbfgs(problem, start.flatten(1), max_iterations, tolerance, progress, memory)
    _, at_zero = problem(torch.zeros_like(found), torch.arange(len(found), device=rows.device))
    norms = (gradient.abs().amax(1) / at_zero.abs().amax(1).clamp(min=1e-12)).tolist()
    fits = [Fit(norm <= tolerance, count, norm) for norm, count in zip(norms, iterations, strict=True)]
    return found.view(shape), fits


class _Problem:
    """Losses (P,) in fp64 and gradients (P, (D + 1) C) of the problems `active` at given weights. Collective."""

    def __init__(
        self,
        rows: Rows,
        standardizer: Standardizer,
        num_classes: int,
        weight_decays: list[float],
        row_weights: Callable[[int, int], Tensor] | None,
    ) -> None:
        self.rows, self.standardizer, self.num_classes = rows, standardizer, num_classes
        self.row_weights = row_weights
        self.decays = torch.tensor(weight_decays, dtype=torch.float64, device=rows.device)
        if row_weights is None:
            self.totals = torch.full_like(self.decays, len(rows.labels))
        else:
            self.totals = torch.zeros_like(self.decays)
            for a, b in rows.blocks(1):
                self.totals += row_weights(a, b).to(rows.device).double().sum(1)
            all_reduce(self.totals)

    def __call__(self, flat_pk: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
        rows, num, classes = self.rows, len(active), self.num_classes
        weights_pdc = flat_pk.view(num, -1, classes)
        joined = weights_pdc[:, :-1].permute(1, 0, 2).reshape(-1, num * classes)
        bias = weights_pdc[:, -1].reshape(-1)
        losses = torch.zeros(num, dtype=torch.float64, device=rows.device)
        gradient, bias_gradient = torch.zeros_like(joined), torch.zeros_like(bias)
        totals = self.totals[active]
        for a, b in rows.blocks(num * classes):
            x, y = self.standardizer(rows.x(a, b)), rows.y(a, b)
            logits = torch.addmm(bias, x, joined).view(b - a, num, classes)
            log_p = logits.log_softmax(dim=2)
            target = y[:, None, None].expand(-1, num, 1)
            nll = -log_p.gather(2, target)[:, :, 0]
            share = (1.0 / totals).float().expand(b - a, -1)
            if self.row_weights is not None:
                share = share * self.row_weights(a, b).to(x.device)[active].T
            losses += (nll * share).double().sum(0)
            residual = log_p.exp_()
            residual.scatter_add_(2, target, residual.new_full((), -1.0).expand(target.shape))
            residual *= share[:, :, None]
            residual = residual.view(b - a, -1)
            gradient.addmm_(x.T, residual)
            bias_gradient += residual.sum(0)
        all_reduce(losses, gradient, bias_gradient)
        decays = self.decays[active]
        gradient = (
            gradient.view(-1, num, classes).permute(1, 0, 2) + decays.float()[:, None, None] * weights_pdc[:, :-1]
        )
        losses = losses + 0.5 * decays * weights_pdc[:, :-1].double().square().sum((1, 2))
        return losses, torch.cat([gradient, bias_gradient.view(num, 1, classes)], dim=1).flatten(1)


@torch.no_grad()
def predict(rows: Rows, standardizer: Standardizer, weights_pdc: Tensor) -> Tensor:
    """Predicted classes (P, n) of all ranks' rows, on every rank. Collective: one all-reduce."""
    num, _, classes = weights_pdc.shape
    joined = weights_pdc[:, :-1].permute(1, 0, 2).reshape(-1, num * classes)
    bias = weights_pdc[:, -1].reshape(-1)
    predicted = torch.zeros(num, len(rows.labels), dtype=torch.int64, device=rows.device)
    for a, b in rows.blocks(num * classes):
        logits = torch.addmm(bias, standardizer(rows.x(a, b)), joined)
        predicted[:, a:b] = logits.view(b - a, num, classes).argmax(2).T
    all_reduce(predicted)
    return predicted


def held_out_rows(num_rows: int, seed: int, fraction: float = 0.1) -> np.ndarray:
    """A (n,) mask of the rows that the choice of weight decay is made on: a seeded tenth, at least one row."""
    chosen = np.random.Generator(np.random.Philox(key=[seed, 0x11EA7])).permutation(num_rows)
    mask = np.zeros(num_rows, dtype=bool)
    mask[chosen[: max(int(fraction * num_rows), 1)]] = True
    return mask


@dataclass
class LinearResult:
    """correct (S, n_test) 0/1, the weight decay that each seed chose on held-out rows, and how its last fit ended."""

    correct_sn: np.ndarray
    weight_decays: list[float]
    fits: list[Fit]
    at_edge: bool


def linear_probe(
    train: Rows,
    test: Rows,
    num_classes: int,
    *,
    num_seeds: int = 3,
    weight_decays: tuple[float, ...] = WEIGHT_DECAYS,
    max_iterations: int = 300,
    progress: Callable[[int], None] | None = None,
) -> LinearResult:
    """Sweep, choose, refit: for each seed, every weight decay is fitted without a seeded tenth of the training rows,
    the best on that tenth is refitted on all of them and scored on the test rows.

    All seeds' and settings' fits are one batched problem. A seed changes the tenth, so its spread is the choice's.
    Collective.
    """
    standardizer = standardize(train)
    settings = [(seed, decay) for seed in range(num_seeds) for decay in weight_decays]
    masks = np.stack([held_out_rows(len(train.labels), seed) for seed in range(num_seeds)])
    of_setting = masks[[seed for seed, _ in settings]]

    def kept(start: int, stop: int) -> Tensor:
        return torch.from_numpy(~of_setting[:, start:stop]).float()

    if len(weight_decays) > 1:
        sweep, _ = fit(
            train,
            standardizer,
            num_classes,
            [decay for _, decay in settings],
            row_weights=kept,
            max_iterations=max_iterations // 4,  # a choice among powers of ten needs no last digit
            progress=progress,
        )
        hits = (predict(train, standardizer, sweep).cpu().numpy() == np.asarray(train.labels)[None]) & of_setting
        scores = hits.sum(1).reshape(num_seeds, len(weight_decays))
        # Of equals the strongest: argmax over the reversed order, weight decays being sorted upwards.
        picks = [len(weight_decays) - 1 - int(np.argmax(row[::-1])) for row in scores]
        initial = sweep.view(num_seeds, len(weight_decays), *sweep.shape[1:])
    else:
        picks, initial = [0] * num_seeds, None
    unique = sorted(set(picks))
    start = None if initial is None else torch.stack([initial[picks.index(pick), pick] for pick in unique])
    final, fits = fit(
        train,
        standardizer,
        num_classes,
        [weight_decays[pick] for pick in unique],
        initial=start,
        max_iterations=max_iterations,
        progress=progress,
    )
    predicted = predict(test, standardizer, final).cpu().numpy()
    correct = predicted == np.asarray(test.labels)[None]
    return LinearResult(
        correct_sn=np.stack([correct[unique.index(pick)] for pick in picks]),
        weight_decays=[weight_decays[pick] for pick in picks],
        fits=[fits[unique.index(pick)] for pick in picks],
        at_edge=len(weight_decays) > 1 and bool({0, len(weight_decays) - 1} & set(picks)),
    )
