"""`map` over processes or threads, for the long jobs on shards."""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from typing import Any


def in_processes(function: Any, items: Sequence[Any], num_workers: int | None) -> Generator[Any]:
    """`map` over processes, in order, a few items ahead; in this process with fewer than two workers or items.

    One process a core by default.
    """
    num_workers = len(os.sched_getaffinity(0)) if num_workers is None else num_workers
    if num_workers < 2 or len(items) < 2:
        yield from map(function, items)
        return
    # Spawned, since a parent may have threads (s3fs's, torch's) that a fork would leave locked.
    with ProcessPoolExecutor(min(num_workers, len(items)), mp_context=get_context("spawn")) as pool:
        try:
            yield from pool.map(function, items)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def in_threads(function: Any, items: Sequence[Any], num_workers: int | None) -> Generator[Any]:
    """`map` over threads, in order: for work that waits for a network and sums bytes, both outside of Python's lock.

    Two threads a core by default. Closed, it waits for what is under way.
    """
    num_workers = 2 * len(os.sched_getaffinity(0)) if num_workers is None else num_workers
    if num_workers < 2 or len(items) < 2:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(min(num_workers, len(items))) as pool:
        try:
            yield from pool.map(function, items)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
