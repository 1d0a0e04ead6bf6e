"""The simulated store: its counts are those of a real run of the reader, and what it says of many ranks."""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import pytest

from dist_ssl.checkpoint.read import RunState
from dist_ssl.config import StorageConfig, UserError, dumps
from dist_ssl.data import cache
from dist_ssl.data.cache import ShardCache
from dist_ssl.data.indexing import index_shards
from dist_ssl.data.manifest import read_member_index
from dist_ssl.data.stream import training_batches
from dist_ssl.planning import simulation
from dist_ssl.planning.simulation import Counts, Simulation, Store, even_shards, recommended_streams
from dist_ssl.training.run_directory import _check_goes_on
from tests.proxy import faulty_proxy
from tests.s3 import s3_server
from tests.stream.consumed import config_of
from tests.test_index import make_tar

WORLD = 2


def even_tars(folder: Path) -> None:
    """Twelve shards of 40 images, as large in every shard, and no two alike."""
    from PIL import Image

    folder.mkdir(parents=True)
    for shard in range(12):
        members = []
        for i in range(40):
            noise = np.random.default_rng(40 * shard + i).integers(0, 256, (20 + i % 16, 32, 3), np.uint8)
            Image.fromarray(noise).save(folder / "x.bmp")
            members.append((f"{i:05d}.bmp", (folder / "x.bmp").read_bytes()))
        (folder / "x.bmp").unlink()
        make_tar(folder / f"{shard:04d}.tar", members)


