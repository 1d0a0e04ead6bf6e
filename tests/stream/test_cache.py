"""The node's cache of shards: its bound, its locks, damage, and shards that changed in the store."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dist_ssl.config import StorageConfig, UserError
from dist_ssl.data.index import load_manifest
from dist_ssl.data.shards import write_shards
from dist_ssl.data.sources import open_source
from dist_ssl.data.stream import training_batches
from dist_ssl.storage import StorageError
from tests.s3 import S3Server
from tests.stream.consumed import BATCH, Ledger, cached, consume, part


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
    opened = cache.open(a)
    assert cache.fetch(c)
    assert not cache.path(a).exists()
    assert opened is not None
    assert len(os.pread(opened, 10**9, 0)) == a.num_bytes, "who reads an evicted shard reads on"
    os.close(opened)
    assert sum(path.stat().st_size for path in tmp_path.glob("*.tar")) <= 2.5 * shard_bytes


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
    path = shapes / "bucket" / "shapes" / "000001.tar"
    before = path.read_bytes()

    def first_batches() -> None:
        with training_batches(config, remote, cursor=0, first_step=0, num_steps=6, rank=0, world_size=1) as batches:
            list(batches)

    try:
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
    finally:
        path.write_bytes(before)
        server.forget()


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
