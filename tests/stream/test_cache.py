"""The node's cache of shards: its bound, its locks, damage, and shards that changed in the store."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest

from dist_ssl.config import StorageConfig, UserError
from dist_ssl.data import cache as cache_module
from dist_ssl.data.manifest import load_manifest, read_member_index
from dist_ssl.data.reader import Reader
from dist_ssl.data.requests import turn
from dist_ssl.data.shards import write_shards
from dist_ssl.data.sources import open_source
from dist_ssl.data.stream import training_batches
from dist_ssl.storage import StorageError
from tests.proxy import faulty_proxy
from tests.s3 import S3Server
from tests.stream.consumed import BATCH, Ledger, cached, consume, part


@pytest.mark.slow
def test_cache_keeps_to_its_bound_and_evicts_the_oldest(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, remote, _ = cached(server, tmp_path)
    shard_bytes = remote.shards[0].num_bytes
    _, _, cache = cached(server, tmp_path, cache_gb=2.5 * shard_bytes / 1e9)
    a, b, c = remote.shards[:3]
    assert cache.fetch(a)
    assert cache.fetch(b)
    assert not cache.fetch(c), "both others were just touched: somebody reads them"
    os.utime(cache.path(a), (1, 1))
    assert cache.fetch(c)
    assert not cache.path(a).exists()
    assert cache.path(b).exists()
    assert held(tmp_path).bytes <= 2.5 * shard_bytes


def test_a_node_asks_for_a_member_index_once(server: S3Server, tmp_path: Path) -> None:
    with faulty_proxy(server.port) as proxy:
        config, remote, cache = cached(server, tmp_path)
        through = config.storage.model_copy(update={"endpoint_url": proxy.endpoint_url})
        shard, expected = remote.shards[0], read_member_index(remote.shards[0], config.storage)
        read_member_index(shard, through)
        of_one, proxy.requests = proxy.requests, 0  # a new client may ask for more than the object
        read_member_index(shard, through)
        of_one = min(of_one, proxy.requests)
        proxy.requests = 0
        caches = [cache_module.ShardCache(config.data, through) for _ in range(3)]
        found = [each.index(shard) for each in caches]
        assert proxy.requests == of_one
        assert all(each.to_bytes() == expected.to_bytes() for each in found)
        path = cache.path(shard).with_suffix(".idx")
        path.write_bytes(path.read_bytes()[:-9])
        assert caches[0].index(shard).to_bytes() == expected.to_bytes(), "a damaged one is read again"
        assert caches[1].index(shard).to_bytes() == expected.to_bytes()
        assert proxy.requests == 2 * of_one


def test_a_start_asks_a_store_step_by_step(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, remote, cache = cached(server, tmp_path)
    slept: list[float] = []
    monkeypatch.setattr("dist_ssl.data.reader.time.sleep", slept.append)
    reader = Reader(remote, config.storage, config.data, pace=100.0)
    one = np.array([0]), np.array([0])
    two_by_two = config.data.model_copy(update={"num_workers": 2, "prefetch_batches": 2})
    assert [turn(step, two_by_two, 100.0) for step in range(6)] == [0, 100, 200, 300, 0, 0], "later ones: when due"
    reader.images(*one, 0.0)
    assert slept == []
    reader.images(*one, 200.0)
    assert 190 < slept.pop() <= 200
    assert cache.fetch(remote.shards[0])
    reader.images(*one, 300.0)
    assert slept == [], "no store is asked"
    reader.close()


def test_what_another_process_reads_is_not_evicted(server: S3Server, tmp_path: Path) -> None:
    _, remote, _ = cached(server, tmp_path)
    a, b = remote.shards[:2]
    config, _, cache = cached(server, tmp_path, cache_gb=1.5 * a.num_bytes / 1e9)
    assert cache.fetch(a)
    code = (
        "import pickle, sys, time; reader, at = pickle.load(sys.stdin.buffer); reader.images(*at); "
        "print(1, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdin
        assert other.stdout
        pickle.dump((Reader(remote, config.storage, config.data), (np.array([0]), np.array([0]))), other.stdin)
        other.stdin.close()
        other.stdout.readline()
        os.utime(cache.path(a), (1, 1))
        fetched = cache.fetch(b)
        other.kill()
    assert not fetched
    assert cache.path(a).exists()
    assert cache.fetch(b)
    assert not cache.path(a).exists()


@dataclass
class Held:
    bytes: int  # on the disk, by files that have a name and by those that only a descriptor keeps
    most_descriptors: int  # of a process


def held(folder: Path) -> Held:
    """What this process and those under it have of a folder's shards."""
    files: dict[int, int] = {}
    descriptors: dict[int, int] = {}
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        for link in Path(f"/proc/{process.pid}/fd").glob("*"):
            with contextlib.suppress(OSError):
                if os.readlink(link).startswith(str(folder)) and ".tar" in os.readlink(link):
                    files[link.stat().st_ino] = link.stat().st_blocks * 512
                    descriptors[process.pid] = descriptors.get(process.pid, 0) + 1
    for path in (*folder.glob("*.tar"), *folder.glob("*.part")):
        with contextlib.suppress(FileNotFoundError):
            files[path.stat().st_ino] = path.stat().st_blocks * 512
    return Held(sum(files.values()), max(descriptors.values(), default=0))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.slow
