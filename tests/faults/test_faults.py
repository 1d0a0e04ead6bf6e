"""Runs that are killed, signalled, poisoned and outlived: real processes, one case of each class."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial

import psutil
import pytest
import torch

from dist_ssl import checkpoint
from dist_ssl.config import StorageConfig
from dist_ssl.storage import Store
from tests import engines, trajectory
from tests.faults import chaos, inject
from tests.faults.forked import ForkedLaunch
from tests.faults.harness import Launch, last_step, send
from tests.pool import RankFailed, ranks
from tests.terminal import ROOT
from tests.trajectory import ledger, losses, small_config

pytestmark = pytest.mark.slow
STEPS = 24


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, small_shards):
    """What a run of 24 steps on two ranks gives that nobody disturbs: losses, ledger, final weights."""
    config = settings(tmp_path_factory.mktemp("undisturbed"), small_shards)
    goes_on(config)
    return outcome(config)


def goes_on(config, size=2, code=0, **options):
    """The same run once more, to its end, on ranks that are there already."""
    assert ranks(size).run(partial(trajectory.pretrain, config, **options)) == [code] * size


def settings(folder, shards, *overrides):
    return small_config(folder / "run", shards, f"train.steps={STEPS}", *overrides)


def outcome(config):
    run_dir = trajectory.Path(config.run.dir)
    state = engines.full_state(config, STEPS)
    return losses(run_dir), ledger(run_dir), state


def same_bits(found, expected):
    assert found[0] == expected[0]
    assert found[1] == expected[1]
    assert found[2].keys() == expected[2].keys()
    assert all(torch.equal(tensor, expected[2][name]) for name, tensor in found[2].items())


def test_kill_9_and_the_same_command_again_is_bit_identical(tmp_path, small_shards, undisturbed):
    config = settings(tmp_path, small_shards)
    for step in (7, 16):
        launch = ForkedLaunch(config, 2)
        launch.wait_for_step(step)
        launch.kill()
    goes_on(config)
    same_bits(outcome(config), undisturbed)
    goes_on(config)  # complete: does nothing
    same_bits(outcome(config), undisturbed)


def test_other_ranks_and_stage_after_a_kill(tmp_path, small_shards, undisturbed):
    for step, size, stage in ((8, 3, 2), (16, 1, 0)):
        launch = ForkedLaunch(settings(tmp_path, small_shards, f"engine.zero_stage={stage}"), size)
        launch.wait_for_step(step)
        launch.kill()
    config = settings(tmp_path, small_shards, "engine.zero_stage=3")
    goes_on(config)
    found = outcome(config)
    assert found[1] == undisturbed[1]
    assert found[0] == pytest.approx(undisturbed[0], rel=1e-3)


def test_sigterm_to_a_rank_commits_and_exits_75(tmp_path, small_shards, undisturbed):
    config = settings(tmp_path, small_shards, "checkpoint.every_steps=1000")
    launch = ForkedLaunch(config, 2)
    launch.wait_for_step(5)
    send(launch.ranks()[1:], signal.SIGUSR1)
    committed_and_goes_on(launch, config, undisturbed)


def committed_and_goes_on(launch, config, undisturbed):
    assert launch.wait(60) == 75, launch.said()
    assert launch.said().count("is committed after") == 1
    steps = checkpoint.committed_steps(checkpoint.checkpoint_store(config))
    assert steps[-1] == last_step(launch.run_dir) >= 5
    goes_on(config)
    same_bits(outcome(config), undisturbed)


def test_a_dead_rank_takes_the_others_down_the_launcher_starts_again_and_passes_a_signal_on(
    tmp_path, small_shards, undisturbed
):
    config = settings(tmp_path, small_shards)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("")  # of a run that is to be set aside, once
    launch = Launch(config, 2, "--restart", restarts=1)
    launch.wait_for_step(7)
    send(launch.ranks()[1:], signal.SIGKILL)
    killed = time.monotonic()
    while "starting all 2 again" not in launch.said():
        assert time.monotonic() - killed < 60
        time.sleep(0.1)
    assert "rank 1 of 2 was killed by SIGKILL" in launch.said()
    launch.wait_for_step(last_step(launch.run_dir) + 2)
    os.kill(launch.process.pid, signal.SIGTERM)
    committed_and_goes_on(launch, config, undisturbed)
    assert len(list(tmp_path.glob("run.before-*"))) == 1


def test_ranks_end_with_a_launcher_that_is_killed(tmp_path, small_shards):
    launch = Launch(settings(tmp_path, small_shards, "checkpoint.every_steps=1000", "train.steps=2000"), 2)
    launch.wait_for_step(5)
    left = launch.ranks()
    launch.process.kill()
    launch.process.wait()
    _, alive = psutil.wait_procs(left, timeout=30)
    assert not alive
    steps = checkpoint.committed_steps(Store(str(tmp_path / "run" / "checkpoints"), StorageConfig()))
    assert steps[-1] >= 5  # they committed before they ended


@pytest.mark.parametrize(("commit_seconds", "pause", "committed"), [(6, 0.2, 2), (30, 1.5, 0)])
def test_a_commit_may_be_long_and_a_second_ctrl_c_ends_it(tmp_path, commit_seconds, pause, committed):
    """Two ranks of `launch.local`, in whose place stand programs. One signal may come twice, passed on by a sweep."""
    said, rank = tmp_path / "said", tmp_path / "rank"
    rank.write_text(f"""#!/bin/sh
        trap 'sleep {commit_seconds}; echo committed >> {said}; exit 75' INT
        echo up >> {said}
        for i in $(seq 200); do sleep 0.1; done""")
    rank.chmod(0o755)
    program = f"""if True:
        import sys
        from launch import local
        sys.executable = {str(rank)!r}
        local.app(["pretrain", "configs/debug_cpu.toml", "--ranks", "2", "--set", "engine.grace_seconds=0.1"])
    """
    launcher = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, start_new_session=True)
    try:
        while launcher.poll() is None and not (said.exists() and said.read_text().count("up") == 2):
            time.sleep(0.1)
        time.sleep(1)  # until torch has noted that it has started them
        left = psutil.Process(launcher.pid).children()
        for _ in range(2):
            launcher.send_signal(signal.SIGINT)
            time.sleep(pause)
        assert launcher.wait(20) == 130
    finally:
        launcher.kill()
    assert not any(process.is_running() for process in left)
    assert said.read_text().count("committed") == committed


@pytest.mark.parametrize("ignored", [False, True])
def test_a_closed_terminal_is_a_signal_to_commit_but_under_nohup(tmp_path, small_shards, ignored):
    """nohup starts a program with SIGHUP ignored."""
    config = settings(tmp_path, small_shards, "checkpoint.every_steps=1000", "train.steps=2000")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        launch = Launch(config, 2)
    finally:
        signal.signal(signal.SIGHUP, before)
    launch.wait_for_step(5)
    send([launch.process, *launch.ranks()], signal.SIGHUP)  # as the terminal sends it, to all
    if ignored:
        launch.wait_for_step(last_step(launch.run_dir) + 5)
        launch.process.send_signal(signal.SIGTERM)
    assert launch.wait(60) == 75
    assert "SIGTERM" in launch.said() if ignored else "committed after SIGHUP" in launch.said()


def test_a_hanging_rank_is_found_and_its_stack_shown(tmp_path, small_shards):
    config = settings(tmp_path, small_shards, "engine.hang_minutes=0.1", "engine.grace_seconds=2")
    launch = ForkedLaunch(config, 2, grace_seconds=1)  # a rank that is stopped hears no SIGTERM
    launch.wait_for_step(3)
    send(launch.ranks()[1:], signal.SIGSTOP)
    assert launch.wait(60) != 0
    assert "no step since step" in launch.said()
    assert "Current thread" in launch.said() or "Thread 0x" in launch.said()


def test_an_older_incarnation_that_lives_on_does_not_write(tmp_path, small_shards, undisturbed):
    config = settings(tmp_path, small_shards)
    old = ForkedLaunch(config, 2)
    old.wait_for_step(7)
    send(old.ranks(), signal.SIGSTOP)
    goes_on(config)
    same_bits(outcome(config), undisturbed)
    send(old.ranks(), signal.SIGCONT)
    assert old.wait(60) == 76, old.said()
    assert "incarnation 2 of" in old.said()
    same_bits(outcome(config), undisturbed)


def test_a_step_that_is_not_finite_is_skipped(tmp_path, small_shards):
    """Rank 1 is given poisoned pixels in the third and fourth step."""
    config = small_config(tmp_path / "run", small_shards, "train.steps=8", "checkpoint.every_steps=4")
    assert ranks(2).run(inject.pretrain_with_poison, config, [3, 4]) == [0, 0]
    found = losses(tmp_path / "run")
    assert [number for number, loss in enumerate(found, 1) if loss is None] == [3, 4]
    lines = [json.loads(line) for line in (tmp_path / "run" / "ledger-rank0.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line.get("skipped")] == [3, 4]
    assert [line["step"] for line in lines] == list(range(1, 9))
    state = engines.full_state(config, 8)
    assert all(torch.isfinite(tensor.double()).all() for tensor in state.values())
    assert state["encoder.stem.1.num_batches_tracked"] == 6


def test_too_many_in_a_row_stop_the_run(tmp_path, small_shards):
    config = small_config(tmp_path / "run", small_shards, "train.max_skipped_steps=2", "checkpoint.every_steps=2")
    with pytest.raises(RankFailed, match=r"step 7, rank 1: the loss is nan.*step 4, is intact") as failure:
        ranks(2).run(inject.pretrain_with_poison, config, list(range(5, 20)))
    assert all("NotFinite" in text for text in failure.value.tracebacks)
    state = engines.full_state(config, 4)
    assert all(torch.isfinite(tensor.double()).all() for tensor in state.values())


def test_a_run_that_diverges_ends_in_one_line(tmp_path, small_shards):
    """A launcher starts nothing again after exit code 2."""
    diverging = ("optimizer.base_learning_rate=1e30", "train.max_skipped_steps=2", "checkpoint.every_steps=1000")
    launch = ForkedLaunch(settings(tmp_path, small_shards, *diverging), 2)
    assert launch.wait() == 2
    (said,) = [line for line in launch.said().splitlines() if "error" in line.lower()]
    assert re.search(r"error: .*in step 3 of a row .*of step 0, is intact; .*start anew by --restart", said)


def test_another_config_is_refused_with_a_diff_and_a_longer_run_wants_extend(tmp_path, small_shards):
    def config(*overrides):
        return small_config(tmp_path / "run", small_shards, "train.steps=4", *overrides)

    goes_on(config())
    refused = ForkedLaunch(config("objective.temperature=0.3", "run.seed=1"), 2)
    assert refused.wait() == 2
    lines = [line for line in refused.said().splitlines() if line]
    assert len(lines) == 1, refused.said()
    assert re.search(
        r"differs in what may not change.*objective\.temperature: 0\.1 -> 0\.3; run\.seed: 0 -> 1", lines[0]
    )
    for error in ranks(2).run(trajectory.pretrain_error, config("train.steps=6")):
        assert "train.steps: 4 -> 6" in error
        assert "--extend makes a run longer" in error
    # A start that is refused takes no number: it would stop a run that is alive.
    assert [path.name for path in (tmp_path / "run" / "incarnations").iterdir()] == ["0001"]
    warned, _ = ranks(2).run(partial(trajectory.pretrain_warnings, config("train.steps=6"), extend=True))
    assert any("extended from 4 to 6 steps: the schedule is stretched" in line for line in warned), warned
    assert last_step(tmp_path / "run") == 6
    goes_on(config("run.seed=1"), restart=True)
    assert len(list(tmp_path.glob("run.before-*"))) == 1


def test_a_short_chaos_run(tmp_path):
    assert chaos.main(["--kills", "1", "--steps", "15", "--seed", "3", "--folder", str(tmp_path)]) == 0
