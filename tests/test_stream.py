"""The stream on real worker processes and a real S3 server: the same samples and pixels whatever happens."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as F

from dist_ssl import config as configuration
from dist_ssl.config import Config, StorageConfig, UserError
from dist_ssl.data import stream
from dist_ssl.data.augment import augment
from dist_ssl.data.cache import ShardCache
from dist_ssl.data.index import Manifest, load_manifest, read_member_index
from dist_ssl.data.indexing import index_shards
from dist_ssl.data.quarantine import Quarantine
from dist_ssl.data.reader import Reader
from dist_ssl.data.shards import write_shards
from dist_ssl.data.sources import open_source
from dist_ssl.data.stream import evaluation_batches, training_batches
from dist_ssl.storage import StorageError
from tests.faults.harness import Launch
from tests.proxy import faulty_proxy
from tests.s3 import S3Server, s3_server
from tests.trajectory import small_config

SAMPLES, BATCH = 300, 47


def config_of(storage: dict[str, Any] | None = None, **data: Any) -> Config:
    values: dict[str, Any] = {
        "run": {"seed": 3},
        "storage": storage or {},
        "data": {"streams": 4, "block_shards": 2, "num_workers": 0} | data,
        "augment": {"crop_size": 24},
        "train": {"global_batch_size": BATCH, "epochs": 2},
    }
    return configuration.validate(values, "test")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store's directory whose bucket holds `shapes`, small shards of them."""
    store = tmp_path_factory.mktemp("store")
    source = open_source(f"shapes:{SAMPLES}:32")
    write_shards(source, str(store / "bucket" / "shapes"), StorageConfig(), shard_mb=0.1, num_workers=0)
    return store


@pytest.fixture(scope="module")
def server(shapes: Path) -> Iterator[S3Server]:
    with s3_server(shapes) as started, pytest.MonkeyPatch.context() as patch:
        for name, value in started.environment.items():
            patch.setenv(name, value)
        yield started


@pytest.fixture(scope="module")
def manifest(shapes: Path) -> Manifest:
    return load_manifest(str(shapes / "bucket" / "shapes"), StorageConfig())


Ledger = dict[int, tuple[str, str, str]]  # position -> key, digest of the uint8 views, digest of the pixels


def consume(
    config: Config, manifest: Manifest, cursor: int = 0, steps: int = 6, world_size: int = 1, pixels: bool = True
) -> Ledger:
    """Run the ranks one after another, and write down what they got."""
    ledger: Ledger = {}
    for rank in range(world_size):
        with training_batches(
            config, manifest, cursor=cursor, first_step=0, num_steps=steps, rank=rank, world_size=world_size
        ) as batches:
            for batch in batches:
                views = augment(batch.crops, batch.parameters, config.augment) if pixels else batch.crops
                for row, position in enumerate(batch.positions.tolist()):
                    assert position not in ledger
                    digests = [hashlib.sha256(one[row].numpy().tobytes()).hexdigest() for one in (batch.crops, views)]
                    ledger[position] = (batch.keys[row], digests[0], digests[1])
    return ledger


@pytest.fixture(scope="module")
def quiet(manifest: Manifest) -> Ledger:
    """What a run of one rank, one process and local files consumes, over the epoch's edge."""
    ledger = consume(config_of(), manifest, steps=8)
    assert sorted(ledger) == list(range(8 * BATCH))
    first = [ledger[position][0] for position in range(SAMPLES)]
    assert len(set(first)) == SAMPLES
    return ledger


def part(ledger: Ledger, start: int, stop: int) -> Ledger:
    return {position: line for position, line in ledger.items() if start <= position < stop}


