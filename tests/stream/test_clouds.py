"""Shards in Azure's and Google's stores give the samples and pixels that the files give, through faults too."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_ssl import storage
from dist_ssl.data.indexing import index_shards
from dist_ssl.data.manifest import Manifest
from tests.clouds import CLOUDS
from tests.proxy import faulty_proxy
from tests.stream.consumed import BATCH, Ledger, config_of, consume, part

pytestmark = pytest.mark.filterwarnings("ignore:Sending a large body directly:ResourceWarning")


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["az", "gs"])
def test_the_stream_is_that_of_the_files(
    scheme: str, manifest: Manifest, quiet: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of({"retry_seconds": 60}, cache_dir=str(tmp_path / "cache"))
    with CLOUDS[scheme]() as cloud, faulty_proxy(cloud.port, refused=0.15, cut=0.15) as proxy:
        for name, value in cloud.environment_at(proxy.port).items():
            monkeypatch.setenv(name, value)
        for shard in manifest.shards:
            storage.write_file(shard.url, f"{scheme}://bucket/shapes/{shard.url.split('/')[-1]}", config.storage)
        pattern = f"{scheme}://bucket/shapes/*.tar"
        there = index_shards(pattern, config.storage, output=str(tmp_path / "index"), num_workers=0, checksums=True)
        assert there.hash == manifest.hash
        assert consume(config, there, steps=4, world_size=2) == part(quiet, 0, 4 * BATCH)
        assert proxy.faults > 0
