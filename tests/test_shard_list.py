"""A manifest's shards in few bytes, one copy for a rank and its workers."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from dist_ssl.config import StorageConfig, UserError
from dist_ssl.data.manifest import Manifest, Shard, load_manifest
from dist_ssl.data.shard_list import Shards
from tests.benchmarks.index import even_manifest

SHARDS = [
    Shard("s3://bucket/a/ä b.tar", "/index/ä b.tar.idx", 2**40, 7, 2**32 - 1),
    Shard("/photos", "/photos/.dist_ssl/000000.idx", 5, 0, 0, "folder"),
    Shard("s3://bucket/x.tar", "x.idx", 1, 1, 1, headers_only=True),
]


def test_columns_are_the_shards() -> None:
    shards = Manifest("m", SHARDS).columns
    assert list(shards) == SHARDS == [shards[i] for i in range(3)]
    assert shards[-1] == SHARDS[-1]
    assert shards[1:] == tuple(SHARDS[1:])
    assert shards == Shards.of(SHARDS) != Shards.of(SHARDS[:2])
    assert list(shards.urls()) == [shard.url for shard in SHARDS]
    assert shards.remote.tolist() == [True, False, True]
    assert shards.num_bytes.tolist() == [2**40, 5, 1]
    assert pickle.loads(pickle.dumps(shards)) == shards
    assert list(Shards.of([])) == []
    with pytest.raises(IndexError):
        shards[3]


def test_a_long_manifest_takes_few_bytes(tmp_path: Path) -> None:
    count = 10_000
    manifest = even_manifest(tmp_path, count)
    assert load_manifest(str(tmp_path), StorageConfig()) == manifest  # what is imported is not counted
    tracemalloc.start()
    try:
        manifest = load_manifest(str(tmp_path), StorageConfig())
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(manifest.shards) == count
    assert held < 120 * count, "12 MB of 100,000 shards"
    assert peak < 1000 * count, "100 MB of 100,000 shards"


def test_a_worker_maps_the_shards_of_its_rank(tmp_path: Path) -> None:
    manifest = even_manifest(tmp_path, 1000)
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_tell, args=(manifest, sender))
    process.start()
    last, mapped = receiver.recv()
    process.join()
    assert last == manifest.shards[999]
    assert len(mapped) == 1
    assert mapped == _mapped(), "one memory, not a copy each"


@pytest.mark.parametrize("bad", [{"bytes": 2**70}, {"crc32": -1}, {"url": "pipe:id"}, {"url": "exec:x/a.tar"}])
def test_a_stranger_s_manifest(tmp_path: Path, bad: dict[str, Any]) -> None:
    even_manifest(tmp_path, 3)
    path = tmp_path / "manifest.json"
    values = json.loads(path.read_text())
    values["shards"][1] |= bad
    path.write_text(json.dumps(values))
    with pytest.raises(UserError):
        load_manifest(str(tmp_path), StorageConfig())


def _tell(manifest: Manifest, sender: Any) -> None:
    sender.send((manifest.shards[-1], _mapped()))


def _mapped() -> set[str]:
    """Devices and inodes of the memory that holds shards."""
    with open("/proc/self/maps") as file:
        return {" ".join(line.split()[3:5]) for line in file if "memfd:shards" in line}
