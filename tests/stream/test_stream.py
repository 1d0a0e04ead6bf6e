"""The stream on real worker processes and a real S3 server: the same samples and pixels whatever happens."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as F

from dist_ssl.config import StorageConfig
from dist_ssl.data.indexing import index_shards
from dist_ssl.data.manifest import Manifest, load_manifest, read_member_index
from dist_ssl.data.reader import Reader
from dist_ssl.data.shards import write_shards
from dist_ssl.data.sources import open_source
from dist_ssl.data.stream import evaluation_batches, training_batches
from dist_ssl.storage import StorageError
from tests.faults.forked import ForkedLaunch
from tests.proxy import faulty_proxy
from tests.s3 import S3Server
from tests.stream.consumed import BATCH, SAMPLES, Ledger, cached, config_of, consume, part
from tests.trajectory import small_config


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
    assert consume(roomy, remote, steps=3, world_size=2) == part(quiet, 0, 3 * BATCH)
    assert consume(tight, remote, 3 * BATCH, 4, world_size=5) == part(quiet, 3 * BATCH, 7 * BATCH)
    assert consume(config_of(num_workers=3), manifest, 7 * BATCH, 1) == part(quiet, 7 * BATCH, 8 * BATCH)


def test_what_a_batch_says_is_true(manifest: Manifest, shapes: Path) -> None:
    """Labels, ids, keys and crops against the shards as webdataset's layout has them."""
    config = config_of()
    with training_batches(config, manifest, cursor=0, first_step=0, num_steps=1, rank=1, world_size=2) as batches:
        batch = next(batches)
    starts = np.concatenate([[0], np.cumsum(manifest.counts)])
    assert batch.crops[0].shape == (len(batch.keys), 2, 3, 24, 24)
    assert batch.crops[0].dtype == torch.uint8
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


@pytest.mark.slow
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
    """OUTAGE_SECONDS=20 python -m pytest tests/stream -k away_for_some"""
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
        launch = ForkedLaunch(config, 2, **server.environment)
        assert launch.wait(120) not in (0, 75)
    finally:
        server.start()
    said = launch.said()
    assert re.search(
        r"error: (rank \d: )?s3://bucket/shapes/\d+.tar: gave up after \d+ attempts in .*last cause: ", said
    )
    assert "Traceback" not in said, "an error that is told, on both ranks"
    assert not launch.ranks()


# --- worker processes ---------------------------------------------------------------------------------------------

HOLDS_WORKERS = """
import sys, time
from dist_ssl import config
from dist_ssl.data.manifest import load_manifest
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
