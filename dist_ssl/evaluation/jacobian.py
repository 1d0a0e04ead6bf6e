"""What a head does to directions of h: how much its Jacobian shrinks an augmentation's step against a random one.

The head as a metric on h that training learned (Chaudhry 2026): |J v| is how long a small step v looks to the loss.

Legend: n images, D width of h, d width of z, R random directions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dist_ssl.evaluation.intervals import bootstrap_interval

RANDOM_DIRECTIONS = 32
MOVED = 1e-5  # of |h|: a step below it is rounding, and has no direction
MIN_IMAGES = 8


def stretched(head: nn.Module, h: Tensor, step: Tensor) -> Tensor:
    """(n, D), (n, D) -> (n,): |J(h) v| / |v| of each row, J the head's Jacobian there, in the mode that the head is in.

    Of `discrete` J is tanh's, straight through the rounding, as its gradient is; of `sae`
    it is that of the code's units that are on.
    """
    # By reverse mode twice: torch.func.jvp compiles by torch.jit, which warns and takes a second.
    _, moved = torch.autograd.functional.jvp(head, h, step)
    return moved.norm(dim=1) / step.norm(dim=1)


def gains(head: nn.Module, h: Tensor, steps: dict[str, Tensor]) -> dict[str, Any]:
    """{direction: {"gain", "interval", "images"}}: mean over images of |J v| / |v| by that of random directions.

    `steps` (n, D) each; rows that do not move are left out, and a direction in which fewer than MIN_IMAGES move.
    Random: the root mean square over R directions of uniform angle, the same whatever the ranks are. Below 1 the head
    shrinks the direction more than another. Interval: 95%, bootstrap over images. Not collective.
    """
    generator = torch.Generator().manual_seed(0)
    squares = torch.zeros(len(h), dtype=torch.float64)
    for _ in range(RANDOM_DIRECTIONS):
        random = torch.randn(h.shape, generator=generator).to(h)
        squares += stretched(head, h, random).double().cpu().square()
    usual = (squares / RANDOM_DIRECTIONS).sqrt()
    found: dict[str, Any] = {}
    for name, step in steps.items():
        moves = step.norm(dim=1) > MOVED * h.norm(dim=1)
        moves &= (usual > 0).to(moves.device)
        if int(moves.sum()) >= MIN_IMAGES:
            ratios = (stretched(head, h[moves], step[moves]).double().cpu() / usual[moves.cpu()]).numpy()
            found[name] = {
                "gain": float(np.mean(ratios)),
                "interval": list(bootstrap_interval(ratios)),
                "images": len(ratios),
            }
    return found
