"""Which sample stands at a position: a pure function of (shard counts, manifest hash, seed, K, G), no state.

An epoch's shards are permuted and laid end to end: the line. The line is cut into K streams whose lengths differ by
at most one sample; a stream permutes its samples inside blocks of G shards. Position p lies in epoch p div N; within
its epoch it is q = p mod N, which is row q div K of stream q mod K. Positions run on over the epoch's edge: nothing is
padded, nothing dropped. K and G are config and never follow from the world size, so neither does any batch.

Legend: N samples, K streams, G shards a block, B batch size, W ranks.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from dist_ssl.config import UserError
from dist_ssl.data.random import key_of, permutation, permuted, philox

log = logging.getLogger(__name__)

MOST_REPEATS = 2  # a batch may be so many times the data set

Positions = NDArray[np.int64]

ROUNDS = 8  # of the permutation inside a block
_SHARDS, _SAMPLES = 0, 1  # what a random stream is for: the last word of its counter


class Plan:
    """The order of samples. Instances keep the shards' order of two epochs, which changes no answer."""

    def __init__(
        self, counts: Sequence[int] | Positions, seed: int, manifest_hash: str, num_streams: int, block_shards: int
    ):
        self.counts = np.asarray(counts, dtype=np.int64)
        self.num_samples = int(self.counts.sum())
        if self.num_samples < 1 or (self.counts < 0).any():
            raise UserError(f"expected shards that hold samples, got {len(self.counts)} with {self.num_samples} in all")
        self.num_streams, self.block_shards = num_streams, block_shards
        self._key = key_of("plan", seed, manifest_hash)
        streams = np.arange(num_streams + 1)
        quotient, remainder = divmod(self.num_samples, num_streams)
        self._stream_starts = streams * quotient + np.minimum(streams, remainder)
        self._epochs: OrderedDict[int, tuple[Positions, Positions]] = OrderedDict()

    def batch(self, cursor: int, batch_size: int) -> Positions:
        """Positions [cursor, cursor + batch_size), sorted by (stream, position)."""
        positions = np.arange(cursor, cursor + batch_size, dtype=np.int64)
        return positions[np.lexsort((positions, positions % self.num_samples % self.num_streams))]

    def rank_batch(self, cursor: int, batch_size: int, rank: int, world_size: int, chunks: int = 1) -> Positions:
        """The positions of one rank: of each chunk j, rows j::chunks of the sorted batch, the rank's slice.

        What chunk j holds does not depend on the number of ranks.
        """
        return share(self.batch(cursor, batch_size), rank, world_size, chunks)

    def rows_per_rank(self, batch_size: int, world_size: int, chunks: int = 1) -> list[list[int]]:
        """For each chunk, how many rows each rank has. Raises UserError where a rank would have none."""
        if batch_size // chunks < world_size:
            raise UserError(
                f"expected at least one sample a rank and chunk, got a global batch of {batch_size} for "
                f"{world_size} ranks and {chunks} chunks; raise train.global_batch_size or start fewer ranks"
            )
        sizes = [len(range(j, batch_size, chunks)) for j in range(chunks)]
        return [[size * (r + 1) // world_size - size * r // world_size for r in range(world_size)] for size in sizes]

    def locate(self, positions: Positions) -> tuple[Positions, Positions, Positions]:
        """The (epochs, shards, members in the shard) that stand at positions."""
        epochs, within = np.divmod(np.asarray(positions, dtype=np.int64), self.num_samples)
        rows, streams = np.divmod(within, self.num_streams)
        shards, members = np.empty_like(epochs), np.empty_like(epochs)
        for epoch in np.unique(epochs).tolist():
            order, ends = self._epoch(epoch)
            of_epoch = np.flatnonzero(epochs == epoch)
            lines = self._stream_starts[streams[of_epoch]] + rows[of_epoch]
            lines = self._shuffled(epoch, streams[of_epoch], lines)
            slots = np.searchsorted(ends, lines, side="right")
            shards[of_epoch] = order[slots]
            members[of_epoch] = lines - (ends[slots] - self.counts[order[slots]])
        return epochs, shards, members

    def upcoming_shards(self, cursor: int, streams: Sequence[int], blocks: int) -> list[list[int]]:
        """Shards that the given streams read from the cursor on: a list for each of the next `blocks` blocks.

        The first holds the blocks that the streams are in, the second those after them, each shard once.
        """
        epoch, within = divmod(cursor, self.num_samples)
        ahead: list[list[int]] = [[] for _ in range(blocks)]
        for stream in streams:
            row = within // self.num_streams + (within % self.num_streams > stream)
            for depth, shards in zip(range(blocks), self._blocks_from(epoch, stream, row), strict=False):
                ahead[depth] += shards
        seen: set[int] = set()
        return [[shard for shard in shards if not (shard in seen or seen.add(shard))] for shards in ahead]  # type: ignore[func-returns-value]

    def _blocks_from(self, epoch: int, stream: int, row: int) -> Iterator[list[int]]:
        of_stream, line = np.array([stream]), self._stream_starts[[stream]] + row
        if self._stream_starts[stream] == self._stream_starts[stream + 1]:
            return
        while True:
            order, ends = self._epoch(epoch)
            while line < self._stream_starts[stream + 1]:
                _, start, stop = self._blocks(ends, of_stream, line)
                slots = np.searchsorted(ends, [start[0], stop[0] - 1], side="right")
                yield order[slots[0] : slots[1] + 1].tolist()
                line = stop
            epoch, line = epoch + 1, self._stream_starts[[stream]]

    def _epoch(self, epoch: int) -> tuple[Positions, Positions]:
        """Shards in the epoch's order, and where each ends in the line."""
        if epoch not in self._epochs:
            order = permutation(self._key, len(self.counts), 0, epoch, _SHARDS)
            self._epochs[epoch] = order, np.cumsum(self.counts[order])
            while len(self._epochs) > 2:
                self._epochs.popitem(last=False)
        return self._epochs[epoch]

    def _shuffled(self, epoch: int, streams: Positions, lines: Positions) -> Positions:
        """Which places of the line come at places of the line, once streams permute their samples inside blocks."""
        _, ends = self._epoch(epoch)
        blocks, starts, stops = self._blocks(ends, streams, lines)
        groups, group_of = np.unique(streams * len(ends) + blocks, return_inverse=True)
        counters = np.empty((len(groups), ROUNDS // 4, 4), dtype=np.uint64)
        counters[..., 0] = np.arange(ROUNDS // 4)
        counters[..., 1] = (groups % len(ends))[:, None]
        counters[..., 2] = epoch
        counters[..., 3] = (_SAMPLES + groups // len(ends))[:, None]
        round_keys = philox(self._key, counters.reshape(-1, 4)).reshape(len(groups), ROUNDS)
        return starts + permuted(round_keys[group_of], lines - starts, stops - starts)

    def _blocks(self, ends: Positions, streams: Positions, lines: Positions) -> tuple[Positions, Positions, Positions]:
        """For places of the line in these streams: the block's number in its stream, and where it starts and stops."""
        start, stop = self._stream_starts[streams], self._stream_starts[streams + 1]
        first = np.searchsorted(ends, start, side="right")
        blocks = (np.searchsorted(ends, lines, side="right") - first) // self.block_shards
        head = first + blocks * self.block_shards
        last = np.minimum(head + self.block_shards, len(ends)) - 1
        # A stream may start and stop in the middle of a shard.
        return blocks, np.where(blocks > 0, ends[head - 1], start), np.minimum(stop, ends[last])


def share(batch: Positions, rank: int, world_size: int, chunks: int = 1) -> Positions:
    """A rank's rows of a sorted batch: see `Plan.rank_batch`."""
    return np.concatenate([_slice(batch[j::chunks], rank, world_size) for j in range(chunks)])


def _slice(rows: Positions, rank: int, world_size: int) -> Positions:
    return rows[len(rows) * rank // world_size : len(rows) * (rank + 1) // world_size]


def check_batch_size(global_batch_size: int, num_samples: int, rank: int) -> None:
    """Warn, on rank 0, where a batch holds an image several times; UserError where it would each twice and more."""
    if global_batch_size <= num_samples:
        return
    told = f"train.global_batch_size = {global_batch_size}, but data.shards holds {num_samples} samples"
    if global_batch_size > MOST_REPEATS * num_samples:
        raise UserError(
            f"{told}: expected at most {num_samples}, that no batch holds an image twice (up to "
            f"{MOST_REPEATS * num_samples} with a warning); lower the batch, or give more data"
        )
    if rank == 0:
        log.warning("%s: each batch holds some images twice, as negatives of themselves; lower it", told)
