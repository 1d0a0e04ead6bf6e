"""bf16 (the default precision), `deterministic` and `compile`, from the first step through a stop and a resume."""

import os
import shutil
import signal

import pytest
import torch

from tests import trajectory
from tests.faults import inject
from tests.pool import ranks
from tests.trajectory import small_config

STEPS = 6
MODES = {
    "fp32": [],
    "bf16": ["engine.precision=bf16", "engine.zero_stage=3"],
    "deterministic": ["engine.deterministic=true", "engine.zero_stage=2"],
    "compile": ["engine.compile=true"],
}
needs_a_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")
COMPILE = (pytest.mark.slow, needs_a_compiler)  # 40 s of a core for each rank, on a fresh machine


def in_mode(function, *arguments):
    """Run it on this rank; whether torch was deterministic at its end, which no later test may notice."""
    try:
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


@pytest.mark.parametrize(
    "mode", [pytest.param("bf16", marks=pytest.mark.slow), "deterministic", pytest.param("compile", marks=COMPILE)]
)
def test_a_stop_and_a_resume_change_no_bit(tmp_path, small_shards, curve, mode):
    config = settings(tmp_path, small_shards, mode)
    stopped = ranks(2).run(in_mode, inject.pretrain_with_signal, config, 4, signal.SIGTERM)
    assert [code for code, _ in stopped] == [75, 75]
    assert 3 <= len(trajectory.losses(tmp_path)) < STEPS
    assert [code for code, _ in ranks(2).run(in_mode, trajectory.pretrain, config)] == [0, 0]
    assert trajectory.losses(tmp_path) == curve(mode)
    assert len(curve(mode)) == STEPS


@pytest.mark.parametrize(
    ("mode", "rounding"), [("bf16", 2e-2), ("deterministic", 1e-5), pytest.param("compile", 1e-4, marks=COMPILE)]
)
def test_losses_are_those_of_plain_fp32_to_rounding(curve, mode, rounding):
    assert curve(mode) == pytest.approx(curve("fp32"), rel=rounding, abs=0)
    assert mode == "deterministic" or curve(mode) != curve("fp32")  # they do compute otherwise
