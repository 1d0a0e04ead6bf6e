"""Contract C1: what is computed depends on config and seed, not on ranks, ZeRO stage, or how it is chunked."""

import itertools

import pytest
import torch

from dist_ssl.training.step import dropping_seed
from tests import trajectory
from tests.pool import ranks
from tests.trajectory import small_config

STEPS = 12  # the third epoch begins in the tenth

# (W, stage) of whole runs: which samples a step has depends on W alone, and each stage steps on two ranks or three.
RUNS = [(2, 1), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(1, 3), (3, 0), (3, 2), (2, 3)])]
# (W, stage, chunks) of single steps: each W with each stage, and each of both with and without chunks.
GRADIENTS = [(size, stage, 1 if (size + stage) % 2 else 3) for size, stage in itertools.product((1, 2, 3), range(4))]
GRADIENTS = [case if case[:2] == (2, 1) else pytest.param(*case, marks=pytest.mark.slow) for case in GRADIENTS]


@pytest.fixture(scope="module")
def reference(tmp_path_factory, small_shards):
    """One rank, ZeRO 0: losses and ledger of AdamW at 1e-5."""
    run_dir = tmp_path_factory.mktemp("reference")
    config = small_config(run_dir, small_shards, "engine.zero_stage=0", f"train.steps={STEPS}")
    assert ranks(1).run(trajectory.pretrain, config) == [0]
    return trajectory.losses(run_dir), trajectory.ledger(run_dir), run_dir


@pytest.mark.parametrize(("size", "stage"), RUNS)
def test_same_samples_and_losses(tmp_path, small_shards, reference, size, stage):
    config = small_config(tmp_path, small_shards, f"engine.zero_stage={stage}", f"train.steps={STEPS}")
    assert ranks(size).run(trajectory.pretrain, config) == [0] * size
    losses, ledger, one = reference
    assert trajectory.ledger(tmp_path) == ledger
    assert len(losses) == STEPS
    assert trajectory.losses(tmp_path) == pytest.approx(losses, rel=1e-4)
    assert losses[0] != losses[-1]
    # The last step is measured; its gradient is that of weights that rounding has moved a little by then.
    assert trajectory.gradient_norm(tmp_path) == pytest.approx(trajectory.gradient_norm(one), rel=1e-3)


def relative_error(gradient, expected):
    assert gradient.keys() == expected.keys()
    difference = torch.cat([(gradient[name] - expected[name]).view(-1) for name in expected])
    return float(difference.norm() / torch.cat([g.view(-1) for g in expected.values()]).norm())


@pytest.mark.parametrize(("size", "stage", "chunks"), [(2, 1, 3), *GRADIENTS])
def test_same_loss_and_gradient_from_equal_weights(tmp_path, small_shards, size, stage, chunks):
    # Seed 7: with batch-norm statistics in fp32 a ReLU is turned over there, which moves the gradient by 5e-4.
    shared = [f"objective.chunks={chunks}", "run.seed=7"]
    one = small_config(tmp_path, small_shards, "engine.zero_stage=0", *shared)
    ((loss, gradient),) = ranks(1).run(trajectory.loss_and_gradient, one)
    many = small_config(tmp_path, small_shards, f"engine.zero_stage={stage}", *shared)
    for other_loss, other_gradient in ranks(size).run(trajectory.loss_and_gradient, many):
        assert other_loss == pytest.approx(loss, rel=1e-6)
        assert relative_error(other_gradient, gradient) < 1e-5


@pytest.mark.slow
def test_whole_computation_in_fp64(tmp_path, small_shards):
    config = small_config(tmp_path, small_shards, "train.steps=8")  # into the second epoch
    (expected,) = ranks(1).run(trajectory.fp64_losses, config)
    for size in (2, 3):
        for losses in ranks(size).run(trajectory.fp64_losses, config):
            assert losses == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("stage", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_activation_checkpointing_is_exact(tmp_path, small_shards, stage):
    config = small_config(tmp_path, small_shards, f"engine.zero_stage={stage}")
    recomputing = small_config(
        tmp_path, small_shards, f"engine.zero_stage={stage}", "model.activation_checkpointing=true"
    )
    first = ranks(2).run(trajectory.loss_and_gradient, config)[0]
    second = ranks(2).run(trajectory.loss_and_gradient, recomputing)[0]
    assert first[0] == second[0]
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


def test_no_two_seeds_steps_chunks_or_ranks_drop_alike():
    counters = [counter for length in (3, 4) for counter in itertools.product(range(4), repeat=length)]
    seeds = {dropping_seed(*counter) for counter in counters}
    assert len(seeds) == len(counters)
    assert max(seeds) < 2**63
