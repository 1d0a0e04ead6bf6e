"""A bounded directory of whole shards, shared by all ranks, workers and runs of a node, without a daemon.

A file's name is a digest of the shard's full URL, size and crc32 (what the manifest promises; unlike an ETag it costs
no request and is checked against the bytes). Whoever holds a shard's lock file may fetch it: under another name,
checked, then renamed, so that a file under its final name is whole. A kill leaves a partial file and a lock that the
kernel frees. Whoever reads a file holds a shared lock on it, and only what nobody has open is evicted: a file that is
deleted while it is open would stay on the disk, uncounted.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import mmap
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from dist_ssl.config import DataConfig, StorageConfig, UserError
from dist_ssl.data.manifest import MemberIndex, Shard, member_index, read_member_index
from dist_ssl.data.tar import index_tar
from dist_ssl.storage.large_reads import read_file, writer

log = logging.getLogger(__name__)

IN_USE_SECONDS = 20.0  # a file that was touched so lately is not evicted: somebody reads it
WAIT_SECONDS = 0.5  # before looking again for a shard that may be fetched
POLL_SECONDS = 0.002  # between looks at a lock
STALLED_SECONDS = 5.0  # a fetch that wrote nothing for so long is not waited for: its process may be stopped
TOUCH_SECONDS = 5.0  # between touches of what is in use


class ShardCache:
    """`open` gives a cached shard, `fetch` brings one in; both may be called by any process at any time."""

    def __init__(self, data: DataConfig, storage_config: StorageConfig):
        self._storage, self._limit = storage_config, int(data.cache_gb * 1e9)
        self._directory = Path(data.cache_dir) if data.cache_dir else _own_directory()
        self._directory.mkdir(parents=True, exist_ok=True)
        self._said: set[str] = set()
        self._refused: dict[Path, str] = {}

    def path(self, shard: Shard) -> Path:
        identity = f"{shard.url}\0{shard.num_bytes}\0{shard.crc32}"
        return self._directory / f"{hashlib.sha256(identity.encode()).hexdigest()[:40]}.tar"

    def open(self, shard: Shard) -> int | None:
        """A descriptor of the shard, which is not evicted before that is closed; None where it isn't here."""
        try:
            descriptor = os.open(self.path(shard), os.O_RDONLY)
        except FileNotFoundError:
            return None
        if _try_lock(descriptor, fcntl.LOCK_SH) and (found := os.fstat(descriptor)).st_nlink:
            if found.st_size == shard.num_bytes:
                return descriptor
            self.drop(shard)
        os.close(descriptor)
        return None

    def index(self, shard: Shard) -> MemberIndex:
        """The member index of a shard in a store, which is asked once a node: processes share the memory.

        Raises as `read_member_index`.
        """
        path = self.path(shard).with_suffix(".idx")
        partial = path.with_suffix(".idx-part")
        if (found := _mapped(path, shard)) is not None:
            return found
        with _locked(path.with_suffix(".idx-lock"), partial) as mine:
            if (found := _mapped(path, shard)) is not None:
                return found
            found = read_member_index(shard, self._storage)
            if mine:
                with contextlib.suppress(OSError):
                    partial.write_bytes(found.to_bytes())
                    os.replace(partial, path)
                    return _mapped(path, shard) or found
            return found

    def touch(self, shard: Shard) -> None:
        with contextlib.suppress(OSError):
            os.utime(self.path(shard))

    def drop(self, shard: Shard) -> None:
        """Remove a damaged file, of which others may be reading: what they then get is damaged too."""
        with contextlib.suppress(FileNotFoundError):
            os.truncate(self.path(shard), 0)  # so that its bytes don't outlive its name
            os.unlink(self.path(shard))

    def fetch(self, shard: Shard, stop: Callable[[], bool] = lambda: False, wait: bool = False) -> bool:
        """Bring a shard in; False where another process is at it, there is no room now, or `stop()` became true.

        With `wait`, wait for another that is at it, while it gets on. Raises StorageError when the store fails for
        longer than the budget, UserError when its bytes are not those that were indexed.
        """
        path = self.path(shard)
        partial = path.with_suffix(".part")
        if path in self._refused:  # it is not read whole a second time to find the same
            raise UserError(self._refused[path])
        with _locked(path.with_suffix(".lock"), partial if wait else None) as mine:
            if not mine:
                return False
            if path.exists():
                return True
            try:
                with open(partial, "wb+") as file:
                    if not self._reserve(shard.num_bytes, file.fileno()):
                        return False
                    take = writer(file)
                    crc32 = read_file(shard.url, self._storage, shard.num_bytes, take, stop)
                    if crc32 is None:
                        return False
                    if (told := _difference(file, shard, crc32)) is not None:
                        self._refused[path] = f"{shard.url}: {told}; run `dist-ssl shards verify`"
                        raise UserError(self._refused[path])
                os.replace(partial, path)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(partial)
            return True

    def _reserve(self, num_bytes: int, descriptor: int) -> bool:
        """Make room for `num_bytes` and take it at once, by the partial file's blocks. False where all is in use."""
        room = self._directory / "room.lock"
        with _locked(room, room) as mine:  # which nobody writes to: it is held for moments only
            if not mine:
                return False
            files = []
            for path in self._directory.glob("*.idx"):
                with contextlib.suppress(FileNotFoundError):
                    files.append(((found := path.stat()).st_mtime, found.st_blocks * 512, path))
            for stem in {Path(name).stem for name in os.listdir(self._directory) if name.endswith((".tar", ".part"))}:
                # In this order: one that is completed in this moment is not missed.
                for path in (self._directory / f"{stem}.part", self._directory / f"{stem}.tar"):
                    with contextlib.suppress(FileNotFoundError):
                        found = path.stat()
                        files.append((found.st_mtime, max(found.st_size, found.st_blocks * 512), path))
                        break
            used, now = sum(size for _, size, _ in files), time.time()
            for touched, size, path in sorted(files):
                if used + num_bytes <= self._limit:
                    break
                if now - touched > IN_USE_SECONDS and _evict(path):
                    used -= size
            if used + num_bytes > self._limit:
                return False
            try:
                os.posix_fallocate(descriptor, 0, num_bytes)
            except OSError as error:
                self.warn(
                    f"{self._directory}: {error.strerror}, for a shard of {num_bytes / 1e6:.0f} MB, so images are read "
                    "by requests of their own, which is slow; free some, name another disk by data.cache_dir, or lower "
                    f"data.cache_gb = {self._limit / 1e9:g}"
                )
                return False
            return True

    def warn(self, message: str) -> None:
        """Once a message."""
        if message not in self._said:
            self._said.add(message)
            log.warning("%s", message)


