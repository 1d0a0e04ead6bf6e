"""Stochastic depth (Huang et al. 2016) whose draws belong to the images of the global batch, not to the ranks.

A layer's draw is a function of the step's seed, the layer and the image's place in the global batch: every rank draws
for all images and takes its own. So any number of ranks drops the same paths, a recomputation too, and a checkpoint
needs no generator.

Legend: n images of this rank, N of all ranks, R rows of an image (its views of one size, or pieces of them).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from dist_ssl.distributed import in_backward


@dataclass(frozen=True)
class Rows:
    """A forward is of the images [first, first + count) of a global batch of `total`, in a step of that seed."""

    seed: int
    first: int
    count: int
    total: int


class DropPath(nn.Module):
    """In training, 0 for all of a row with probability `drop_prob`, else its values / (1 - drop_prob).

    Without `rows` it draws as any dropout does, from the rank's own generator. Not collective.
    """

    drop_prob: float
    scale_by_keep: bool
    layer: int  # among those of the encoder
    rows: Rows | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(n R, ...) -> the same shape, rows ordered by image."""
        if not self.drop_prob or not self.training:
            return x
        kept = (self._draw(x) >= self.drop_prob).to(x.dtype).view(-1, *[1] * (x.dim() - 1))
        return x * (kept / (1 - self.drop_prob) if self.scale_by_keep else kept)

    def of(self, rows: Rows) -> None:
        """Say which images the next forward is of, and the recomputations in its backward."""
        self.rows, self._calls = rows, Counter[tuple[torch.Size, bool]]()

    @torch.compiler.disable
    def _draw(self, x: Tensor) -> Tensor:
        """Uniform in [0, 1), (n R,)."""
        if self.rows is None:
            return torch.rand(len(x), device=x.device)
        # Where a model passes a layer several times, by views of several sizes or in one block, draws are independent.
        call = x.shape[1:], in_backward()
        seed = (self.rows.seed * 8_191 + self.layer) * 65_537 + prod(x.shape[1:]) * 31 + self._calls[call]
        self._calls[call] += 1
        generator = torch.Generator(x.device).manual_seed(seed & 0x7FFF_FFFF_FFFF_FFFF)
        each = len(x) // self.rows.count
        draws = torch.rand(self.rows.total * each, generator=generator, device=x.device)
        return draws[self.rows.first * each :][: len(x)]