@pytest.mark.parametrize(("batch_size", "steps", "room"), [(4, 5, 12), (40, 8, 4)])
def test_what_is_counted_is_what_the_reader_asks_of_a_real_store(
    batch_size: int, steps: int, room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two nodes of a rank each, with room for so many shards, none of which is evicted: requests to equality."""
    for module in (cache, simulation):
        monkeypatch.setattr(module, "IN_USE_SECONDS", 1e9)
    even_tars(tmp_path / "store" / "bucket")
    with s3_server(tmp_path / "store", listing_seconds=60.0) as server, faulty_proxy(server.port) as proxy:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        endpoint = {"endpoint_url": proxy.endpoint_url}
        found = index_shards("s3://bucket", StorageConfig(**endpoint), output=str(tmp_path / "index"), checksums=True)
        proxy.requests = proxy.body_bytes = 0
        cache_gb = (room + 0.5) * found.shards[0].num_bytes / 1e9
        for rank in range(WORLD):
            config = config_of(
                endpoint, cache_dir=str(tmp_path / f"node{rank}"), cache_gb=cache_gb, streams=WORLD, block_shards=3
            )
            train = config.train.model_copy(update={"global_batch_size": batch_size})
            config = config.model_copy(update={"train": train})
            with training_batches(
                config, found, cursor=0, first_step=0, num_steps=steps, rank=rank, world_size=WORLD
            ) as batches:
                for _ in batches:
                    settle(batches._dataset.reader, room)
        slow, sizes = Store(images_per_second=0.001), read_member_index(found.shards[0], StorageConfig()).sizes
        counted = Simulation(config, found, WORLD, 1, steps, slow, image_sizes=sizes).run()
    assert counted.gets - sum(counted.index_gets.values()) == proxy.requests, "indexes are on a local disk here"
    assert counted.refused == counted.given_up == 0
    cached = list(tmp_path.glob("node*/*.tar"))
    assert proxy.requests > len(cached) > WORLD, "both ranges and whole shards were read"
    assert sum(counted.fetches.values()) == len(cached)
    assert (counted.no_room > 0) == (room < 12)
    overhead = proxy.body_bytes - counted.shard_bytes
    assert abs(overhead) < 0.05 * proxy.body_bytes, "simulated images of 2 kB are read with their headers of 512 bytes"


def settle(reader: object, room: int) -> None:
    """Wait until what the reader aims at, or as much as there is room for, is on its node."""
    deadline = time.monotonic() + 60
    cached: ShardCache = reader._cache  # type: ignore[attr-defined]
    aimed = [cached.path(shard) for part in reader._targets for shard in part]  # type: ignore[attr-defined]
    while not all(path.exists() for path in aimed) and len(list(cached._directory.glob("*.tar"))) < room:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_rank_with_streams_of_its_own_shares_no_shard() -> None:
    """And the same seed gives the same counts; a store that gives little refuses, and nothing is lost by that."""
    manifest = even_shards(64 * 400, 64)

    def run(streams: int, requests: float) -> tuple[float, Simulation]:
        config = config_of(streams=streams, block_shards=1)
        config = config.model_copy(update={"train": config.train.model_copy(update={"global_batch_size": 1024})})
        simulation = Simulation(config, manifest, 8, 2, 12, Store(requests, images_per_second=50.0))
        counts = simulation.run()
        return sum(counts.fetches.values()) / len(counts.fetches), simulation

    shared, first = run(12, 5500.0)
    own, _ = run(16, 5500.0)
    assert shared > own
    assert recommended_streams(first._config, manifest, 16) == 16
    counts, again = first.counts, run(12, 5500.0)[1].counts
    assert counts == again
    _, refusing = run(12, 50.0)
    assert refusing.counts.refused > 0 == counts.refused
    assert refusing.counts.given_up == 0
    assert refusing.counts.samples == counts.samples == 12 * 1024
    assert refusing.counts.first_batch_seconds > counts.first_batch_seconds


def test_a_store_that_gives_up_is_no_fast_start() -> None:
    config = config_of({"retry_seconds": 1.0}, streams=2, block_shards=1)
    counts = Simulation(config, even_shards(400, 4), 1, 2, 3, Store(1.0)).run()
    assert counts.given_up > 0
    assert counts.first_batch_seconds == counts.seconds == math.inf


def test_a_small_cache_is_kept_to_and_fetches_a_shard_again() -> None:
    """Two epochs of a store that has room for a third of the shards."""
    manifest = even_shards(12 * 400, 12)

    def run(room: float) -> tuple[Simulation, Counts]:
        limit = room * int(manifest.columns.num_bytes.max()) / 1e9
        config = config_of(streams=2, block_shards=1, cache_gb=limit)
        config = config.model_copy(update={"train": config.train.model_copy(update={"global_batch_size": 400})})
        simulated = Simulation(config, manifest, 1, 2, 24, Store(images_per_second=5.0))
        return simulated, simulated.run()

    large, (small, counts) = run(12.0)[1], run(4.0)
    assert counts.samples == large.samples == 2 * 4800
    assert sum(large.fetches.values()) == 12
    assert large.evicted == 0
    assert sum(counts.fetches.values()) > 20
    assert counts.evicted == sum(counts.fetches.values()) - len(small._nodes[0].cached)
    assert small._nodes[0].used_bytes == sum(small._bytes[shard] for shard in small._nodes[0].cached) <= small._limit


def test_images_are_as_large_as_an_index_says() -> None:
    manifest = even_shards(10, 2)
    simulated = Simulation(config_of(), manifest, 1, 1, 1, Store(), image_sizes=np.array([1, 1, 2, 4, 2], np.uint64))
    total = manifest.shards[1].num_bytes
    assert simulated._place(1, 0) == (0, total // 10)
    assert simulated._place(1, 3) == (4 * total // 10, 8 * total // 10)
    assert simulated._place(1, 4)[1] == total


def test_a_start_step_by_step_waits_less_for_its_first_batch() -> None:
    manifest = even_shards(64 * 400, 64)

    def run(paced_by: float) -> Counts:
        config = config_of({"requests_per_second": paced_by}, streams=16, block_shards=1, num_workers=4)
        config = config.model_copy(update={"train": config.train.model_copy(update={"global_batch_size": 1024})})
        return Simulation(config, manifest, 8, 2, 12, Store(50.0, images_per_second=50.0)).run()

    at_once, paced = run(1e9), run(50.0)
    assert math.isfinite(at_once.seconds)
    assert paced.gets <= at_once.gets
    assert paced.first_batch_seconds < at_once.first_batch_seconds / 2
    assert max(paced.index_gets.values()) <= 8, "a node, not a worker"


def test_other_streams_on_resume_are_refused_with_the_remedy() -> None:
    """K orders the samples, so it stays what it was, on any number of ranks."""
    manifest, saved = even_shards(400, 4), config_of(streams=3)
    with pytest.raises(UserError, match=r"on any number of ranks: to go on, --set data.streams=3 --set data.block_sh"):
        _check_goes_on(config_of(streams=5), manifest, RunState(0, 0, dumps(saved), manifest.hash), extend=False)