@pytest.mark.slow
def test_ranks_workers_caches_and_resumes_change_nothing(
    manifest: Manifest, server: S3Server, quiet: Ledger, tmp_path: Path
) -> None:
    """A run that goes on at other world sizes, with other workers and caches: the same ledger, the same pixels."""
    store = {"endpoint_url": server.endpoint_url}
    remote = load_manifest("s3://bucket/shapes", StorageConfig(**store))
    small = 4.5 * remote.shards[0].num_bytes / 1e9  # holds half of them
    roomy = config_of(store, cache_dir=str(tmp_path / "a"), num_workers=2)
    tight = config_of(store, cache_dir=str(tmp_path / "b"), cache_gb=small, streams=4, block_shards=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "check_working_set", lambda *_: None)
        assert consume(roomy, remote, steps=3, world_size=2) == part(quiet, 0, 3 * BATCH)
        assert consume(tight, remote, 3 * BATCH, 4, world_size=5) == part(quiet, 3 * BATCH, 7 * BATCH)
    assert consume(config_of(num_workers=3), manifest, 7 * BATCH, 1) == part(quiet, 7 * BATCH, 8 * BATCH)


def test_what_a_batch_says_is_true(manifest: Manifest, shapes: Path) -> None:
    """Labels, ids, keys and crops against the shards as webdataset's layout has them."""
    config = config_of()
    with training_batches(config, manifest, cursor=0, first_step=0, num_steps=1, rank=1, world_size=2) as batches:
        batch = next(batches)
    starts = np.concatenate([[0], np.cumsum(manifest.counts)])
    assert batch.crops.shape == (len(batch.keys), 2, 3, 24, 24)
    assert batch.crops.dtype == torch.uint8
    for row, key in enumerate(batch.keys):
        shard, name = key.split("/")
        with tarfile.open(shapes / "bucket" / "shapes" / f"{shard}.tar") as tar:
            label = tar.extractfile(f"{name}.cls")
            assert label
            assert int(label.read()) == batch.labels[row]
        number = [one.name for one in manifest.shards].index(shard)
        member = int(batch.sample_ids[row]) - starts[number]
        assert read_member_index(manifest.shards[number], config.storage).keys[member] == name
    assert batch.replaced_by == {}


def test_through_s3(server: S3Server, quiet: Ledger, tmp_path: Path) -> None:
    config = config_of({"endpoint_url": server.endpoint_url}, cache_dir=str(tmp_path), num_workers=1)
    remote = load_manifest("s3://bucket/shapes", config.storage)
    assert consume(config, remote, steps=4) == part(quiet, 0, 4 * BATCH)
    assert list(tmp_path.glob("*.tar"))
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.slow
def test_faults_change_nothing(server: S3Server, quiet: Ledger, tmp_path: Path) -> None:
    """20% of requests 503 or reset, 10% of bodies cut short, 50 ms latency."""
    with faulty_proxy(server.port, refused=0.2, cut=0.1, latency_seconds=0.05) as proxy:
        config = config_of({"endpoint_url": proxy.endpoint_url}, cache_dir=str(tmp_path), num_workers=2)
        remote = load_manifest("s3://bucket/shapes", config.storage)
        assert consume(config, remote, steps=6, world_size=2) == part(quiet, 0, 6 * BATCH)
        assert proxy.faults >= 5
    local = config_of({"endpoint_url": server.endpoint_url}, cache_dir=str(tmp_path / "other"))
    assert consume(local, remote, 6 * BATCH, 2, world_size=3) == part(quiet, 6 * BATCH, 8 * BATCH)


