"""L-BFGS for many smooth convex problems at once, each with its own step lengths, evaluated together.

Legend: P problems, A of them still active, K variables of each.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def lbfgs(
    problem: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    start_pk: Tensor,
    max_iterations: int,
    tolerance: float,
    progress: Callable[[int], None] | None = None,
    memory: int = 10,
) -> tuple[Tensor, Tensor, list[int]]:
    """Minimises P smooth problems at once (Nocedal and Wright 2006, algorithm 7.4), weak Wolfe steps by bisection.

    `problem(x (A, K), active (A,))` gives losses (A,) and gradients (A, K) of the problems numbered `active`; only
    those that go on are evaluated. One stops where the largest entry of its gradient is below `tolerance` of what it
    was at the start, and where no step descends any more. (P, K) -> (P, K), the gradients there (P, K), and in how
    many iterations each of the P came there.
    """
    x = start_pk.clone()
    everyone = torch.arange(x.shape[0], device=x.device)
    loss, gradient = problem(x, everyone)
    scale = gradient.abs().amax(1).clamp(min=1e-12)
    resting, iterations = torch.zeros_like(everyone, dtype=torch.bool), torch.zeros_like(everyone)
    pairs: list[tuple[Tensor, Tensor, Tensor]] = []  # (s, y, 1 / s.y), the last `memory` steps
    for iteration in range(max_iterations):
        active = everyone[(gradient.abs().amax(1) > tolerance * scale) & loss.isfinite() & ~resting]
        if len(active) == 0:
            break
        # Copies of the memory only once some problem rests: they cost as much as an evaluation.
        held = pairs if len(active) == len(everyone) else [(s[active], y[active], r[active]) for s, y, r in pairs]
        direction = _two_loop(gradient[active], held)
        slope = (direction * gradient[active]).sum(1)
        step = torch.ones_like(slope)
        if not pairs:
            step = 1.0 / gradient[active].norm(dim=1).clamp(min=1e-12)  # a first step of unit length
        new_x, new_loss, new_gradient = _weak_wolfe(
            problem, active, x[active], loss[active], gradient[active], direction, slope, step, 10 if pairs else 30
        )
        s, y = torch.zeros_like(x), torch.zeros_like(x)
        s[active], y[active] = new_x - x[active], new_gradient - gradient[active]
        curvature = (s * y).sum(1)
        # A pair without positive curvature (rounding, or a problem at rest) is neutral: it must not move others.
        pairs.append((s, y, torch.where(curvature > 1e-20, 1.0 / curvature.clamp(min=1e-20), 0.0)))
        pairs = pairs[-memory:]
        resting[active] = new_loss >= loss[active]  # no step of this direction descends in fp32: as far as it goes
        x[active], loss[active], gradient[active] = new_x, new_loss, new_gradient
        iterations[active] += 1
        if progress is not None:
            progress(iteration + 1)
    return x, gradient, iterations.tolist()


def _two_loop(gradient: Tensor, pairs: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    q, alphas = gradient.clone(), []
    for s, y, inverse in reversed(pairs):
        alpha = inverse * (s * q).sum(1)
        q -= alpha[:, None] * y
        alphas.append(alpha)
    if pairs:
        s, y, inverse = pairs[-1]
        squares = y.square().sum(1)
        q *= torch.where((inverse > 0) & (squares > 0), 1.0 / (inverse * squares).clamp(min=1e-30), 1.0)[:, None]
    for (s, y, inverse), alpha in zip(pairs, reversed(alphas), strict=True):
        q += (alpha - inverse * (y * q).sum(1))[:, None] * s
    return -q


def _weak_wolfe(
    problem: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    active: Tensor,
    x: Tensor,
    loss: Tensor,
    gradient: Tensor,
    direction: Tensor,
    slope: Tensor,
    step: Tensor,
    trials: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Bisection to a step with sufficient decrease and curvature (Lewis and Overton 2013), per problem.

    The point reached, its loss and its gradient; the point given, where no trial decreases the loss.
    """
    low, high = torch.zeros_like(step), torch.full_like(step, float("inf"))
    best_x, best_loss, best_gradient = x.clone(), loss.clone(), gradient.clone()
    moved = torch.zeros_like(active, dtype=torch.bool)
    pending = torch.arange(len(active), device=x.device)
    for _trial in range(trials):
        candidate = x[pending] + step[pending, None] * direction[pending]
        new_loss, new_gradient = problem(candidate, active[pending])
        new_slope = (new_gradient * direction[pending]).sum(1)
        # Losses near the minimum agree to fp32's rounding, which must not look like a rise.
        bound = loss[pending] + 1e-4 * step[pending] * slope[pending] + 1e-9 * loss[pending].abs()
        decreased = (new_loss <= bound) & new_loss.isfinite()
        curved = new_slope >= 0.9 * slope[pending]
        better = decreased & ((new_loss <= best_loss[pending]) | ~moved[pending])
        take = pending[better]
        moved[take] = True
        best_x[take], best_loss[take], best_gradient[take] = candidate[better], new_loss[better], new_gradient[better]
        high[pending] = torch.where(decreased, high[pending], step[pending])
        low[pending] = torch.where(decreased, step[pending], low[pending])
        pending = pending[~(decreased & curved)]
        if len(pending) == 0:
            break
        bounded = high[pending].isfinite()
        step[pending] = torch.where(bounded, (low[pending] + high[pending]) / 2, 2 * step[pending])
    return best_x, best_loss, best_gradient
