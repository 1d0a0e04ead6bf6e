"""bf16 (the default precision), `deterministic` and `compile`, from the first step through a stop and a resume."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from dist_ssl import checkpoint
from tests import trajectory
from tests.faults import inject
from tests.pool import ranks
from tests.trajectory import small_config

STEPS = 6
MODES = {
    "fp32": [],
    "bf16": ["engine.precision=bf16", "engine.zero_stage=3"],
    "deterministic": ["engine.deterministic=true", "engine.zero_stage=2"],
    "compile": ["engine.compile=true", "model.activation_checkpointing=true"],
}


def in_mode(function, *arguments):
    """Run it on this rank; whether torch was deterministic at its end, which no later test may notice.

    What is compiled is not vectorised: each of 55 kernels takes g++ half as long.
    """
    from torch._inductor import config as inductor

    try:
        with inductor.patch({"cpp.simdlen": 1}):
            return function(*arguments), torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


@pytest.fixture(scope="module")
def curve(tmp_path_factory, small_shards):
    """Mode -> the losses of a run that nobody stopped; each run is made once."""
    found = {}

    def of(mode):
        if mode not in found:
            folder = tmp_path_factory.mktemp(mode)
            config = settings(folder, small_shards, mode)
            codes = ranks(2).run(in_mode, trajectory.pretrain, config)
            assert codes == [(0, mode == "deterministic")] * 2
            found[mode] = trajectory.losses(folder)
        return found[mode]

    return of


def settings(folder, shards, mode):
    return small_config(folder, shards, f"train.steps={STEPS}", *MODES[mode])


def stopped_and_resumed(config):
    """The losses of a run that is stopped before its fourth step and started again."""
    stopped = ranks(2).run(in_mode, inject.pretrain_with_signal, config, 4, signal.SIGTERM)
    assert [code for code, _ in stopped] == [75, 75]
    assert 3 <= len(trajectory.losses(Path(config.run.dir))) < STEPS
    assert [code for code, _ in ranks(2).run(in_mode, trajectory.pretrain, config)] == [0, 0]
    found = trajectory.losses(Path(config.run.dir))
    assert len(found) == STEPS
    return found


@pytest.mark.parametrize("mode", [pytest.param("bf16", marks=pytest.mark.slow), "deterministic"])
def test_a_stop_and_a_resume_change_no_bit(tmp_path, small_shards, curve, mode):
    assert stopped_and_resumed(settings(tmp_path, small_shards, mode)) == curve(mode)


@pytest.mark.parametrize(
    ("mode", "rounding"), [pytest.param("bf16", 2e-2, marks=pytest.mark.slow), ("deterministic", 1e-5)]
)
def test_losses_are_those_of_plain_fp32_to_rounding(curve, mode, rounding):
    assert curve(mode) == pytest.approx(curve("fp32"), rel=rounding, abs=0)
    assert mode == "deterministic" or curve(mode) != curve("fp32")  # they do compute otherwise


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")
def test_a_compiled_run_is_stopped_and_resumed_and_counts_recomputed_blocks_once(tmp_path, small_shards, curve):
    """40 s of a core for each rank, on a fresh machine."""
    config = settings(tmp_path, small_shards, "compile")
    found = stopped_and_resumed(config)
    assert found == pytest.approx(curve("fp32"), rel=1e-4, abs=0)
    assert found != curve("fp32")
    state = checkpoint.load_run(tmp_path)[2].state_dict()
    assert {int(count) for name, count in state.items() if "num_batches" in name} == {STEPS}
