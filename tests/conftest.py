"""Fixtures that several test files share."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def small_shards(tmp_path_factory):
    """90 rendered shapes in a few small shards: the directory `shards write` filled."""
    from dist_ssl.config import StorageConfig
    from dist_ssl.data.shards import write_shards
    from dist_ssl.data.sources import open_source

    directory = tmp_path_factory.mktemp("shards")
    write_shards(open_source("shapes:90"), str(directory), StorageConfig(), shard_mb=0.1, num_workers=0)
    return directory
