"""A rank's threads on a CPU: what it may use, shared with the ranks beside it."""

import os

import pytest
import torch

from dist_ssl import config as configuration
from dist_ssl.config import Config
from dist_ssl.distributed import World
from dist_ssl.engine import prepare, threads

EIGHT = set(range(8))


@pytest.mark.parametrize(
    ("mine", "of_ranks", "limit", "expected"),
    [
        (EIGHT, [EIGHT] * 2, float("inf"), 4),  # a launcher's ranks share what it may use
        ({2, 3}, [{0, 1}, {2, 3}, {4, 5}], float("inf"), 2),  # each of srun's has its own
        (EIGHT, [EIGHT] * 16, float("inf"), 1),
        (EIGHT, [EIGHT], 2.5, 2),
        (EIGHT, [EIGHT], 0.5, 1),
    ],
)
def test_cpus_are_shared_by_the_ranks_that_may_use_them(mine, of_ranks, limit, expected):
    assert threads.share(mine, of_ranks, limit) == expected


def test_a_containers_limit_is_the_least_of_its_cgroups(tmp_path):
    def process(*lines):
        (tmp_path / "cgroup").write_text("\n".join(lines) + "\n")
        return tmp_path / "cgroup"

    (tmp_path / "pod" / "container").mkdir(parents=True)
    (tmp_path / "pod" / "container" / "cpu.max").write_text("max 100000\n")
    assert threads.quota(tmp_path, process("0::/pod/container")) == float("inf")
    (tmp_path / "pod" / "cpu.max").write_text("250000 100000\n")
    assert threads.quota(tmp_path, process("0::/pod/container")) == 2.5
    assert threads.quota(tmp_path, process("0::/seen/from/outside")) == float("inf")
    old = tmp_path / "cpu,cpuacct"
    old.mkdir()
    (old / "cpu.cfs_period_us").write_text("100000\n")
    for quota, limit in ((-1, float("inf")), (300000, 3.0)):
        (old / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        assert threads.quota(tmp_path, process("3:memory:/x", "2:cpu,cpuacct:/seen/from/outside")) == limit


def test_a_run_takes_the_cpus_that_its_process_may_use():
    config = configuration.with_overrides(Config(), ["engine.precision=fp32"])
    may, before = os.sched_getaffinity(0), torch.get_num_threads()
    try:
        for cpus in ({min(may)}, may):
            os.sched_setaffinity(0, cpus)
            prepare(config, World(0, 1, 0, 1, torch.device("cpu")))
            assert torch.get_num_threads() <= len(cpus)
    finally:
        os.sched_setaffinity(0, may)
        torch.set_num_threads(before)
