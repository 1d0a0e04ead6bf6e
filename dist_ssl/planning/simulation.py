"""What the ranks of a run ask of an object store, simulated in one event loop, with the reader's plan and decisions.

The plan, which shards a rank aims at, what is read by ranges, how ranges share requests and how long a client pauses
are the code that runs; the store, the network and time are a model. Requests take tokens from a bucket; an empty one
answers 503; a transfer waits its turn in its node's pipe and in the store's. What is simulated are the first steps
of a run that starts with empty caches of data.cache_gb, which member indexes don't count in; every shard's images are
as large as those of one that is given, in proportion to the shard.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from dist_ssl.config import Config
from dist_ssl.data.cache import IN_USE_SECONDS
from dist_ssl.data.manifest import Manifest, Shard
from dist_ssl.data.plan import Positions, share
from dist_ssl.data.progress import Progress
from dist_ssl.data.requests import grouped, read_in_ranges, seconds_a_step, turn
from dist_ssl.data.stream import plan_of, rank_streams
from dist_ssl.storage.files import longest_pauses
from dist_ssl.storage.large_reads import CONCURRENT_RANGES, RANGE_BYTES

FETCHERS = 2  # threads of each reader that fetch ahead
INDEX_BYTES_A_SAMPLE = 72  # seven numbers and a key of some 20 letters
SIZE_SIGMA = 0.5  # of the logarithm of images' sizes where no index tells them: an assumption


@dataclass(frozen=True)
class Store:
    """Limits of a store, of the network, and of the GPUs behind it."""

    requests_per_second: float = 5500.0  # of a prefix; what Amazon says S3 gives at least
    node_bytes_per_second: float = 25e9 / 8
    bytes_per_second: float = math.inf
    latency_seconds: float = 0.03  # the median of a request; its tail is log-normal
    latency_sigma: float = 0.5
    images_per_second: float = 1000.0  # that a rank trains


@dataclass
class Counts:
    """What was asked for and what came of it."""

    gets: int = 0  # that were answered
    refused: int = 0  # by 503
    given_up: int = 0  # requests refused for longer than storage.retry_seconds, which ends the run
    index_gets: Counter[int] = field(default_factory=Counter)  # of each shard
    fetches: Counter[int] = field(default_factory=Counter)  # of whole shards
    shard_bytes: int = 0  # of images and whole shards
    needed_bytes: int = 0  # of the samples that were consumed
    hits: int = 0  # samples that were on their node already
    evicted: int = 0  # shards
    no_room: int = 0  # times that a whole shard was wanted, and all that its node holds was in use: read in ranges
    samples: int = 0
    first_batch_seconds: float = math.inf  # until every rank has one
    stalled_seconds: float = 0.0  # after that, all ranks waiting for the slowest
    seconds: float = math.inf  # of all steps


@dataclass
class _Node:
    readers: list[_Reader] = field(default_factory=list)
    cached: dict[int, float] = field(default_factory=dict)  # when it was last read
    used_bytes: int = 0  # of those and of what is arriving
    arriving: dict[int, list[Callable[[], None]]] = field(default_factory=dict)
    indexed: set[int] = field(default_factory=set)
    indexes_arriving: dict[int, list[Callable[[], None]]] = field(default_factory=dict)
    free_at: float = 0.0


@dataclass
class _Reader:
    """A worker process of a rank."""

    rank: int
    node: _Node
    next_step: int
    busy: bool = False
    first: set[int] | None = None
    now: set[int] = field(default_factory=set)
    targets: list[int] = field(default_factory=list)
    fetching: int = 0


class Simulation:
    """The first `steps` steps of a run on `nodes` nodes; `run` gives the counts. The same for the same seed.

    image_sizes: bytes of the images of a shard, in its order; None for a log-normal spread.
    """

    def __init__(
        self,
        config: Config,
        manifest: Manifest,
        nodes: int,
        ranks_per_node: int,
        steps: int,
        store: Store,
        seed: int = 0,
        image_sizes: NDArray[np.uint64] | None = None,
    ):
        self._config, self._manifest, self._store, self._steps = config, manifest, store, steps
        self._world = nodes * ranks_per_node
        self._plan = plan_of(config, manifest)
        self._pace = seconds_a_step(config.train.global_batch_size, config.storage.requests_per_second)
        self._bytes = manifest.columns.num_bytes.tolist()
        most = int(manifest.counts.max())
        drawn = np.random.default_rng(seed).lognormal(0.0, SIZE_SIGMA, most) if image_sizes is None else image_sizes
        self._ends = np.cumsum(np.resize(drawn, most))
        self._places: dict[int, list[int]] = {}
        self._limit = int(config.data.cache_gb * 1e9)
        self._nodes = [_Node() for _ in range(nodes)]
        self._num_readers = max(config.data.num_workers, 1)
        self._readers = [
            _Reader(rank, self._nodes[rank // ranks_per_node], first)
            for rank in range(self._world)
            for first in range(self._num_readers)
        ]
        for reader in self._readers:
            reader.node.readers.append(reader)
        self._ahead = config.data.prefetch_batches * self._num_readers if config.data.num_workers else 1
        self._random, self._now, self._order = random.Random(seed), 0.0, 0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._tokens, self._refilled, self._free_at = store.requests_per_second, 0.0, 0.0
        self._ready = [0] * steps
        self._done, self._ends_at = 0, 0.0
        self._batches: dict[int, Positions] = {}
        self.counts = Counts()

    def run(self, progress: bool = False) -> Counts:
        for reader in self._readers:
            self._begin(reader)
        with Progress("simulated steps", self._steps, progress) as bar:
            while self._events and (before := self._done) < self._steps:
                self._now, _, happen = heapq.heappop(self._events)
                happen()
                if self._done > before:
                    bar.advance(self._done - before)
        while self._events:  # what was under way
            self._now, _, happen = heapq.heappop(self._events)
            happen()
        if self._done == self._steps:
            self.counts.seconds = self._ends_at
        return self.counts

    def _at(self, time: float, happen: Callable[[], None]) -> None:
        self._order += 1
        heapq.heappush(self._events, (time, self._order, happen))

    # --- the store ------------------------------------------------------------------------------------------------

    def _get(self, node: _Node, num_bytes: int, answered: Callable[[], None]) -> None:
        pauses, started = longest_pauses(), self._now

        def attempt() -> None:
            rate = self._store.requests_per_second
            self._tokens = min(rate, self._tokens + (self._now - self._refilled) * rate)
            self._refilled = self._now
            latency = self._store.latency_seconds * math.exp(self._random.gauss(0, self._store.latency_sigma))
            if self._tokens >= 1:
                self._tokens -= 1
                self.counts.gets += 1
                node.free_at = max(node.free_at, self._now) + num_bytes / self._store.node_bytes_per_second
                self._free_at = max(self._free_at, self._now) + num_bytes / self._store.bytes_per_second
                self._at(max(node.free_at, self._free_at) + latency, answered)
                return
            self.counts.refused += 1
            pause = next(pauses)
            if self._now - started + pause > self._config.storage.retry_seconds:
                self.counts.given_up += 1
                return
            self._at(self._now + latency + self._random.uniform(0, pause), attempt)

        attempt()

    def _fetch(self, node: _Node, shard: int, fetched: Callable[[], None]) -> bool:
        """A whole shard, once a node: who comes second waits for the first. False where there is no room for it."""
        if shard in node.cached:
            fetched()
            return True
        if shard in node.arriving:
            node.arriving[shard].append(fetched)
            return True
        if not self._reserve(node, self._bytes[shard]):
            return False
        node.arriving[shard] = [fetched]
        self.counts.fetches[shard] += 1
        self.counts.shard_bytes += self._bytes[shard]
        left = deque(min(RANGE_BYTES, self._bytes[shard] - at) for at in range(0, self._bytes[shard], RANGE_BYTES))
        waiting = len(left)

        def arrived() -> None:
            nonlocal waiting
            waiting -= 1
            if left:
                self._get(node, left.popleft(), arrived)
            elif waiting == 0:
                node.cached[shard] = self._now
                for tell in node.arriving.pop(shard):
                    tell()

        for _ in range(min(CONCURRENT_RANGES, len(left))):
            self._get(node, left.popleft(), arrived)
        return True

    def _reserve(self, node: _Node, num_bytes: int) -> bool:
        """As the cache: what nobody reads makes room, the longest unread first."""
        if node.used_bytes + num_bytes > self._limit:
            in_use = set[int]().union(*(reader.now for reader in node.readers))
            for shard, read in sorted(node.cached.items(), key=lambda item: item[1]):
                if node.used_bytes + num_bytes <= self._limit:
                    break
                if self._now - read > IN_USE_SECONDS and shard not in in_use:
                    del node.cached[shard]
                    node.used_bytes -= self._bytes[shard]
                    self.counts.evicted += 1
            if node.used_bytes + num_bytes > self._limit:
                return False
        node.used_bytes += num_bytes
        return True

    # --- the reader -----------------------------------------------------------------------------------------------

    def _begin(self, reader: _Reader) -> None:
        """The reader's next batch, once there is room for it."""
        step = reader.next_step
        if reader.busy or step >= self._steps or step >= self._done + self._ahead:
            return
        reader.busy = True
        reader.next_step += self._num_readers
        batch = self._config.train.global_batch_size
        now, later = self._plan.upcoming_shards(step * batch, rank_streams(self._config, reader.rank, self._world), 2)
        reader.first = set(now) if reader.first is None else reader.first & set(now)
        reader.now, reader.targets = set(now), [*now, *later]
        if step not in self._batches:
            self._batches[step] = self._plan.batch(step * batch, batch)
        rows = share(self._batches[step], reader.rank, self._world, self._config.objective.chunks)
        _, shards, members = self._plan.locate(rows)
        held = reader.node.cached
        if any(shard not in held for shard in shards.tolist()):
            due = max(self._now, turn(step, self._config.data, self._pace))
            self._at(due, partial(self._index, reader, step, shards, members))
        else:
            self._index(reader, step, shards, members)

    def _index(self, reader: _Reader, step: int, shards: Positions, members: Positions) -> None:
        missing = [shard for shard in np.unique(shards).tolist() if shard not in reader.node.indexed]
        waiting = len(missing) + 1

        def indexed() -> None:
            nonlocal waiting
            waiting -= 1
            if waiting == 0:
                self._read(reader, step, shards.tolist(), members.tolist())

        for shard in missing:
            self._read_index(reader.node, shard, indexed)
        indexed()

    def _read_index(self, node: _Node, shard: int, read: Callable[[], None]) -> None:
        """Once a node, as `_fetch`."""
        if (waiting := node.indexes_arriving.get(shard)) is not None:
            waiting.append(read)
            return
        node.indexes_arriving[shard] = [read]
        self.counts.index_gets[shard] += 1

        def arrived() -> None:
            node.indexed.add(shard)
            for tell in node.indexes_arriving.pop(shard):
                tell()

        self._get(node, INDEX_BYTES_A_SAMPLE * self._manifest.shards[shard].num_samples, arrived)

    def _read(self, reader: _Reader, step: int, shards: list[int], members: list[int]) -> None:
        wanted: dict[int, list[tuple[int, int]]] = {}
        for shard, member in zip(shards, members, strict=True):
            wanted.setdefault(shard, []).append(self._place(shard, member))
        waiting = 1

        def arrived() -> None:
            nonlocal waiting
            waiting -= 1
            if waiting == 0:
                self._made(reader, step)

        for shard, spans in wanted.items():
            here = sum(stop - start for start, stop in spans)
            self.counts.needed_bytes += here
            self.counts.samples += len(spans)
            if shard in reader.node.cached:
                reader.node.cached[shard] = self._now
                self.counts.hits += len(spans)
                continue
            waiting += 1
            in_ranges = read_in_ranges(shard in (reader.first or ()), here, self._bytes[shard])
            if in_ranges or not self._fetch(reader.node, shard, arrived):
                self.counts.no_room += not in_ranges
                groups = grouped(spans)
                waiting += len(groups) - 1
                for group in groups:
                    num_bytes = max(spans[i][1] for i in group) - spans[group[0]][0]
                    self.counts.shard_bytes += num_bytes
                    self._get(reader.node, num_bytes, arrived)
        arrived()

    def _place(self, shard: int, member: int) -> tuple[int, int]:
        """Bytes [start, stop) of an image."""
        if shard not in self._places:
            ends = self._ends[: self._manifest.shards[shard].num_samples]
            self._places[shard] = [0, *(ends * (self._bytes[shard] / ends[-1])).astype(int).tolist()]
        return self._places[shard][member], self._places[shard][member + 1]

    def _made(self, reader: _Reader, step: int) -> None:
        reader.busy = False
        self._ready[step] += 1
        for _ in range(FETCHERS - reader.fetching):
            reader.fetching += 1
            self._at(max(self._now, self._pace), partial(self._fetch_ahead, reader))
        while self._done < self._steps and self._ready[self._done] == self._world:
            if self._done == 0:
                self.counts.first_batch_seconds = self._now
            else:
                self.counts.stalled_seconds += max(self._now - self._ends_at, 0.0)
            seconds = self._config.train.global_batch_size / (self._store.images_per_second * self._world)
            self._ends_at = max(self._now, self._ends_at) + seconds
            self._done += 1
            self._at(self._ends_at, self._begin_all)
        if self._config.data.num_workers:
            self._begin(reader)

    def _begin_all(self) -> None:
        for reader in self._readers:
            self._begin(reader)

    def _fetch_ahead(self, reader: _Reader) -> None:
        node = reader.node
        missing = (shard for shard in reader.targets if shard not in node.cached and shard not in node.arriving)
        if not any(self._fetch(node, shard, partial(self._fetch_ahead, reader)) for shard in missing):
            reader.fetching -= 1