def _difference(file: BinaryIO, shard: Shard, crc32: int) -> str | None:
    """How a shard that was fetched differs from what was indexed; None where it does not."""
    what = "bytes"
    if shard.headers_only:
        what = "headers"
        try:
            crc32 = index_tar(file, shard.url, shard.num_bytes, None)[0].shard_crc32
        except UserError as error:
            return f"its headers are not those that were indexed: {error}"
    if crc32 == shard.crc32:
        return None
    return f"its {what} are not those that were indexed (crc32 {crc32:08x}, expected {shard.crc32:08x})"


def _mapped(path: Path, shard: Shard) -> MemberIndex | None:
    """The member index in a file; None where it is not there, or damaged."""
    try:
        with open(path, "rb") as file:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        return member_index(shard, data)
    except (OSError, ValueError, UserError):
        return None


def _evict(path: Path) -> bool:
    """Remove a shard that nobody reads, or a partial one that nobody is fetching, or an index, which costs little to
    read again; whether that made room."""
    if path.suffix == ".idx":
        path.unlink(missing_ok=True)
        return True
    with _locked(path.with_suffix(".lock")) as mine, contextlib.suppress(FileNotFoundError):
        if mine:
            with open(path, "rb+") as file:
                if _try_lock(file.fileno()):
                    file.truncate()  # a reader may have opened it and not yet locked it
                    path.unlink()
                    return True
    return False


@contextlib.contextmanager
def _locked(path: Path, worked_on: Path | None = None) -> Iterator[bool]:
    """Whether the lock was to be had; it is freed at the end, or when the process dies.

    It is waited for while its holder writes to the file `worked_on`: a wait in the kernel would have no end where that
    process was stopped.
    """
    descriptor, started = os.open(path, os.O_RDWR | os.O_CREAT, 0o666), time.time()
    try:
        while not (mine := _try_lock(descriptor)) and worked_on is not None:
            if time.time() - max(_modified(worked_on), started) > STALLED_SECONDS:
                break
            time.sleep(POLL_SECONDS)
        yield mine
    finally:
        os.close(descriptor)


def _modified(path: Path) -> float:
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_mtime
    return 0.0


def _try_lock(descriptor: int, kind: int = fcntl.LOCK_EX) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _own_directory() -> Path:
    """A folder that is this user's alone: in a shared temporary directory another one could have made it first."""
    path = Path(tempfile.gettempdir()) / f"dist_ssl-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.stat(follow_symlinks=False)
    if path.is_symlink() or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise UserError(f"{path}: expected a directory that only this user may write; set data.cache_dir")
    return path


class FetchAhead:
    """Threads that bring shards into the cache, in the order last aimed at.

    From `not_before` on, by time.monotonic.

    Two: one shard's last ranges are on their way while the next one's first are asked for and another is summed.
    """

    def __init__(self, cache: ShardCache, not_before: float = 0.0):
        self._cache, self._closed, self._not_before = cache, False, not_before
        self._now: list[Shard] = []
        self._later: list[Shard] = []
        self._touched = 0.0
        self._changed = threading.Condition()
        self._threads = [threading.Thread(target=self._run, name="fetch ahead", daemon=True) for _ in range(2)]
        for thread in self._threads:
            thread.start()

    def aim(self, now: Sequence[Shard], later: Sequence[Shard]) -> None:
        """What to fetch from now on, the most urgent first; those of `now` are kept from eviction."""
        with self._changed:
            self._now, self._later = list(now), list(later)
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed, max(0.0, self._not_before - time.monotonic()))
        while not self._closed:
            with self._changed:
                now, later = self._now, self._later
            fetched = any(self._fetch(shard) for shard in (*now, *later))
            with self._changed:
                if not fetched and not self._over() and self._now is now:
                    self._changed.wait(WAIT_SECONDS)

    def _over(self) -> bool:
        """Whether this was closed; called often, so that what is read meanwhile is seen to be in use."""
        if (at := time.monotonic()) - self._touched > TOUCH_SECONDS:
            self._touched = at
            for shard in self._now:
                self._cache.touch(shard)
        return self._closed

    def _fetch(self, shard: Shard) -> bool:
        if self._closed or self._cache.path(shard).exists():
            return False
        try:
            return self._cache.fetch(shard, self._over)
        except UserError as error:
            # Samples of it are still read one by one, and those that are damaged are quarantined.
            self._cache.warn(str(error))
        except OSError as error:
            log.warning("fetching ahead: %s", error)  # a read that needs the shard raises it
        return False
