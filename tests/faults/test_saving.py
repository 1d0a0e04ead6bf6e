"""When a run saves, and what it does where it can't: on a pool of ranks, without launchers."""

import os
import re
import signal
import time
from pathlib import Path

import pytest

from dist_ssl import checkpoint
from dist_ssl.config import UserError
from dist_ssl.storage.layout import exported_steps
from dist_ssl.training.interrupts import StopRequest
from dist_ssl.training.run_directory import open_run
from tests import engines, trajectory
from tests.faults import inject
from tests.faults.harness import last_step
from tests.pool import RankFailed, ranks
from tests.trajectory import small_config


def committed(config):
    return checkpoint.committed_steps(checkpoint.checkpoint_store(config))


def test_by_the_clock(tmp_path, small_shards):
    config = small_config(
        tmp_path / "run",
        small_shards,
        "train.steps=4",
        "checkpoint.every_steps=1000",
        "checkpoint.every_minutes=1e-6",
        "checkpoint.keep_last=9",
    )
    assert ranks(2).run(trajectory.pretrain, config) == [0, 0]
    assert committed(config) == [0, 2, 4]  # what the clock asks for in step 1 is heard, by all alike, in step 2


def test_before_the_time_limit(tmp_path, small_shards):
    config = small_config(
        tmp_path / "run",
        small_shards,
        "train.steps=100000",
        "checkpoint.every_steps=100000",
        "checkpoint.wall_time_minutes=0.02",
    )
    assert ranks(2).run(trajectory.pretrain, config) == [75, 75]
    assert committed(config) == [0, last_step(tmp_path / "run")]


def test_a_limit_is_heeded_early_enough_for_a_commit(tmp_path, small_shards):
    stop = StopRequest(25, 10, time.monotonic())
    assert [stop.is_due(seconds) for seconds in (0, 300)] == [False, False]
    stop._asked_at.append(time.monotonic() - 250)  # a step of 250 s
    assert stop.is_due(0)
    assert stop.reason() == "checkpoint.wall_time_minutes"
    assert StopRequest(25, 10, time.monotonic()).is_due(500)
    assert StopRequest(25, 10, time.monotonic() - 601).is_due(0)
    config = small_config(tmp_path / "run", small_shards, "checkpoint.wall_time_minutes=600", "train.steps=100")
    for steps in (2, 4):  # that of step 0 was measured; one that goes on guesses by what it has read
        assert ranks(2).run(inject.pretrain_with_long_saves, config) == [75, 75]
        assert committed(config)[-1] == steps


@pytest.mark.slow
def test_the_last_commit_may_take_longer_than_a_signal_and_the_watchdog_allow(tmp_path, small_shards):
    config = small_config(
        tmp_path / "run", small_shards, "train.steps=2", "engine.grace_seconds=2", "engine.hang_minutes=0.05"
    )
    assert ranks(1).run(inject.pretrain_with_a_signal_in_the_last_commit, config, 5) == [0]
    assert committed(config) == [0, 2]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_on_each_signal(tmp_path, small_shards, number):
    """One rank hears it; all finish the same step and commit it."""
    config = small_config(tmp_path / "run", small_shards, "checkpoint.every_steps=1000")
    assert ranks(2).run(inject.pretrain_with_signal, config, 3, number) == [75, 75]
    assert committed(config) == [0, last_step(tmp_path / "run")]
    assert last_step(tmp_path / "run") in (2, 3)  # it came while step 2 was under way


def test_commits_are_counted_over_all_starts_of_a_run(tmp_path, small_shards):
    """One that is preempted more often than it exports does export."""
    settings = ("train.steps=5", "checkpoint.every_steps=1000", "checkpoint.export_every_commits=2")
    config = small_config(tmp_path / "run", small_shards, *settings)
    assert ranks(2).run(inject.pretrain_with_signal, config, 3, signal.SIGTERM) == [75, 75]
    assert exported_steps(tmp_path / "run") == set()
    assert ranks(2).run(trajectory.pretrain, config) == [0, 0]
    assert exported_steps(tmp_path / "run") == {5}


@pytest.mark.parametrize(("bad", "saved"), [(1, 0), (2, 0), (3, 2), (5, 4)])
def test_a_batch_that_fails_on_one_rank_ends_all_with_its_error(tmp_path, small_shards, bad, saved):
    """What was computed before it is committed: an error is known two steps before its batch would be needed."""
    config = small_config(tmp_path / "run", small_shards, "checkpoint.every_steps=1000")
    for error in ranks(2).run(inject.error_of_a_bad_batch, config, bad):
        assert error in (f"UserError: batch {bad} is bad", f"UserError: rank 1: batch {bad} is bad")
    assert committed(config)[-1] == saved


def test_a_failed_write_in_the_background_stops_the_next_step(tmp_path, small_shards):
    config = small_config(tmp_path / "run", small_shards, "checkpoint.every_steps=10", "train.steps=200")
    Path(config.run.dir, "checkpoints").mkdir(parents=True)
    Path(config.run.dir, "checkpoints", "step-00000010").write_text("in the way")
    for error in ranks(2).run(trajectory.pretrain_error, config):
        assert re.match(r"(OSError|StorageError): checkpoint of step 10 not written: rank 0", error)
    assert 10 <= last_step(tmp_path / "run") < 20  # long before the next save would have found out
    assert committed(config) == [0]


