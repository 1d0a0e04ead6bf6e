"""Gradients that are reduced while backward still runs, as on GPUs: the contracts hold, and backward does not wait.

On a CPU the reductions themselves don't overlap; their order, buckets and ranges are those of a GPU.
"""

import signal

import pytest
import torch

from dist_ssl import engine
from dist_ssl.config import Config
from dist_ssl.planning import estimate
from tests import engines, trajectory
from tests.engines import overlapped
from tests.faults import inject
from tests.pool import ranks
from tests.test_trajectory import relative_error
from tests.trajectory import small_config

STEPS = 6
CASES = [(2, 1, 1), *(pytest.param(*c, marks=pytest.mark.slow) for c in [(3, 1, 1), (3, 2, 1), (2, 2, 3), (2, 3, 1)])]


def settings(folder, shards, stage, *overrides):
    return small_config(folder, shards, f"engine.zero_stage={stage}", f"train.steps={STEPS}", *overrides)


@pytest.mark.parametrize(("size", "stage", "chunks"), CASES)
def test_same_loss_and_gradient_from_equal_weights(tmp_path, small_shards, size, stage, chunks):
    shared = [f"objective.chunks={chunks}", "run.seed=7"]
    one = settings(tmp_path, small_shards, 0, *shared)
    ((loss, gradient),) = ranks(1).run(trajectory.loss_and_gradient, one)
    many = settings(tmp_path, small_shards, stage, *shared)
    for other_loss, other_gradient in ranks(size).run(overlapped, trajectory.loss_and_gradient, many):
        assert other_loss == pytest.approx(loss, rel=1e-6)
        assert relative_error(other_gradient, gradient) < 1e-5


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.slow
def test_a_stop_and_a_resume_change_no_bit(tmp_path, small_shards, stage):
    whole, stopped = (settings(tmp_path / name, small_shards, stage) for name in ("whole", "stopped"))
    assert ranks(2).run(overlapped, trajectory.pretrain, whole) == [0, 0]
    assert ranks(2).run(overlapped, inject.pretrain_with_signal, stopped, 4, signal.SIGTERM) == [75, 75]
    assert ranks(2).run(overlapped, trajectory.pretrain, stopped) == [0, 0]
    assert trajectory.losses(tmp_path / "stopped") == trajectory.losses(tmp_path / "whole")
    found, expected = (engines.full_state(config, STEPS) for config in (stopped, whole))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


@pytest.mark.parametrize(("stage", "poison"), [(1, "nan"), (2, "inf")])
def test_a_gradient_that_is_not_finite_is_thrown_away(tmp_path, stage, poison):
    config = settings(tmp_path, "", stage, "optimizer.name=lars")
    for answers in ranks(2).run(overlapped, engines.poisoned_steps, config, poison):
        assert answers["applied"] == [True, False, True]
        assert all(torch.equal(answers["after 2"][key], values) for key, values in answers["after 1"].items())


@pytest.mark.parametrize("stage", [1, 2])
def test_most_is_reduced_before_backward_ends(tmp_path, stage):
    config = settings(tmp_path, "", stage)
    assert min(ranks(2).run(overlapped, engines.reduced_before_the_first_layer, config)) > 0.5
    assert max(ranks(2).run(engines.reduced_before_the_first_layer, config)) == 0


@pytest.mark.parametrize("stage", [1, 2])
def test_no_host_waits_after_backward(tmp_path, stage):
    (said, _) = ranks(2).run(overlapped, engines.waits_of_the_epilogue, settings(tmp_path, "", stage))
    assert "the host waits" not in said
    assert said[-1] == "backward waits for reduction"


def test_buckets_are_small_where_they_overlap_and_hold_the_largest_parameter():
    def zero(*sizes, **raw):
        values = {"engine": {"deepspeed": {"zero_optimization": raw}} if raw else {}, "train": {"steps": 1}}
        return engine.deepspeed_config(Config.model_validate(values), *sizes)["zero_optimization"]

    small = estimate.OVERLAPPED_BUCKET
    assert (zero(10**8)["reduce_bucket_size"], zero(10**8)["overlap_comm"]) == (estimate.BUCKET, False)
    assert zero(10**8, 10**6, True)["reduce_bucket_size"] == small
    assert zero(10**8, 10**7, True)["reduce_bucket_size"] == 10**7
    assert zero(10**5, 10**3, True)["reduce_bucket_size"] == 10**5
    assert zero(10**8, 8192**2, True)["reduce_bucket_size"] == 8192**2  # a layer of VICReg's and Barlow Twins' heads
    assert zero(10**8, 10**6, True)["overlap_comm"] is True
    assert zero(10**8, 10**6, True, overlap_comm=False)["overlap_comm"] is False