def test_the_disk_never_holds_more_than_the_bound(
    server: S3Server, shapes: Path, tmp_path: Path, num_workers: int
) -> None:
    """While files are made old all the time, so that each that nobody has open may be evicted at any moment."""
    local = shapes / "bucket" / "many"
    write_shards(open_source("shapes:300:32"), str(local), StorageConfig(), shard_mb=0.02, num_workers=0)
    server.forget()
    config, _, _ = cached(server, tmp_path)
    remote = load_manifest("s3://bucket/many", config.storage)
    limit = 12 * max(shard.num_bytes for shard in remote.shards)
    config, _, _ = cached(server, tmp_path, cache_gb=limit / 1e9, num_workers=num_workers)
    assert len(remote.shards) > 4 * 8, "4 streams' blocks of 2 shards are a small part"
    ended, seen, cached_once = threading.Event(), [Held(0, 0)], set()

    def watch() -> None:
        while not ended.is_set():
            for path in tmp_path.glob("*.tar"):
                cached_once.add(path)
                with contextlib.suppress(FileNotFoundError):
                    os.utime(path, (1, 1))
            with open(tmp_path / "room.lock", "a") as room:  # room is made, and taken, while this is held
                fcntl.flock(room, fcntl.LOCK_EX)
                seen.append(held(tmp_path))
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        found = consume(config, remote, steps=8)
    finally:
        ended.set()
        watcher.join()
    assert found == consume(config, load_manifest(str(local), StorageConfig()), steps=8)
    assert len(cached_once) > 15, "nothing was evicted"
    assert limit / 2 < max(one.bytes for one in seen) <= limit
    # A stream that begins in the middle of a shard reads 3 for a block of 2; this block and the next are kept open.
    assert max(one.most_descriptors for one in seen) <= 4 * 3 * 2


def test_a_lock_that_another_process_holds_is_respected_and_a_dead_ones_is_not(
    server: S3Server, tmp_path: Path
) -> None:
    _, remote, cache = cached(server, tmp_path)
    lock, partial = cache.path(remote.shards[0]).with_suffix(".lock"), cache.path(remote.shards[0]).with_suffix(".part")
    code = f"import fcntl, time; f = open({str(lock)!r}, 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); "
    code += f"open({str(partial)!r}, 'w').write('x' * 1000); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as holder:
        assert holder.stdout
        holder.stdout.readline()
        assert not cache.fetch(remote.shards[0])
        holder.kill()
    assert cache.fetch(remote.shards[0])
    assert not partial.exists()
    descriptor = cache.open(remote.shards[0])
    assert descriptor is not None
    os.close(descriptor)


