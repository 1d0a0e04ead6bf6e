"""Fixtures that several test files share, and one thread a process: tests start as many processes as there are cores.

With more, OpenMP's threads wait for each other by spinning, and a test takes three times as long, or thirty; so those
of a run, which takes all cores for one rank, sleep while they wait.
"""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
MANY_TESTS = 100
# Files that take longest, in that order: begun first, none is left over for one process at the end.
LONGEST = (
    "test_slurm",
    "test_modes",
    "test_faults",
    "test_timm",
    "test_methods",
    "test_lab",
    "test_pages",
    "test_sweep",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


def pytest_collection_finish(session):
    """In a long session two pools that many tests use start at once: the first tests need one core only."""
    if len(session.items) > MANY_TESTS and not session.config.option.collectonly:
        from tests.pool import start_early

        start_early((2, 3))


@pytest.fixture(autouse=True)
def no_rank_afterwards():
    """A test that trained or evaluated in this process leaves it a rank, which the next test's commands inherit."""
    yield
    for name in OF_A_RANK:
        os.environ.pop(name, None)


@pytest.fixture(scope="session")
def small_shards(tmp_path_factory):
    """90 rendered shapes in a few small shards: the directory `shards write` filled."""
    from dist_ssl.config import StorageConfig
    from dist_ssl.data.shards import write_shards
    from dist_ssl.data.sources import open_source

    directory = tmp_path_factory.mktemp("shards")
    write_shards(open_source("shapes:90"), str(directory), StorageConfig(), shard_mb=0.1, num_workers=0)
    return directory