@pytest.mark.slow
def test_weights_that_are_not_finite_end_the_run_and_the_last_good_ones_go_on(tmp_path, small_shards):
    config = small_config(tmp_path / "run", small_shards, "checkpoint.every_steps=2", "train.steps=6")
    with pytest.raises(RankFailed) as failure:
        ranks(2).run(inject.pretrain_with_poisoned_momentum, config, 4)
    for said in failure.value.tracebacks:
        assert re.search(r"NotFiniteCheckpoint: checkpoint of step 4 not written: rank 1: NaN or infinite: \w", said)
        assert "; the one of step 2 is the last good one" in said
    assert committed(config) == [0, 2]
    assert ranks(2).run(trajectory.pretrain, config) == [0, 0]
    assert committed(config)[-1] == 6


def test_nothing_is_removed_before_a_newer_one_is_committed(tmp_path):
    """All ranks' files are written, and the manifest can't be."""
    config = small_config(tmp_path / "run", "", "checkpoint.keep_last=1")
    for steps in (0, 2):
        ranks(2).run(engines.save_after, config, steps)
    Path(config.run.dir, "checkpoints", "step-00000004", "manifest.json", "in the way").mkdir(parents=True)
    assert all("manifest.json" in error for error in ranks(2).run(engines.save_error, config, 4))
    assert committed(config) == [0, 2]
    assert [step for step, _ in ranks(2).run(engines.newest_step, config)] == [2, 2]


def test_all_is_on_the_disk_before_the_manifest(tmp_path):
    """The kernel is asked, in this order: each file, its rename, its directories; then the manifest the same way."""
    config = small_config(tmp_path / "run", "")
    calls = ranks(1).run(engines.synced_and_renamed, config, 2)[0]
    folder = os.path.realpath(tmp_path / "run" / "checkpoints")
    step = f"{folder}/step-00000002"
    renamed = [path for call, path in calls if call == "rename"]
    assert renamed == [f"{step}/i0001/rank-00000.safetensors", f"{step}/i0001/state.json", f"{step}/manifest.json"]
    position = 0
    for path in renamed:
        rename = calls.index(("rename", path))
        assert ("fsync", "temporary of " + path) in calls[position:rename]
        position = rename
        end = calls.index(("rename", f"{step}/manifest.json")) if not path.endswith("manifest.json") else len(calls)
        assert ("fsync", os.path.dirname(path)) in calls[rename:end]
    last = calls.index(("rename", f"{step}/manifest.json"))
    # The run directory, the checkpoints and the step are new: their entries must be durable too.
    assert {("fsync", str(tmp_path / "run")), ("fsync", folder), ("fsync", step)} <= set(calls[:last])


def test_what_one_rank_sees_of_a_run_directory_ends_all(tmp_path):
    (tmp_path / "trained").mkdir()
    (tmp_path / "trained" / "metrics.jsonl").write_text("{}")
    config = small_config(tmp_path / "run", "", f"checkpoint.url={tmp_path}/checkpoints")
    for error in ranks(2).run(inject.error_of_a_run_seen_by_one_rank, config, tmp_path / "trained"):
        assert re.match(r"UserError: (rank 1: )?.*has been trained but no checkpoint is there", error)
    (tmp_path / "run" / "config.toml" / "in the way").mkdir(parents=True)
    for error in ranks(2).run(inject.error_of_a_run_seen_by_one_rank, config, tmp_path / "run"):
        assert re.match(r"\w*Error: .*config.toml", error)


def test_a_restart_that_is_refused_moves_nothing(tmp_path):
    """Checkpoints elsewhere would be gone on from; those in the run's directory go with it, whatever names them."""
    run = tmp_path / "run"
    for place, refused in ((tmp_path / "elsewhere", True), (run / "mine", False)):
        manifest = place / "step-00000000" / "manifest.json"
        manifest.parent.mkdir(parents=True)
        manifest.write_text("{}")
        (run / "metrics.jsonl").parent.mkdir(exist_ok=True)
        (run / "metrics.jsonl").write_text("{}")
        config = small_config(run, "", f"checkpoint.url={place}")
        if refused:
            with pytest.raises(UserError, match="elsewhere: expected it empty for a restart"):
                open_run(config, None, restart=True, extend=False)
        else:
            assert open_run(config, None, restart=True, extend=False) == (1, None)
        assert manifest.exists() == (run / "metrics.jsonl").exists() == refused


@pytest.mark.slow
def test_a_lost_peer_means_an_end_without_saving(tmp_path, small_shards):
    config = small_config(tmp_path / "run", small_shards, "checkpoint.every_steps=1000", "engine.grace_seconds=1")
    with pytest.raises(RankFailed) as failure:
        ranks(2).run(inject.pretrain_with_a_signal_and_a_lost_peer, config, 6)
    assert failure.value.tracebacks[0] == "the process died"
    assert committed(config) == [0]
