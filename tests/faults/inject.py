"""Faults that only the inside of a rank can make: importable functions for `tests.pool`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dist_ssl import distributed, train
from dist_ssl.config import Config
from dist_ssl.data.augment import BRIGHTNESS, JITTER
from dist_ssl.data.stream import Batch, Batches


class Poisoned(Batches):
    """Batches of which rank 1's first image has a brightness of NaN in the given steps."""

    def __init__(self, batches: Batches, steps: list[int]):
        self._batches, self._steps, self._step = batches, steps, 0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = next(self._batches)
        self._step += 1
        if distributed.rank() == 1 and self._step in self._steps:
            batch.parameters[0, :, JITTER] = 1.0
            batch.parameters[0, :, BRIGHTNESS] = float("nan")
        return batch

    def close(self) -> None:
        self._batches.close()


def pretrain_with_poison(config: Config, steps: list[int]) -> int:
    real = train.training_batches

    def poisoned(*arguments: Any, **keywords: Any) -> Batches:
        return Poisoned(real(*arguments, **keywords), steps)

    train.training_batches = poisoned
    try:
        return train.pretrain(config)
    finally:
        train.training_batches = real
