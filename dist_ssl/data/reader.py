"""Reads the bytes of samples out of shards, in the process that uses them."""

from __future__ import annotations

import json
import os
import zlib
from collections import OrderedDict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_ssl import storage
from dist_ssl.config import DataConfig, StorageConfig
from dist_ssl.data.decode import BadSample
from dist_ssl.data.index import Manifest, MemberIndex, read_member_index
from dist_ssl.data.tar import MAX_JSON_BYTES

MAX_OPEN_SHARDS = 64


class Reader:
    """The samples of a manifest's shards. Opens nothing before the first read, and is sent to workers unopened."""

    def __init__(self, manifest: Manifest, storage_config: StorageConfig, data: DataConfig):
        self.manifest, self._storage, self._data = manifest, storage_config, data
        self._indexes: OrderedDict[int, MemberIndex] = OrderedDict()
        self._files: OrderedDict[int, int] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_indexes": OrderedDict(), "_files": OrderedDict()}

    def __del__(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)

    def index(self, shard: int) -> MemberIndex:
        if shard not in self._indexes:
            self._indexes[shard] = read_member_index(self.manifest.shards[shard], self._storage)
            while len(self._indexes) > MAX_OPEN_SHARDS:
                self._indexes.popitem(last=False)
        self._indexes.move_to_end(shard)
        return self._indexes[shard]

    def key(self, shard: int, member: int) -> str:
        """The name of a sample in ledgers and logs: "shard/key"."""
        return f"{self.manifest.shards[shard].name}/{self.index(shard).keys[member]}"

    def images(self, shards: NDArray[np.int64], members: NDArray[np.int64]) -> list[bytes | BadSample]:
        """The image bytes of samples, in the order asked for; BadSample where they are not those that were indexed."""
        found: list[bytes | BadSample] = []
        for shard, member in zip(shards.tolist(), members.tolist(), strict=True):
            index = self.index(shard)
            start, size = int(index.offsets[member]), int(index.sizes[member])
            data = self._read(shard, start, start + size)
            whole = len(data) == size and zlib.crc32(data) == int(index.crcs[member])
            found.append(data if whole else BadSample("its bytes are not those that were indexed (crc32)"))
        return found

    def factors(self, shards: NDArray[np.int64], members: NDArray[np.int64]) -> list[dict[str, Any]] | None:
        """The .json of samples; None where one has none."""
        found = []
        for shard, member in zip(shards.tolist(), members.tolist(), strict=True):
            index = self.index(shard)
            start, size = int(index.json_offsets[member]), int(index.json_sizes[member])
            if not 0 < size <= MAX_JSON_BYTES:
                return None
            found.append(json.loads(self._read(shard, start, start + size)))
        return found

    def _read(self, shard: int, start: int, stop: int) -> bytes:
        url = self.manifest.shards[shard].url
        if not storage.is_local(url):
            return storage.read_bytes(url, self._storage, start, stop)
        if shard not in self._files:
            self._files[shard] = os.open(storage.filesystem(url, self._storage)[1], os.O_RDONLY)
            while len(self._files) > MAX_OPEN_SHARDS:
                os.close(self._files.popitem(last=False)[1])
        self._files.move_to_end(shard)
        return os.pread(self._files[shard], stop - start, start)