@pytest.mark.slow
def test_a_server_that_is_away_for_some_seconds(server: S3Server, quiet: Ledger, tmp_path: Path) -> None:
    """OUTAGE_SECONDS=20 python -m pytest tests/test_stream.py -k away_for_some"""
    away = float(os.environ.get("OUTAGE_SECONDS", "3"))
    config = config_of({"endpoint_url": server.endpoint_url, "retry_seconds": 60}, cache_dir=str(tmp_path))
    remote = load_manifest("s3://bucket/shapes", config.storage)
    server.stop()
    timer = threading.Timer(away, server.start)
    timer.start()
    try:
        started = time.monotonic()
        assert consume(config, remote, steps=2) == part(quiet, 0, 2 * BATCH)
        assert time.monotonic() - started > away - 1
    finally:
        timer.join()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_server_that_is_away_for_good_is_an_error_within_the_budget(
    server: S3Server, tmp_path: Path, workers: int
) -> None:
    config = config_of(
        {"endpoint_url": server.endpoint_url, "retry_seconds": 3}, cache_dir=str(tmp_path), num_workers=workers
    )
    remote = load_manifest("s3://bucket/shapes", config.storage)
    server.stop()
    try:
        started = time.monotonic()
        with (
            pytest.raises(StorageError, match=r"s3://bucket/shapes/.*: gave up after \d+ attempts in .*last cause"),
            training_batches(config, remote, cursor=0, first_step=0, num_steps=2, rank=0, world_size=1) as batches,
        ):
            next(batches)
        assert time.monotonic() - started < 20
    finally:
        server.start()


@pytest.mark.slow
def test_a_store_that_is_gone_ends_every_rank(server: S3Server, tmp_path: Path) -> None:
    """A real run of two ranks whose manifest is here and whose shards are in a store that has gone."""
    index_shards("s3://bucket/shapes", StorageConfig(endpoint_url=server.endpoint_url), output=str(tmp_path / "index"))
    config = small_config(
        tmp_path / "run", tmp_path / "index", f"storage.endpoint_url={server.endpoint_url}", "storage.retry_seconds=3",
        f"data.cache_dir={tmp_path}",
    )  # fmt: skip
    server.stop()
    try:
        launch = Launch(config, 2)
        assert launch.wait(120) not in (0, 75)
    finally:
        server.start()
    said = launch.said()
    assert re.search(
        r"error: (rank 1: )?s3://bucket/shapes/\d+.tar: gave up after \d+ attempts in .*last cause: ", said
    )
    assert "Traceback" not in said, "an error that is told, on both ranks"
    assert not launch.ranks()


# --- the cache ----------------------------------------------------------------------------------------------------


def cached(server: S3Server, folder: Path, **data: Any) -> tuple[Config, Manifest, ShardCache]:
    config = config_of({"endpoint_url": server.endpoint_url, "retry_seconds": 5}, cache_dir=str(folder), **data)
    return config, load_manifest("s3://bucket/shapes", config.storage), ShardCache(config.data, config.storage)


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


# --- bad samples --------------------------------------------------------------------------------------------------


