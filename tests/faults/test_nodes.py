"""Several machines without Slurm: `launch.local --nodes` and torchrun, each machine a launcher of its own here."""

import os
import re
import signal
import sys
from functools import partial

import pytest

from dist_ssl.config.environment import EXIT_RUN_ME_AGAIN
from tests import trajectory
from tests.faults.harness import Launch, write_config
from tests.pool import free_port, ranks
from tests.terminal import run
from tests.trajectory import ledger, losses, small_config

LOCAL = [sys.executable, "-m", "launch.local", "pretrain", "configs/debug_cpu.toml"]


@pytest.mark.slow
def test_two_nodes_commit_together_and_torchrun_goes_on(tmp_path, small_shards):
    def config(name):
        return small_config(tmp_path / name / "run", small_shards, "train.steps=12", "checkpoint.every_steps=1000")

    assert ranks(2).run(partial(trajectory.pretrain, config("undisturbed"))) == [0, 0]
    ours, port = config("nodes"), str(free_port())
    place = ("--nodes", "2", "--master-addr", "localhost", "--master-port", port, "--node-rank")
    first, second = (Launch(ours, 1, *place, str(node)) for node in range(2))
    first.wait_for_step(5)
    os.kill(second.process.pid, signal.SIGTERM)  # as a node that is drained
    assert [launch.wait(60) for launch in (first, second)] == [EXIT_RUN_ME_AGAIN] * 2, first.said() + second.said()

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = run([*torchrun, "-m", "dist_ssl.cli", "pretrain", str(write_config(ours))])
    assert done.returncode == 0, done.stderr
    found, expected = tmp_path / "nodes" / "run", tmp_path / "undisturbed" / "run"
    assert losses(found) == losses(expected)
    assert ledger(found) == ledger(expected)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--nodes", "2", "--node-rank", "2"), "--node-rank 2: expected one of 0 to 1"),
        (("--nodes", "2", "--node-rank", "1"), "expected --master-addr"),
        (("--nodes", "2", "--max-restarts", "1"), "expected 0 with --nodes 2"),
        (("--nodes", "2", "--data", "photos"), "expected one machine"),
    ],
)
def test_a_wrong_place_among_nodes_is_one_line(options, said):
    done = run([*LOCAL, *options])
    assert done.returncode == 2
    assert re.fullmatch(rf"error: .*{re.escape(said)}.*\n", done.stderr), done.stderr
