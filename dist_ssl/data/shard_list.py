"""The shards that a manifest lists, as columns: a hundred thousand are some 8 MB, which a rank's workers share.

As objects they were 40 MB in each process, and 96 data workers of a node are 96 processes.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.context import get_spawning_popen
from multiprocessing.reduction import DupFd
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from dist_ssl import storage

Kind = Literal["tar", "folder", "idx"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# `url` and `index_url` end where these say in the text of all names; what is before the last slash is in a list.
_COLUMNS = {"bytes": "<i8", "samples": "<i8", "url_end": "<i8", "index_end": "<i8", "crc32": "<u4"}
_COLUMNS |= {"url_folder": "<u4", "index_folder": "<u4", "kind": "u1", "headers_only": "?"}
_ROW = np.dtype(list(_COLUMNS.items()))


@dataclass(frozen=True)
class Shard:
    url: str  # of the tar; of the folder or the IDX file of which it lists a part
    index_url: str
    num_bytes: int
    num_samples: int
    crc32: int  # of its bytes; with `headers_only` of its member table
    kind: Kind = "tar"
    headers_only: bool = False

    @property
    def name(self) -> str:
        if self.kind == "tar":
            return self.url.rsplit("/", 1)[-1].removesuffix(".tar")
        return self.index_url.rsplit("/", 1)[-1].removesuffix(".idx")


class Shards(Sequence[Shard]):
    """A sequence of `Shard`, made when asked for. What is sent to a process that is being started is a mapping of the
    same memory; what is pickled otherwise is a copy."""

    def __init__(self, rows: NDArray[Any], text: bytes | memoryview, folders: Sequence[str]):
        self._rows, self._text, self._folders = rows, text, tuple(folders)
        self._memory: int | None = None  # a descriptor

    @staticmethod
    def of(shards: Iterable[Shard]) -> Shards:
        """Raises OverflowError where a number is none of a shard."""
        if isinstance(shards, Shards):
            return shards
        folders: dict[str, int] = {}
        names: list[bytes] = []

        def row(shard: Shard) -> tuple[Any, ...]:
            numbers = []
            for url in (shard.url, shard.index_url):
                folder, slash, name = url.rpartition("/")
                names.append(name.encode("utf-8", "surrogateescape"))
                numbers.append(folders.setdefault(folder + slash, len(folders)))
            kind = KINDS.index(shard.kind)
            return shard.num_bytes, shard.num_samples, 0, 0, shard.crc32, *numbers, kind, shard.headers_only

        rows = np.fromiter(map(row, shards), _ROW)
        ends = np.cumsum([len(name) for name in names], dtype=np.int64).reshape(-1, 2)
        rows["url_end"], rows["index_end"] = ends[:, 0], ends[:, 1]
        return Shards(rows, b"".join(names), list(folders))

    @property
    def num_bytes(self) -> NDArray[np.int64]:
        return np.asarray(self._rows["bytes"])

    @property
    def num_samples(self) -> NDArray[np.int64]:
        return np.asarray(self._rows["samples"])

    @property
    def remote(self) -> NDArray[np.bool_]:
        """Which of them are not on this machine's file system."""
        return np.array([not storage.is_local(f"{folder}_") for folder in self._folders], bool)[
            self._rows["url_folder"]
        ]

    def urls(self) -> Iterator[str]:
        start = 0
        for folder, end, index_end in self._rows[["url_folder", "url_end", "index_end"]].tolist():
            yield self._folders[folder] + _text(self._text[start:end])
            start = index_end

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return tuple(self[j] for j in range(*i.indices(len(self))))
        i = range(len(self))[i]
        return self._shard(self._rows[i].item(), int(self._rows["index_end"][i - 1]) if i else 0)

    def __iter__(self) -> Iterator[Shard]:
        start = 0
        for row in self._rows.tolist():
            yield self._shard(row, start)
            start = row[3]

    def _shard(self, row: tuple[Any, ...], start: int) -> Shard:
        num_bytes, samples, url_end, index_end, crc32, url_folder, index_folder, kind, headers_only = row
        return Shard(
            self._folders[url_folder] + _text(self._text[start:url_end]),
            self._folders[index_folder] + _text(self._text[url_end:index_end]),
            num_bytes, samples, crc32, KINDS[kind], headers_only,
        )  # fmt: skip

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Shards) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        if get_spawning_popen() is None:
            return Shards, (np.array(self._rows), bytes(self._text), self._folders)
        if self._memory is None:
            self._memory = os.memfd_create("shards")
            with open(self._memory, "wb", closefd=False) as file:
                file.write(self._rows.tobytes())
                file.write(self._text)
            self._rows, self._text = _mapped(self._memory, len(self))
        return _of_mapping, (DupFd(self._memory), len(self), self._folders)

    def __del__(self) -> None:
        if self._memory is not None:
            os.close(self._memory)


def _of_mapping(memory: Any, count: int, folders: Sequence[str]) -> Shards:
    descriptor = memory.detach()
    try:
        return Shards(*_mapped(descriptor, count), folders)
    finally:
        os.close(descriptor)


def _mapped(descriptor: int, count: int) -> tuple[NDArray[Any], memoryview]:
    """Rows and text as they lie in memory that several processes see."""
    data = memoryview(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)) if count else memoryview(b"")
    return np.frombuffer(data, _ROW, count), data[count * _ROW.itemsize :]


def _text(data: bytes | memoryview) -> str:
    return str(data, "utf-8", "surrogateescape")
