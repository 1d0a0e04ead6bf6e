"""The verdict on a step: everything on which the ranks must act alike, in one small reduction on the device.

Whether the step is applied is decided there, at once. The host reads the rest one step late, while the next step runs;
all ranks read the same, so they stop, save and fail at the same step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from dist_ssl import distributed
from dist_ssl.distributed import Verdict


class Asked(NamedTuple):
    """What a rank asks of all ranks; once heard, whether any of them did."""

    stop: bool = False
    data_failed: bool = False
    save_failed: bool = False
    save_due: bool = False  # by rank 0's clock

    def either(self, other: Asked) -> Asked:
        return Asked(*(a or b for a, b in zip(self, other, strict=True)))

    @property
    def end(self) -> bool:
        return self.stop or self.data_failed


class Outcome(NamedTuple):
    """A verdict that was read: of the global batch, the same on all ranks."""

    loss: float
    gradient_norm: float
    asked: Asked

    @property
    def finite(self) -> bool:
        """Whether the step was applied."""
        return math.isfinite(self.loss) and math.isfinite(self.gradient_norm)


def agree(loss: Tensor, asked: Asked) -> Callable[[Tensor], Verdict]:
    """For `Engine.step`, which knows the gradient: a verdict is finite where the loss and the gradient's norm are."""
    return lambda squared_norm: distributed.agree([loss, squared_norm], asked)


def read(verdict: Verdict) -> Outcome:
    """Waits for the device to have come as far as the verdict."""
    (loss, squared_norm), asked = verdict.read()
    # Of a sum with infinities, which may be no number at all, nothing is left to take a root of.
    norm = math.sqrt(squared_norm) if squared_norm >= 0 else math.nan
    return Outcome(loss / distributed.world_size(), norm, Asked(*asked))
