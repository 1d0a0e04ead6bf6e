"""dist-ssl doctor: each thing that can be broken here is broken, and must come out red with a remedy."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dist_ssl import config as configuration
from dist_ssl.config import Config
from dist_ssl.planning import doctor

DEBUG = Path(__file__).parent.parent / "configs" / "debug_cpu.toml"


def config_of(*overrides: str) -> Config:
    return configuration.load(DEBUG, overrides)


def red(findings) -> list[str]:
    return [finding.question for finding in findings if finding.remedy is not None]


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("shards")
    command = [sys.executable, "-m", "dist_ssl.cli", "shards", "write", "shapes:64:32", str(folder), "--workers", "0"]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return str(folder)


def test_a_sound_config_is_green_and_leaves_nothing(shards, tmp_path):
    run = tmp_path / "runs" / "first"
    config = config_of(f"data.shards={json.dumps(shards)}", f"run.dir={json.dumps(str(run))}")
    found = [*doctor.store(config), *doctor.commits(config), *doctor.disk(config), *doctor.ports(), *doctor.versions()]
    assert red(found) == [], found
    assert any(finding.answer.startswith("64 images in") for finding in found)
    assert list(tmp_path.iterdir()) == []


def test_missing_shards_are_red(tmp_path):
    (finding,) = doctor.store(config_of(f"data.shards={json.dumps(str(tmp_path / 'none'))}"))
    assert finding.remedy
    assert "none" in finding.answer
    assert "shards write" in finding.remedy
    assert "endpoint_url" not in finding.remedy


def test_a_place_that_cannot_be_written_is_red(tmp_path):
    (tmp_path / "file").write_text("")
    config = config_of(f"run.dir={json.dumps(str(tmp_path / 'file' / 'run'))}")
    assert red(doctor.commits(config)) == ["run.dir"]


def test_a_cache_larger_than_the_disk_is_red():
    assert red(doctor.disk(config_of("data.shards=s3://bucket/x", "data.cache_gb=1e9"))) == ["disk for the cache"]


def test_credentials_stay_out_of_findings(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a-name-of-a-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-that-is-long")
    unreachable = ["data.shards=s3://bucket/x", "storage.endpoint_url=http://127.0.0.1:9", "storage.retry_seconds=0"]
    (finding,) = doctor.store(config_of(*unreachable))
    assert finding.remedy
    assert "a-secret" not in str(finding)
    assert "endpoint_url" in finding.remedy


def test_too_little_shared_memory_for_the_prefetch_is_red(monkeypatch):
    """A real /dev/shm against ImageNet's prefetch, as one of 8 ranks on this node sees it."""
    free = shutil.disk_usage("/dev/shm").free
    for name, value in {"RANK": "0", "WORLD_SIZE": "32", "LOCAL_WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    config = configuration.load(DEBUG.parent / "simclr_resnet50_imagenet.toml")
    (finding,) = doctor.memory_for_workers(config)
    batch = 128 * 2 * 3 * 224 * 224
    assert f"{8 * (8 * 2 + 4) * batch / 1e9:.1f} GB needed by 8 of 32 ranks" in finding.answer
    needs_all = configuration.with_overrides(config, [f"data.prefetch_batches={free // (8 * 8 * batch) + 2}"])
    (finding,) = doctor.memory_for_workers(needs_all)
    assert finding.remedy is not None
    assert "--shm-size=" in finding.remedy
    (finding,) = doctor.memory_for_workers(config_of())
    assert finding.remedy is None


def test_a_controller_that_does_not_answer_is_red(monkeypatch, tmp_path):
    """`sinfo` here is a program that fails as Slurm's does without a controller."""
    program = tmp_path / "sinfo"
    program.write_text("#!/bin/sh\necho 'slurm_load_partitions: Unable to contact slurm controller' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_CONF", "/none")
    (finding,) = doctor.slurm()
    assert finding.remedy
    assert "Unable to contact" in finding.answer


def test_one_rank_has_nothing_to_measure(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    (finding,) = doctor.collectives()
    assert finding.remedy is None
    assert "one rank" in finding.answer


def test_a_check_that_fails_is_a_finding_itself(monkeypatch):
    def broken():
        raise OSError("no such thing")
        yield

    for name in ("versions", "gpus", "collectives", "memory_for_workers", "ports"):
        monkeypatch.setattr(doctor, name, lambda *config: iter(()))
    monkeypatch.setattr(doctor, "slurm", broken)
    (finding,) = doctor.examine(None)
    assert finding.remedy
    assert "no such thing" in finding.answer


@pytest.mark.slow
def test_the_command_measures_collectives_and_exits_with_the_colour(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    command = [sys.executable, "-m", "dist_ssl.cli", "doctor", str(DEBUG), "--set", "data.shards=/none"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    lines = done.stdout.splitlines()
    assert done.returncode == 1, done.stdout
    network = next(line for line in lines if "Gbit/s all-reduce, 2 ranks, gloo" in line)  # red on a busy machine
    assert [line for line in lines if line.startswith("red") and line != network] == [
        line for line in lines if " shards: " in line
    ]