def test_a_lock_whose_holder_does_nothing_is_not_waited_for(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run that shares the cache and is suspended: this one reads without it."""
    _, remote, cache = cached(server, tmp_path)
    monkeypatch.setattr(cache_module, "STALLED_SECONDS", 1.0)
    lock = cache.path(remote.shards[0]).with_suffix(".lock")
    code = f"import fcntl, time; f = open({str(lock)!r}, 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); "
    with subprocess.Popen([sys.executable, "-c", code + "time.sleep(600)"], stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout
            holder.stdout.readline()
            holder.send_signal(signal.SIGSTOP)
            started = time.monotonic()
            assert not cache.fetch(remote.shards[0], wait=True)
            assert 0.9 < time.monotonic() - started < 10
            (tmp_path / "touching").write_text("")
            partial = cache.path(remote.shards[0]).with_suffix(".part")
            toucher = threading.Timer(1.5, holder.kill)
            toucher.start()
            partial.write_bytes(b"")
            os.utime(partial, (time.time() + 3, time.time() + 3))
            assert cache.fetch(remote.shards[0], wait=True), "one that gets on is waited for"
            toucher.join()
        finally:
            holder.kill()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small tmpfs")
def test_a_disk_that_is_full_is_a_warning_and_the_run_goes_on(
    server: S3Server, quiet: Ledger, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small], check=True)
    try:
        config, remote, cache = cached(server, small)
        assert consume(config, remote, steps=2) == part(quiet, 0, 2 * BATCH)
        assert not list(small.glob("*.part"))
        assert not cache.fetch(remote.shards[0])
        said = {record.getMessage() for record in caplog.records if "No space left on device" in record.getMessage()}
        assert said
        assert all(re.search(r"small: No space.*, for a shard of .* data.cache_dir", line) for line in said)
    finally:
        subprocess.run(["umount", small], check=True)


def test_at_the_start_a_sample_is_read_by_a_range_and_later_its_shard_is_waited_for(
    server: S3Server, tmp_path: Path
) -> None:
    config, remote, cache = cached(server, tmp_path)
    many, last = range(len(remote.shards)), len(remote.shards) - 1
    with faulty_proxy(server.port, latency_seconds=0.3) as proxy:
        slow = config.storage.model_copy(update={"endpoint_url": proxy.endpoint_url})
        for now, later, waits in ((many, (), False), ((0,), (), True)):
            reader = Reader(remote, slow, config.data)
            reader.aim(now, later)
            (image,) = reader.images(np.array([last]), np.array([0]))
            assert isinstance(image, bytes)
            assert cache.path(remote.shards[last]).exists() is waits
            reader.close()


@contextlib.contextmanager
def second_shard(server: S3Server, shapes: Path) -> Iterator[tuple[Path, bytes]]:
    """(file, bytes) of a shard in the store, which gets its bytes back at the end."""
    path = shapes / "bucket" / "shapes" / "000001.tar"
    before = path.read_bytes()
    try:
        yield path, before
    finally:
        path.write_bytes(before)
        server.forget()


def test_a_shard_that_changed_is_fetched_once_and_not_for_each_sample(
    server: S3Server, shapes: Path, tmp_path: Path
) -> None:
    config, remote, _ = cached(server, tmp_path)
    with second_shard(server, shapes) as (path, before), faulty_proxy(server.port) as proxy:
        path.write_bytes(before[:2000] + b"?" + before[2001:])
        server.forget()
        reader = Reader(remote, config.storage.model_copy(update={"endpoint_url": proxy.endpoint_url}), config.data)
        reader.aim((), ())
        for member in range(8):
            reader.images(np.array([1]), np.array([member]))
        reader.close()
        assert proxy.body_bytes < 2 * len(before)


def test_what_rots_in_the_cache_is_read_again(server: S3Server, quiet: Ledger, tmp_path: Path) -> None:
    config, remote, cache = cached(server, tmp_path)
    for shard in remote.shards:
        assert cache.fetch(shard)
        data = bytearray(cache.path(shard).read_bytes())
        for at in range(700, len(data), 900):
            data[at] ^= 1
        cache.path(shard).write_bytes(data)
    short = cache.path(remote.shards[0])
    short.write_bytes(short.read_bytes()[:-600])
    assert consume(config, remote, steps=2) == part(quiet, 0, 2 * BATCH)


def test_a_shard_that_changed_since_it_was_indexed_never_gets_in(
    server: S3Server, shapes: Path, tmp_path: Path
) -> None:
    config, remote, cache = cached(server, tmp_path)

    def first_batches() -> None:
        with training_batches(config, remote, cursor=0, first_step=0, num_steps=6, rank=0, world_size=1) as batches:
            list(batches)

    with second_shard(server, shapes) as (path, before):
        path.write_bytes(before[:2000] + b"?" + before[2001:])
        server.forget()
        with pytest.raises(UserError, match="not those that were indexed"):
            cache.fetch(remote.shards[1])
        assert not cache.path(remote.shards[1]).exists()
        path.write_bytes(os.urandom(len(before)))
        server.forget()
        with pytest.raises(UserError, match=r"000001.tar: none of its .* samples .*not those that were indexed"):
            first_batches()
        path.write_bytes(before[:5000])
        server.forget()
        started = time.monotonic()
        with pytest.raises(StorageError, match=r"expected at least \d+ bytes, the file holds 5000: it is not the one"):
            first_batches()
        assert time.monotonic() - started < 3, "a retry would not mend it"


def test_two_buckets_with_the_same_names_do_not_collide(server: S3Server, shapes: Path, tmp_path: Path) -> None:
    write_shards(
        open_source("shapes:60:32", 9), str(shapes / "second" / "shapes"), StorageConfig(), shard_mb=0.1, num_workers=0
    )
    server.forget()
    _, one, cache = cached(server, tmp_path)
    other = load_manifest("s3://second/shapes", StorageConfig(endpoint_url=server.endpoint_url))
    assert cache.path(one.shards[0]) != cache.path(other.shards[0])


def test_a_cache_that_cannot_hold_the_working_set_is_refused(server: S3Server, tmp_path: Path) -> None:
    config, remote, _ = cached(server, tmp_path, cache_gb=0.0002)
    with pytest.raises(UserError, match=r"more than data.cache_gb = 0.0002; set data.cache_gb to .*data.streams"):
        training_batches(config, remote, cursor=0, first_step=0, num_steps=1, rank=0, world_size=1)