def even_shards(num_images: int, num_shards: int, image_bytes: int = 110_000) -> Manifest:
    """A data set that is not there: shards of as many images each, an image of ImageNet's mean size."""
    counts = [num_images * (i + 1) // num_shards - num_images * i // num_shards for i in range(num_shards)]
    shards = tuple(Shard(f"s3://simulated/{i:06d}.tar", "", n * image_bytes, n, 0) for i, n in enumerate(counts))
    return Manifest("s3://simulated/manifest.json", shards)


def recommended_streams(config: Config, manifest: Manifest, world_size: int) -> int:
    """K for a new run: the least multiple of W from data.streams on, so that no two ranks share a stream; with fewer
    shards or a smaller batch than that, K as it is."""
    streams = world_size * -(-config.data.streams // world_size)
    return streams if streams <= min(len(manifest.shards), config.train.global_batch_size) else config.data.streams


def table(config: Config, nodes: int, counts: Counts, steps: int) -> Table:
    """What a simulation counted."""
    fetched = sum(counts.fetches.values())
    rows = [
        ("first batch on every rank", _seconds(counts.first_batch_seconds)),
        ("requests answered", f"{counts.gets:,}"),
        ("refused by 503", f"{counts.refused:,}, {counts.refused / max(counts.refused + counts.gets, 1):.0%} of all"),
        ("given up, which ends a run", f"{counts.given_up:,}"),
        ("bytes read / bytes of the samples", f"{counts.shard_bytes / max(counts.needed_bytes, 1):.2f}"),
        ("fetches of a shard", f"{fetched / max(len(counts.fetches), 1):.2f} on {nodes} nodes"),
        ("samples that were on their node", f"{counts.hits / max(counts.samples, 1):.0%}"),
        ("shards evicted; read in ranges for want of room", f"{counts.evicted:,}; {counts.no_room:,}"),
        ("all steps", _seconds(counts.seconds)),
        ("of which ranks stalled after the first batch", _seconds(counts.stalled_seconds)),
        ("data.streams", f"{config.data.streams}"),
    ]
    found = Table("", "simulated", title=f"The store in the first {steps} steps")
    for row in rows:
        found.add_row(*row)
    return found


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value < math.inf else "never: requests were given up"
