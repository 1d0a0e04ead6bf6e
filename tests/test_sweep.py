"""`dist-ssl sweep`: every combination trained on this machine, one table, and nothing run twice."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dist_ssl.config import StorageConfig
from dist_ssl.data.shards import write_shards
from dist_ssl.data.sources import open_source
from tests.terminal import ROOT, run


def command(folder: Path, *options: str, steps: int = 2) -> list[str]:
    settings = (
        f"run.dir={json.dumps(str(folder / 'runs'))}", f"data.shards={json.dumps(str(folder / 'data'))}",
        f"train.steps={steps}", "train.global_batch_size=16", "data.num_workers=0",
    )  # fmt: skip
    given = [part for setting in settings for part in ("--set", setting)]
    return [sys.executable, "-m", "launch.command", "sweep", "configs/debug_cpu.toml", *given, "--ranks", "1", *options]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    write_shards(open_source("shapes:64:32"), str(folder / "data"), StorageConfig(), num_workers=0)
    return folder


@pytest.mark.slow
def test_a_grid_is_run_once_and_a_run_that_fails_is_named(shapes: Path) -> None:
    grid = ("--sweep", "run.seed=0,1", "--sweep", "data.cache_dir=a")
    done = run(command(shapes, *grid))
    assert done.returncode == 0, done.stderr
    head, _, *rows = done.stdout.splitlines()
    assert [cell.strip() for cell in head.split("|")[1:5]] == ["run", "state", "step", "loss"]
    assert [[cell.strip() for cell in row.split("|")[1:4]] for row in rows] == [
        ["seed=0_cache_dir=a", "complete", "2"],
        ["seed=1_cache_dir=a", "complete", "2"],
    ]
    (shapes / "runs" / "seed=1_cache_dir=a" / "metrics.jsonl").unlink()  # now it has lost something: it is refused
    for path in (shapes / "runs" / "seed=1_cache_dir=a" / "checkpoints").glob("*/manifest.json"):
        path.unlink()
    (shapes / "runs" / "seed=1_cache_dir=a" / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n')
    done = run(command(shapes, *grid))
    assert done.returncode == 1
    assert "seed=0_cache_dir=a, which is complete" in done.stderr
    assert "pretrain ended with code 2" in done.stderr


@pytest.mark.slow
def test_told_to_stop_it_commits_and_goes_on(shapes: Path) -> None:
    grid = ("--sweep", "run.seed=7")
    started = command(shapes, *grid, steps=4000)
    metrics = shapes / "runs" / "seed=7" / "metrics.jsonl"
    process = subprocess.Popen(started, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (metrics.exists() and metrics.read_text()):
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 75, said
    assert "committed; run the same command again" in said


def test_a_combination_that_no_config_takes_runs_nothing(tmp_path: Path) -> None:
    for grid, expected in (
        (("--sweep", "train.stepz=1,2"), "unknown key 'train.stepz'"),
        (("--sweep", "train.steps=1,none"), "train.steps"),
        (("--sweep", "objective.chunks=1,64"), "16 is less than the 1 ranks x 64 chunks"),
    ):
        done = run(command(tmp_path, *grid))
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert expected in line
        assert not (tmp_path / "runs").exists()
