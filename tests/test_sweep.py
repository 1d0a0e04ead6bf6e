"""`dist-ssl sweep`: every combination trained on this machine, one table, and nothing run twice."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dist_ssl import config as configuration
from dist_ssl.config import StorageConfig
from dist_ssl.data.shards import write_shards
from dist_ssl.data.sources import open_source
from dist_ssl.evaluation.results import write_json
from launch import sweep
from tests.terminal import ROOT, run


def command(folder: Path, *options: str, steps: int) -> list[str]:
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
def test_a_grid_is_stopped_goes_on_and_names_the_run_that_fails(shapes: Path) -> None:
    started = command(shapes, "--sweep", "run.seed=0,1", steps=60)
    first, second = (shapes / "runs" / f"seed={seed}" for seed in (0, 1))
    process = subprocess.Popen(started, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not ((first / "metrics.jsonl").exists() and (first / "metrics.jsonl").read_text()):
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 75, said
    assert "committed; run the same command again" in said
    assert not second.exists()
    shutil.copytree(first, second, ignore=shutil.ignore_patterns("checkpoints"))  # a run that has lost its checkpoints
    done = run(started)
    assert done.returncode == 1
    assert f"{second}: pretrain ended with code 2" in done.stderr
    head, _, *rows = [[cell.strip() for cell in line.split("|")[1:5]] for line in done.stdout.splitlines()]
    assert head == ["run", "state", "step", "loss"]
    assert [row[0] for row in rows] == ["seed=0", "seed=1"]
    assert rows[0][1:3] == ["complete", "60"]
    done = run(command(shapes, "--sweep", "run.seed=0", steps=60))
    assert done.returncode == 0, done.stderr
    assert f"run 1 of 1: {first}, which is complete" in done.stderr


def test_only_a_run_whose_last_step_is_committed_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the sweep starts, in place of a Python that would train, is a program that notes what it is told."""
    started, file = tmp_path / "started", ROOT / "configs/debug_cpu.toml"
    (tmp_path / "python").write_text(f"#!/bin/sh\necho $3 >> {started}\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    given = [f"run.dir={json.dumps(str(tmp_path / 'runs'))}", "train.steps=5"]
    base = configuration.load(file, given)
    seed = tmp_path / "runs" / "seed=0"

    def starts(*overrides: str) -> list[str]:
        started.write_text("")
        assert sweep.run(file, configuration.with_overrides(base, overrides), given, ["run.seed=0"], 1, True) == []
        return started.read_text().split()

    def commit(step: int) -> None:
        (seed / f"checkpoints/step-{step:08d}").mkdir(parents=True)
        (seed / f"checkpoints/step-{step:08d}/manifest.json").write_text("{}")

    both = ["pretrain", "evaluate"]
    assert starts() == both
    commit(0)
    (seed / "config.toml").write_text(configuration.dumps(base))
    (seed / "metrics.jsonl").write_text(json.dumps({"step": 5, "loss": 1.0}) + "\n")
    write_json(seed / "evaluation" / "step-0" / "results.json", {"data": {}, "probes": {}})
    assert starts() == both, (
        "the last step was logged and its commit failed: what was evaluated is the untrained encoder"
    )
    commit(5)
    assert starts() == ["evaluate"]
    write_json(seed / "evaluation" / "step-5" / "results.json", {"data": {}, "probes": {}})
    assert starts() == []
    assert starts("engine.grace_seconds=9") == []
    assert starts("optimizer.base_learning_rate=7.7") == both, "pretrain refuses what another config made"


def test_what_is_told_to_end_is_told_so_itself_and_is_the_last() -> None:
    """A run that was about to be complete, an evaluation: neither exits with 75."""
    told = "import os, signal, sys, time; number, code = map(int, sys.argv[1:]); "
    told += "signal.signal(number, lambda *_: (os.write(1, b'%d ' % number), os._exit(code))); "
    told += "os.kill(os.getppid(), number); time.sleep(20)"
    numbers = [int(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)]
    runner = f"""if True:
        import sys
        from launch import child
        for number in {numbers}:
            for code in (0, 143):
                assert child.run([sys.executable, "-c", {told!r}, str(number), str(code)]) == 75
                assert child.run([sys.executable, "-c", f"raise SystemExit({{code}})"]) == code
    """
    # In a session of its own, so that it has no terminal whose Ctrl-C reaches both.
    done = subprocess.run([sys.executable, "-c", runner], cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True)
    assert done.returncode == 0
    assert done.stdout.split() == [b"%d" % number for number in numbers for _ in range(2)]


def test_a_combination_that_no_config_takes_runs_nothing(tmp_path: Path) -> None:
    for grid, expected in (
        (("--sweep", "train.stepz=1,2"), "unknown key 'train.stepz'"),
        (("--sweep", "train.steps=1,none"), "train.steps"),
        (("--sweep", "objective.chunks=1,64"), "16 is less than the 1 ranks x 64 chunks"),
    ):
        done = run(command(tmp_path, *grid, steps=2))
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert expected in line
        assert not (tmp_path / "runs").exists()
