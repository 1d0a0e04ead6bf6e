"""Which sample stands at a position: a pure function of (shard counts, manifest hash, seed, K, G), no state.

An epoch's shards are permuted and laid end to end: the line. The line is cut into K streams whose lengths differ by
at most one sample; a stream permutes its samples inside blocks of G shards. Position p lies in epoch p div N; within
its epoch it is q = p mod N, which is row q div K of stream q mod K. Positions run on over the epoch's edge: nothing is
padded, nothing dropped. K and G are config and never follow from the world size, so neither does any batch.

Legend: N samples, K streams, G shards a block, B batch size, W ranks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from dist_ssl.config import UserError
from dist_ssl.data.random import key_of, permutation

Positions = NDArray[np.int64]

_SHARDS, _SAMPLES = 0, 1  # what a random stream is for: the last word of its counter


class Plan:
    """The order of samples. Instances keep a few permutations of late, which changes no answer."""

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
        self._blocks: OrderedDict[tuple[int, int, int], Positions] = OrderedDict()

    def batch(self, cursor: int, batch_size: int) -> Positions:
        """Positions [cursor, cursor + batch_size), sorted by (stream, position)."""
        positions = np.arange(cursor, cursor + batch_size, dtype=np.int64)
        return positions[np.lexsort((positions, positions % self.num_samples % self.num_streams))]

    def rank_batch(self, cursor: int, batch_size: int, rank: int, world_size: int, chunks: int = 1) -> Positions:
        """The positions of one rank: of each chunk j, rows j::chunks of the sorted batch, the rank's slice.

        What chunk j holds does not depend on the number of ranks.
        """
        rows = self.batch(cursor, batch_size)
        return np.concatenate([_slice(rows[j::chunks], rank, world_size) for j in range(chunks)])

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
            # Blocks are told by stream and by how many shards the line is past the stream's first.
            first = np.searchsorted(ends, self._stream_starts[streams[of_epoch]], side="right")
            blocks = (np.searchsorted(ends, lines, side="right") - first) // self.block_shards
            groups, group_of = np.unique(streams[of_epoch] * len(ends) + blocks, return_inverse=True)
            by_group = np.split(np.argsort(group_of, kind="stable"), np.cumsum(np.bincount(group_of))[:-1])
            for group, mine in zip(groups.tolist(), by_group, strict=True):
                stream, block = divmod(group, len(ends))
                start, stop = self._block_range(epoch, stream, block)
                lines[mine] = start + self._permutation(epoch, stream, block, stop - start)[lines[mine] - start]
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
        length = int(self._stream_starts[stream + 1] - self._stream_starts[stream])
        if length == 0:
            return
        while True:
            order, ends = self._epoch(epoch)
            line, stop = self._stream_starts[stream] + row, self._stream_starts[stream + 1]
            first = np.searchsorted(ends, self._stream_starts[stream], side="right")
            while line < stop:
                block = int((np.searchsorted(ends, line, side="right") - first) // self.block_shards)
                block_start, block_stop = self._block_range(epoch, stream, block)
                slots = np.searchsorted(ends, [block_start, block_stop - 1], side="right")
                yield order[slots[0] : slots[1] + 1].tolist()
                line = block_stop
            epoch, row = epoch + 1, 0

    def _epoch(self, epoch: int) -> tuple[Positions, Positions]:
        """Shards in the epoch's order, and where each ends in the line."""
        if epoch not in self._epochs:
            order = permutation(self._key, len(self.counts), 0, epoch, _SHARDS)
            self._epochs[epoch] = order, np.cumsum(self.counts[order])
            while len(self._epochs) > 2:
                self._epochs.popitem(last=False)
        return self._epochs[epoch]

    def _block_range(self, epoch: int, stream: int, block: int) -> tuple[int, int]:
        """Where the block starts and ends in the line."""
        _, ends = self._epoch(epoch)
        start, stop = int(self._stream_starts[stream]), int(self._stream_starts[stream + 1])
        first = int(np.searchsorted(ends, start, side="right")) + block * self.block_shards
        last = min(first + self.block_shards, len(ends)) - 1
        return max(start, int(ends[first - 1]) if block else start), min(stop, int(ends[last]))

    def _permutation(self, epoch: int, stream: int, block: int, size: int) -> Positions:
        key = (epoch, stream, block)
        if key in self._blocks:
            self._blocks.move_to_end(key)
        else:
            self._blocks[key] = permutation(self._key, size, block, epoch, _SAMPLES + stream)
            while len(self._blocks) > 2 * self.num_streams + 2:
                self._blocks.popitem(last=False)
        return self._blocks[key]


def _slice(rows: Positions, rank: int, world_size: int) -> Positions:
    return rows[len(rows) * rank // world_size : len(rows) * (rank + 1) // world_size]
