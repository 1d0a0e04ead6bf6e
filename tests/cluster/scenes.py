"""Pretrainings on the real cluster, disturbed in one way each, and compared with one that nobody touched.

The undisturbed run has the same number of ranks, on this machine: its losses must be met bit by bit.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from dist_ssl import config as configuration
from tests import trajectory
from tests.cluster.slurm import Cluster, wait_until
from tests.pool import ranks

STEPS, MANY_STEPS = 60, 400  # the longer run outlives the time that Slurm needs to miss a node

CONFIG = """
[run]
dir = {run}
[storage]
endpoint_url = {endpoint}
[data]
shards = "{shards}/train"
num_workers = 1
streams = 4
block_shards = 2
ledger = true
cache_dir = {cache}
cache_gb = 1.0
[augment]
crop_size = 32
[model]
encoder = "resnet_tiny"
[model.head]
hidden_dim = 64
output_dim = 32
[optimizer]
name = "adamw"
base_learning_rate = 1e-3
scaling = "none"
warmup_epochs = 0.0
[train]
global_batch_size = 24
steps = {steps}
[engine]
precision = "fp32"
threads_per_rank = 1
[checkpoint]
every_steps = 10
[log]
every_steps = 1
tensorboard = false
[diagnostics]
online_probe = false
every_steps = 1000
[evaluation]
train_shards = "{shards}/train"
test_shards = "{shards}/test"
num_seeds = 1
probes = ["knn"]
num_workers = 0
"""

PROFILE = """
cpus_per_task = 1
signal_seconds = 25
[evaluation]
gpus = 0
cpus = 1
time_minutes = 10
"""


class Scene:
    """A working directory with shards, and commands that run on a cluster (or, without one, here)."""

    def __init__(self, directory: Path, cluster: Cluster | None, store: Any = None):
        self.directory, self.cluster = directory, cluster
        self.environment = dict(cluster.environment if cluster else os.environ) | {"OMP_NUM_THREADS": "1"}
        self.endpoint, self.shards = None, str(directory / "bucket" / "shapes")
        if store is not None:  # serves `directory`, so that its shards are the same files
            self.environment |= store.environment
            self.endpoint, self.shards = store.endpoint_url, "s3://bucket/shapes"
        self.profile = directory / "profile.toml"
        self.profile.write_text(PROFILE)

    def call(self, *arguments: str, timeout: float = 300) -> str:
        """Standard output of `python -m ARGUMENTS`; RuntimeError with everything that it said where it fails."""
        command = [sys.executable, "-m", *arguments]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=timeout)
        if done.returncode != 0:
            raise RuntimeError(
                f"{' '.join(arguments)} exited {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-6000:]}"
            )
        return done.stdout

    def write_shards(self) -> None:
        endpoint = ("--set", f"storage.endpoint_url={self.endpoint}") if self.endpoint else ()
        sizes = ("--test-fraction", "0.25", "--shard-mb", "0.1", "--workers", "0")
        self.call("dist_ssl.cli", "shards", "write", "shapes:320:40", self.shards, *sizes, *endpoint)

    def config(self, name: str, steps: int = STEPS) -> Path:
        """A config file for the run directory `name`."""
        endpoint = json.dumps(self.endpoint) if self.endpoint else None
        text = CONFIG.format(
            run=json.dumps(str(self.directory / name)),
            endpoint=endpoint,
            shards=self.shards,
            cache=json.dumps(str(self.directory / "cache")),
            steps=steps,
        )
        if endpoint is None:
            text = text.replace("endpoint_url = None\n", "")
        path = self.directory / f"{name}.toml"
        path.write_text(text)
        return path

    def undisturbed(self, num_ranks: int, steps: int = STEPS) -> Path:
        """A run of `num_ranks` on this machine that nothing happens to; made on first use."""
        run = self.directory / f"undisturbed-{num_ranks}-{steps}"
        if not run.exists():
            config = configuration.load(Scene(self.directory, None).config(run.name, steps))  # from local files
            assert ranks(num_ranks).run(trajectory.pretrain, config) == [0] * num_ranks
        return run

    def submit(self, config: Path, nodes: int, *options: str) -> str:
        """The job id of a pretraining, one task a node unless the options say otherwise."""
        sizes = ("--nodes", str(nodes), "--gpus-per-node", "0", "--profile", str(self.profile))
        said = self.call("launch.slurm", "pretrain", str(config), *sizes, *options)
        return next(line for line in said.splitlines() if line.startswith("job ")).split()[1].rstrip(":")

    def wait_for_step(self, run: Path, step: int, seconds: float = 120) -> None:
        wait_until(lambda: max(losses(run), default=-1) >= step, seconds, f"{run.name} at step {step}")

    def wait_for_end(self, job: str, seconds: float = 300) -> str:
        assert self.cluster is not None
        return self.cluster.wait_for_state(job, ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"), seconds)

    def log(self, run: Path) -> str:
        return "\n".join(file.read_text(errors="replace") for file in sorted((run / "slurm").glob("*.log")))

    def starts(self, run: Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (run / "slurm" / "starts.jsonl").read_text().splitlines()]


def losses(run: Path) -> dict[int, float]:
    """Step -> loss, from metrics.jsonl; AssertionError where a step stands in it twice."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    entries = [json.loads(line) for line in lines if line.endswith("\n")]
    found = {entry["step"]: entry["loss"] for entry in entries}
    assert len(found) == len(entries), f"{run.name}: a step was logged twice"
    return found


def consumed(run: Path) -> dict[int, list[Any]]:
    """Step -> what all ranks consumed in it, sorted."""
    steps: dict[int, list[Any]] = {}
    for file in sorted(run.glob("ledger-rank*.jsonl")):
        for line in file.read_text().splitlines():
            entry = json.loads(line)
            steps.setdefault(entry["step"], []).extend(map(json.dumps, entry["samples"]))
    return {step: sorted(samples) for step, samples in steps.items()}


def assert_same_run(run: Path, undisturbed: Path) -> None:
    """Every step once, the same samples in each, and the same losses to the last bit."""
    assert consumed(run) == consumed(undisturbed)
    assert losses(run) == losses(undisturbed)