def hostile_png() -> bytes:
    from tests.test_decode import png_header

    return png_header(50_000, 50_000)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards, some of whose members are hostile; their good images are all of one colour a key."""
    folder = tmp_path_factory.mktemp("hostile")
    bad = {
        5: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", 6: b"", 12: hostile_png(),
        13: b"cos\nsystem\n(S'touch /tmp/owned'\ntR.", 16: gzip.compress(bytes(10**8), 1),
    }  # fmt: skip
    for shard in range(2):
        with tarfile.open(folder / f"{shard:06d}.tar", "w") as tar:
            for i in range(20):
                buffer = io.BytesIO()
                Image.new("RGB", (40, 40), (10 * i, shard * 200, 0)).save(buffer, "PNG")
                data = bad.get(i, buffer.getvalue()) if shard == 0 else buffer.getvalue()
                for name, content in ((f"{i:03d}.jpg", data), (f"{i:03d}.cls", str(i).encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    index_shards(str(folder), StorageConfig(), num_workers=0)
    return folder


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_samples_are_replaced_by_rule(hostile: Path, workers: int) -> None:
    config, listed = config_of(num_workers=workers), load_manifest(str(hostile), StorageConfig())
    bad = {
        "000000/005": "000000/007",
        "000000/006": "000000/007",
        "000000/012": "000000/014",
        "000000/013": "000000/014",
        "000000/016": "000000/017",
    }
    seen: dict[str, str] = {}
    with training_batches(config, listed, cursor=0, first_step=0, num_steps=1, rank=0, world_size=1) as batches:
        batch = next(batches)
    for row, key in enumerate(batch.keys):
        shard, name = (batch.replaced_by.get(row) or key).split("/")
        assert (key in bad) == (row in batch.replaced_by)
        if row in batch.replaced_by:
            seen[key] = batch.replaced_by[row]
        assert batch.crops[row, :, 0].unique().tolist() == [10 * int(name)]
        assert batch.crops[row, :, 1].unique().tolist() == [200 * int(shard)]
        assert batch.labels[row] == int(name)
        assert listed.num_samples > batch.sample_ids[row] == int(key.split("/")[1]) + 20 * int(shard)
    assert {key: by for key, by in seen.items() if key in bad} == {key: bad[key] for key in seen}
    assert set(seen) == set(bad)
    reasons = {entry["key"]: entry["reason"] for entry in batch.quarantined}
    assert set(reasons) == set(bad)
    assert reasons["000000/006"] == "empty"
    assert reasons["000000/005"].startswith("not a JPEG, PNG, WEBP")
    assert batch.quarantined[0]["shard"].endswith("000000.tar")
    assert not Path("/tmp/owned").exists()


def test_quarantine_writes_each_once_and_stops_above_the_limit(tmp_path: Path) -> None:
    entries = [{"shard": "s", "key": f"s/{i}", "reason": "empty"} for i in range(12)]
    data = config_of(max_bad_fraction=0.01).data
    quarantine = Quarantine(tmp_path, data, 10_000)
    quarantine.record(500, entries[:4])
    quarantine.record(500, entries[:4])
    again = Quarantine(tmp_path, data, 10_000)  # a resumed run
    again.record(100, entries[2:6])
    lines = [json.loads(line)["key"] for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert lines == [f"s/{i}" for i in range(6)]
    with pytest.raises(UserError, match=r"11 of 200 samples were bad.*max_bad_fraction = 0.01: .*s/6 \(empty\)"):
        again.record(100, entries[5:12])


def test_a_shard_of_nothing_but_bad_samples_is_an_error(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in range(3):
            info = tarfile.TarInfo(f"{i}.jpg")
            info.size = 3
            tar.addfile(info, io.BytesIO(b"bad"))
    index_shards(str(tmp_path), StorageConfig(), num_workers=0)
    listed = load_manifest(str(tmp_path), StorageConfig())
    with (
        pytest.raises(UserError, match=r"a.tar: none of its 3 samples can be decoded"),
        training_batches(config_of(), listed, cursor=0, first_step=0, num_steps=1, rank=0, world_size=1) as batches,
    ):
        next(batches)


# --- worker processes ---------------------------------------------------------------------------------------------

HOLDS_WORKERS = """
import sys, time
from dist_ssl import config
from dist_ssl.data.index import load_manifest
from dist_ssl.data.stream import training_batches
if __name__ == "__main__":
    import signal
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGUSR1, lambda *_: None)
    values = {"data": {"num_workers": 2}, "augment": {"crop_size": 24}, "train": {"global_batch_size": 32, "steps": 9}}
    settings = config.validate(values, "test")
    manifest = load_manifest(sys.argv[1], settings.storage)
    batches = training_batches(settings, manifest, cursor=0, first_step=0, num_steps=999, rank=0, world_size=1)
    for number, batch in enumerate(batches):
        print(number, flush=True)
        time.sleep(0.02)
