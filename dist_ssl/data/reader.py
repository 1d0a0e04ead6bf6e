"""Reads the bytes of samples out of shards, in the process that uses them.

Local shards are read in place, and so are images without shards. Remote ones come from the node's cache, which
threads fill ahead. At the start, a sample whose shard is not there yet is read by a range request, so that the first
step does not wait for whole shards; later it waits for its shard: where the store is the bottleneck, no byte should
be read twice.
"""

from __future__ import annotations

import json
import os
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_ssl import storage
from dist_ssl.config import DataConfig, StorageConfig, UserError
from dist_ssl.data.cache import FetchAhead, ShardCache
from dist_ssl.data.decode import BadSample
from dist_ssl.data.in_place import read_image
from dist_ssl.data.manifest import Manifest, MemberIndex, Shard, read_member_index
from dist_ssl.data.requests import grouped, read_in_ranges
from dist_ssl.data.tar import MAX_JSON_BYTES

CONCURRENT_REQUESTS = 8


class Reader:
    """The samples of a manifest's shards. Opens nothing before the first read, and is sent to workers unopened."""

    def __init__(self, manifest: Manifest, storage_config: StorageConfig, data: DataConfig, pace: float = 0.0):
        """pace: seconds between the first steps of a start that ask a store: see `requests.seconds_a_step`."""
        self.manifest, self._storage, self._data, self._pace = manifest, storage_config, data, pace
        self.remote = bool(manifest.columns.remote.any())
        self._reset()

    def _reset(self) -> None:
        self._began_at: float | None = None
        self._indexes: OrderedDict[int, MemberIndex] = OrderedDict()
        self._files: dict[int, int] = {}
        self._aimed: set[int] = set()
        self._targets: list[list[Shard]] = []
        self._cache: ShardCache | None = None
        self._ahead: FetchAhead | None = None
        self._requests: ThreadPoolExecutor | None = None
        self._first: set[int] | None = None  # shards that the start needs: all, before it is known

    def __getstate__(self) -> dict[str, Any]:
        kept = ("manifest", "_storage", "_data", "_pace", "remote")
        return {name: value for name, value in vars(self).items() if name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._reset()

    def close(self) -> None:
        if self._ahead is not None:
            self._ahead.close()
        if self._requests is not None:
            self._requests.shutdown(cancel_futures=True)
        for descriptor in self._files.values():
            os.close(descriptor)
        self._reset()

    def aim(self, now: Sequence[int], later: Sequence[int]) -> None:
        """Fetch to the cache the shards that are read now, then those that are read later; local ones are not fetched.

        Only these, and those of the batch at hand, are kept open. Nothing is fetched ahead before the first images were
        read: at the start of many workers, what is needed now would wait behind what is not.
        """
        self._aimed = {*now, *later}
        if not self.remote:
            return
        self._first = set(now) if self._first is None else self._first & set(now)
        listed = ([self.manifest.shards[shard] for shard in part] for part in (now, later))
        self._targets = [[shard for shard in part if not storage.is_local(shard.url)] for part in listed]
        if self._ahead is not None:
            self._ahead.aim(*self._targets)

    def _fetch_ahead(self) -> None:
        if self._ahead is None and self._targets:
            self._ahead = FetchAhead(self._opened_cache(), (self._began_at or 0.0) + self._pace)
            self._ahead.aim(*self._targets)

    def index(self, shard: int) -> MemberIndex:
        if shard not in self._indexes:
            self._indexes[shard] = self._read_index(shard)
        self._indexes.move_to_end(shard)
        return self._indexes[shard]

    def key(self, shard: int, member: int) -> str:
        """The name of a sample in ledgers and logs: "shard/key"."""
        return f"{self.manifest.shards[shard].name}/{self.index(shard).keys[member]}"

    def images(
        self, shards: NDArray[np.int64], members: NDArray[np.int64], turn: float = 0.0
    ) -> list[bytes | BadSample]:
        """The image bytes of samples, in the order asked for; BadSample where they are not those that were indexed.

        turn: seconds after the first call before which no store is asked (`requests.turn`). Images that lie in no
        shard and changed since are a UserError.
        """
        self._let_go(self._aimed.union(shards.tolist()))
        self._wait_for_turn(turn, shards)
        self._load_indexes(shards)
        samples = list(zip(shards.tolist(), members.tolist(), strict=True))
        in_tars = [self.manifest.shards[shard].kind == "tar" for shard, _ in samples]
        from_tars = iter(self._from_tars([sample for sample, in_tar in zip(samples, in_tars, strict=True) if in_tar]))
        self._fetch_ahead()
        return [
            next(from_tars)
            if in_tar
            else read_image(self.manifest.shards[shard], self.index(shard), member, self._storage)
            for (shard, member), in_tar in zip(samples, in_tars, strict=True)
        ]

    def _wait_for_turn(self, turn: float, shards: NDArray[np.int64]) -> None:
        now = time.monotonic()
        if self._began_at is None:
            self._began_at = now
        left = self._began_at + turn - now
        if self.remote and left > 0 and any(self._open(shard) is None for shard in np.unique(shards).tolist()):
            time.sleep(left)

    def _from_tars(self, samples: Sequence[tuple[int, int]]) -> list[bytes | BadSample]:
        wanted = [(shard, *self.index(shard).place(member)) for shard, member in samples]
        found: list[bytes | BadSample] = []
        for (shard, start, stop), (_, member), data in zip(wanted, samples, self._read(wanted), strict=True):
            index = self.index(shard)
            image = index.image_in(data, member)
            if image is None and self._forget(shard):
                data = storage.read_bytes(self.manifest.shards[shard].url, self._storage, start, stop)
                image = index.image_in(data, member)
            found.append(BadSample(index.difference) if image is None else image)
        return found

    def factors(self, shards: NDArray[np.int64], members: NDArray[np.int64]) -> list[dict[str, Any]] | None:
        """The .json of samples; None where one has none, or holds no object."""
        wanted = []
        for shard, member in zip(shards.tolist(), members.tolist(), strict=True):
            index = self.index(shard)
            start, size = int(index.json_offsets[member]), int(index.json_sizes[member])
            if not 0 < size <= MAX_JSON_BYTES:
                return None
            wanted.append((shard, start, start + size))
        try:
            parsed = [json.loads(data) for data in self._read(wanted)]
        except (ValueError, RecursionError):
            return None
        return parsed if all(isinstance(one, dict) for one in parsed) else None

    def _let_go(self, kept: set[int]) -> None:
        """Close what is not read any more: while a shard is open, no process can evict it."""
        for shard in self._files.keys() - kept:
            os.close(self._files.pop(shard))
        while len(self._indexes) > 2 * len(kept):
            self._indexes.popitem(last=False)

    def _load_indexes(self, shards: NDArray[np.int64]) -> None:
        """Read missing member indexes at once: one after another, a first batch of many shards would take seconds."""
        missing = [shard for shard in np.unique(shards).tolist() if shard not in self._indexes]
        if not self.remote or len(missing) < 2:
            return
        self._opened_cache()  # here, not by several threads
        self._indexes.update(zip(missing, self._pool().map(self._read_index, missing), strict=True))

    def _read_index(self, shard: int) -> MemberIndex:
        listed = self.manifest.shards[shard]
        if storage.is_local(listed.index_url):  # no cache is made for it
            return read_member_index(listed, self._storage)
        return self._opened_cache().index(listed)

    def _read(self, wanted: Sequence[tuple[int, int, int]]) -> list[bytes]:
        """Bytes [start, stop) of shards; those that are not on this node by concurrent requests."""
        data: list[bytes] = [b""] * len(wanted)
        away: dict[int, list[int]] = {}
        for row, (shard, start, stop) in enumerate(wanted):
            descriptor = self._open(shard)
            if descriptor is None:
                away.setdefault(shard, []).append(row)
            else:
                data[row] = os.pread(descriptor, stop - start, start)
        if away:
            self._read_away(wanted, away, data)
        return data

    def _read_away(self, wanted: Sequence[tuple[int, int, int]], away: dict[int, list[int]], data: list[bytes]) -> None:
        """Fill in the rows of shards that are not on this node, by concurrent requests; neighbours share one."""
        requests: list[tuple[int, list[int]]] = []
        for shard, rows in away.items():
            if self._fetch_now(shard, sum(wanted[row][2] - wanted[row][1] for row in rows)):
                for row in rows:
                    data[row] = os.pread(self._files[shard], wanted[row][2] - wanted[row][1], wanted[row][1])
                continue
            groups = grouped([(wanted[row][1], wanted[row][2]) for row in rows])
            requests += [(shard, [rows[i] for i in group]) for group in groups]

        def read(request: tuple[int, list[int]]) -> None:
            shard, rows = request
            first, last = wanted[rows[0]][1], max(wanted[row][2] for row in rows)
            block = storage.read_bytes(self.manifest.shards[shard].url, self._storage, first, last)
            for row in rows:
                data[row] = block[wanted[row][1] - first : wanted[row][2] - first]

        list(self._pool().map(read, requests))

    def _fetch_now(self, shard: int, wanted_bytes: int) -> bool:
        """Bring a shard in before going on; not at the start, unless a good part of it is wanted."""
        listed = self.manifest.shards[shard]
        if read_in_ranges(self._first is None or shard in self._first, wanted_bytes, listed.num_bytes):
            return False
        try:
            self._opened_cache().fetch(listed, wait=True)
        except UserError:
            return False  # it changed since it was indexed: its samples are checked one by one
        return self._open(shard) is not None

    def _open(self, shard: int) -> int | None:
        if shard not in self._files:
            listed = self.manifest.shards[shard]
            if (path := storage.local_path(listed.url)) is not None:
                descriptor: int | None = os.open(path, os.O_RDONLY)
            else:
                descriptor = self._opened_cache().open(listed)
            if descriptor is None:
                return None
            self._files[shard] = descriptor
        return self._files[shard]

    def _forget(self, shard: int) -> bool:
        """Drop the cached copy of a shard, which was damaged after it was checked. False for a local shard."""
        if storage.is_local(self.manifest.shards[shard].url):
            return False
        if shard in self._files:
            os.close(self._files.pop(shard))
        self._opened_cache().drop(self.manifest.shards[shard])
        return True

    def _opened_cache(self) -> ShardCache:
        if self._cache is None:
            self._cache = ShardCache(self._data, self._storage)
        return self._cache

    def _pool(self) -> ThreadPoolExecutor:
        if self._requests is None:
            self._requests = ThreadPoolExecutor(CONCURRENT_REQUESTS, thread_name_prefix="requests")
        return self._requests
