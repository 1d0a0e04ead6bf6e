"""A store of small shards of shapes, on disk and behind a real S3 server, and what a quiet run reads of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_ssl.config import StorageConfig
from dist_ssl.data.manifest import Manifest, load_manifest
from dist_ssl.data.shards import write_shards
from dist_ssl.data.sources import open_source
from tests.s3 import S3Server, s3_server
from tests.stream.consumed import BATCH, SAMPLES, Ledger, config_of, consume


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


@pytest.fixture(scope="module")
def quiet(manifest: Manifest) -> Ledger:
    """What a run of one rank, one process and local files consumes, over the epoch's edge."""
    ledger = consume(config_of(), manifest, steps=8)
    assert sorted(ledger) == list(range(8 * BATCH))
    first = [ledger[position][0] for position in range(SAMPLES)]
    assert len(set(first)) == SAMPLES
    return ledger
