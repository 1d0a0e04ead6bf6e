"""A file of a store, read here and there: seeks are free, and each read asks for a small window of bytes."""

from __future__ import annotations

import io
from typing import BinaryIO, cast

from dist_ssl.config import StorageConfig
from dist_ssl.storage.files import read_bytes
from dist_ssl.storage.urls import local_path

WINDOW_BYTES = 4096


def open_windows(url: str, num_bytes: int, config: StorageConfig) -> BinaryIO:
    """The file at `url`, of `num_bytes` bytes, to read a little of at many places.

    What a read wants beyond the window at hand is one request of at least WINDOW_BYTES. Reads raise as
    `storage.read_bytes` does. To be closed.
    """
    if (path := local_path(url)) is not None:
        return open(path, "rb", buffering=WINDOW_BYTES)
    return cast(BinaryIO, io.BufferedReader(_Ranges(url, num_bytes, config), WINDOW_BYTES))


class _Ranges(io.RawIOBase):
    def __init__(self, url: str, num_bytes: int, config: StorageConfig):
        super().__init__()
        self._url, self._num_bytes, self._config = url, num_bytes, config
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._num_bytes}[whence]
        self._at = max(start + offset, 0)
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = read_bytes(self._url, self._config, self._at, min(self._at + len(buffer), self._num_bytes))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
