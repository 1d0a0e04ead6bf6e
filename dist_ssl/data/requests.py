"""What is asked of a store for the samples of a batch: decided here, by the reader and by its simulation alike."""

from __future__ import annotations

from collections.abc import Sequence

from dist_ssl.config import DataConfig
from dist_ssl.storage.large_reads import RANGE_BYTES

MAX_GAP_BYTES = 2**19  # between samples that one request reads: what a store sends in the time that a request costs
FETCHED_FROM_PART = 0.1  # a shard of which the first batch wants this part is fetched whole at once


def read_in_ranges(at_start: bool, wanted_bytes: int, shard_bytes: int) -> bool:
    """Whether samples of a shard that is not on the node are read by ranges, or wait for the whole shard.

    `at_start`: the shard is one of those that the reader began with.
    """
    return at_start and wanted_bytes < shard_bytes * FETCHED_FROM_PART


def seconds_a_step(batch_size: int, requests_per_second: float) -> float:
    """Between the first steps of a start that read a store: each is asked for after the one before it.

    Workers that all began at once would have what the first step waits for refused, with what later ones do not need
    yet. Samples, a request each at most, get two thirds of what the store takes, whole shards the rest.
    """
    return 1.5 * batch_size / requests_per_second


def turn(step: int, data: DataConfig, pace: float) -> float:
    """Seconds after a start before which a step asks no store: of the steps that workers begin with, one by one.

    Later ones are asked for as training takes earlier ones, and so at its own pace.
    """
    return step * pace if step < data.num_workers * data.prefetch_batches else 0.0


def grouped(spans: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Rows of spans [start, stop) of one shard that share a request: neighbours, up to RANGE_BYTES."""
    groups: list[list[int]] = []
    end = -MAX_GAP_BYTES - 1
    for row in sorted(range(len(spans)), key=lambda row: spans[row][0]):
        start, stop = spans[row]
        if start - end > MAX_GAP_BYTES or end - spans[groups[-1][0]][0] > RANGE_BYTES:
            groups.append([])
        groups[-1].append(row)
        end = max(stop, end) if len(groups[-1]) > 1 else stop
    return groups