"""


def children(process: psutil.Process) -> list[psutil.Process]:
    return [child for child in process.children(recursive=True) if "resource_tracker" not in " ".join(child.cmdline())]


@pytest.mark.slow
def test_signals_to_the_job_leave_workers_working_and_a_kill_ends_them(shapes: Path, tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(HOLDS_WORKERS)
    command = [sys.executable, str(script), str(shapes / "bucket" / "shapes")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout
        process.stdout.readline()
        workers = children(psutil.Process(process.pid))
        assert len(workers) == 3  # two and the server that they are forked from
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR1):
            os.killpg(process.pid, number)
        numbers = [int(process.stdout.readline()) for _ in range(12)]
        assert numbers == list(range(1, 13))
        process.kill()
    _, alive = psutil.wait_procs(workers, timeout=15)
    for one in alive:
        one.kill()
    assert not alive


@pytest.mark.slow
def test_closing_does_not_wait_for_a_worker_in_the_middle_of_a_retry(server: S3Server, tmp_path: Path) -> None:
    config = config_of(
        {"endpoint_url": server.endpoint_url, "retry_seconds": 300}, cache_dir=str(tmp_path), num_workers=2
    )
    remote = load_manifest("s3://bucket/shapes", config.storage)
    server.stop()
    try:
        batches = training_batches(config, remote, cursor=0, first_step=0, num_steps=9, rank=0, world_size=1)
        time.sleep(3)
        started = time.monotonic()
        batches.close()
        assert time.monotonic() - started < 8
    finally:
        server.start()


# --- evaluation ---------------------------------------------------------------------------------------------------


def test_evaluation_reads_the_manifests_order(manifest: Manifest) -> None:
    seen: list[int] = []
    for start, stop in ((0, 100), (100, 101), (101, SAMPLES)):
        with evaluation_batches(
            manifest,
            StorageConfig(),
            image_size=24,
            resize_ratio=1.1,
            start=start,
            stop=stop,
            batch_size=32,
            num_workers=0,
        ) as batches:
            for batch in batches:
                assert batch.factors is not None
                assert [one["class"] for one in batch.factors] == batch.labels.tolist()
                assert batch.images.shape == (len(batch.labels), 3, 24, 24)
                seen += batch.sample_ids.tolist()
    assert seen == list(range(SAMPLES))
    with evaluation_batches(
        manifest, StorageConfig(), image_size=24, resize_ratio=1.1, start=5, stop=5, batch_size=32, num_workers=0
    ) as batches:
        assert list(batches) == []


@pytest.mark.parametrize(("height", "width"), [(50, 80), (80, 50), (40, 40), (7, 90)])
def test_evaluations_crop_is_torchvisions(tmp_path: Path, height: int, width: int) -> None:
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    (tmp_path / "in").mkdir()
    picture.save(tmp_path / "in" / "a.png")
    (listed,) = write_shards(open_source(f"folder:{tmp_path / 'in'}"), str(tmp_path / "out"), StorageConfig())
    with evaluation_batches(
        listed, StorageConfig(), image_size=28, resize_ratio=8 / 7, start=0, stop=1, batch_size=4, num_workers=0
    ) as batches:
        batch = next(batches)
    expected = F.pil_to_tensor(F.center_crop(F.resize(picture, [32]), [28, 28]))
    assert (batch.images[0].int() - expected.int()).abs().max() <= 1
    assert batch.labels.tolist() == [-1]
    assert batch.factors is None


def test_evaluation_through_s3(server: S3Server, manifest: Manifest, tmp_path: Path) -> None:
    config, remote, _ = cached(server, tmp_path)

    def images(one: Manifest, storage: StorageConfig) -> list[bytes]:
        with evaluation_batches(
            one, storage, image_size=16, resize_ratio=1.0, start=10, stop=200, batch_size=64, num_workers=0,
            data=config.data,
        ) as batches:  # fmt: skip
            return [batch.images.numpy().tobytes() for batch in batches]

    assert images(remote, config.storage) == images(manifest, StorageConfig())


def test_a_reader_is_sent_to_workers_unopened(manifest: Manifest) -> None:
    import pickle

    config = config_of()
    reader = Reader(manifest, config.storage, config.data)
    before = len(pickle.dumps(reader))
    reader.images(np.arange(len(manifest.shards)), np.zeros(len(manifest.shards), np.int64))
    assert len(pickle.dumps(reader)) == before
    reader.close()
