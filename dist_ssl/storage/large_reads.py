"""Reading whole files in large ranges, side by side, handed on as they come.

Nothing is put together in memory: a body's pieces go straight to where the caller wants them, and their checksum is
taken on the way. That costs less than `cat_file`, and what came of a body that breaks off is kept.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO

from isal import isal_zlib

from dist_ssl import storage
from dist_ssl.config import StorageConfig

RANGE_BYTES = 8 * 2**20  # one request
CONCURRENT_RANGES = 4  # of a file
STREAMED = ("s3", "gs", "https", "hf")  # whose bodies are taken in as they come; of others fsspec hands on whole ranges
CHUNK_BYTES = 2**18  # of a body, at most, that is taken in at a time, and twice that is lost where it breaks off


@dataclass
class _Range:
    """Bytes [start, stop) of a file; those before `at` were handed to `take`."""

    url: str
    start: int
    stop: int
    at: int
    take: Callable[[int, bytes], object]
    crc32: int = 0

    def add(self, data: bytes) -> None:
        if self.at + len(data) > self.stop:
            raise EOFError(f"expected bytes {self.at} to {self.stop}, got more: the server takes no Range")
        try:
            self.take(self.at, data)
        except OSError as error:  # of this machine: no request mends it
            raise storage.StorageError(
                f"{storage.redact(self.url)}: what is read of it can't be kept on this machine: {error}"
            ) from None
        self.crc32 = isal_zlib.crc32(data, self.crc32)
        self.at += len(data)


def writer(file: BinaryIO) -> Callable[[int, bytes], object]:
    """What `read_file` hands bytes to, so that they land in an open local file."""

    def write(offset: int, data: bytes) -> None:
        # Asked for each time: the number of a file that was closed may be another's by now.
        if os.pwrite(file.fileno(), data, offset) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return write


def read_file(
    url: str,
    config: StorageConfig,
    num_bytes: int,
    take: Callable[[int, bytes], object],
    stop: Callable[[], bool] = lambda: False,
) -> int | None:
    """Hand the `num_bytes` bytes of a file to `take(offset, bytes)`, in any order.

    Returns their crc32, or None once `stop()` was true. Large ranges are requested, several at a time. A body that
    breaks off is resumed by a request for its rest, where it is `STREAMED`. `take` may run on fsspec's event loop,
    where it must not wait or call `storage`. Raises StorageError as `storage.read_bytes` does.
    """
    import fsspec.asyn  # not above, as in `systems`

    def over() -> bool:
        return ended.is_set() or stop()

    def fill(part: _Range) -> None:
        system, path = storage.filesystem(url, config)

        def once() -> None:
            if over() or part.at == part.stop:
                return
            try:
                fsspec.asyn.sync(system.loop, _receive, system, path, part)
            except OSError as error:
                if error.errno == errno.EINVAL:  # what s3fs makes of a range beyond the end
                    storage.check_length(url, system, path, part.stop)
                raise
            if part.at < part.stop:
                storage.check_length(url, system, path, part.stop)
                raise EOFError(f"expected bytes up to {part.stop}, got them up to {part.at}")

        try:
            if storage.check_url(url) in STREAMED:
                storage.retry(url, config, once)
            elif not over():
                part.add(storage.read_bytes(url, config, part.at, part.stop))
        except BaseException:
            ended.set()
            raise

    ended = threading.Event()  # by a failure: other ranges are not retried any more
    starts = range(0, num_bytes, RANGE_BYTES)
    parts = [_Range(url, start, min(start + RANGE_BYTES, num_bytes), start, take) for start in starts]
    total = 0
    with ThreadPoolExecutor(CONCURRENT_RANGES) as pool:
        try:
            for part, _ in zip(parts, pool.map(fill, parts), strict=True):
                total = isal_zlib.crc32_combine(total, part.crc32, part.stop - part.start)
        finally:
            ended.set()
    return None if stop() else total


async def _receive(system: Any, path: str, part: _Range) -> None:
    """The rest of a range, as it comes: fsspec itself would keep it together, and lose it when a body breaks."""
    async with _body(system, path, part) as body:
        while data := await body.read(CHUNK_BYTES):
            part.add(data)


@contextlib.asynccontextmanager
async def _body(system: Any, path: str, part: _Range) -> AsyncIterator[Any]:
    if hasattr(system, "open_range"):  # ours
        async with await system.open_range(path, part.at, part.stop) as response:
            yield response.content
        return
    bucket, key, _ = system.split_path(path)
    response = await system._call_s3("get_object", Bucket=bucket, Key=key, Range=f"bytes={part.at}-{part.stop - 1}")
    try:
        yield response["Body"]
    finally:
        response["Body"].close()
