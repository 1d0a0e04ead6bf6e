"""A step whose loss or gradient is not finite changes nothing: on any rank, under any stage, on a CPU or by a flag."""

import json
import math
import signal
from pathlib import Path

import pytest
import torch

from dist_ssl import checkpoint
from dist_ssl.distributed import World
from dist_ssl.engine import prepare
from dist_ssl.engine.optimizers import LARS
from dist_ssl.training.step import BufferSnapshot
from tests import engines
from tests.faults import inject
from tests.pool import ranks
from tests.trajectory import ledger, losses, small_config


@pytest.mark.parametrize("optimizer", ["adamw", "lars"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_gradient_that_is_not_finite_is_thrown_away(tmp_path, stage, optimizer):
    config = small_config(tmp_path, "", f"engine.zero_stage={stage}", f"optimizer.name={optimizer}")
    for answers in ranks(2).run(engines.poisoned_steps, config, "nan" if stage % 2 else "inf"):
        assert answers["applied"] == [True, False, True]
        assert all(math.isfinite(loss) for loss in answers["losses"])
        first, second, third = (answers[f"after {n}"] for n in (1, 2, 3))
        assert all(torch.equal(second[key], values) for key, values in first.items())
        assert all(values.isfinite().all() for values in third.values())
        assert any(not torch.equal(third[key], values) for key, values in second.items())


def test_the_optimizers_obey_the_flag_that_a_device_sets():
    for build in (LARS, lambda p, lr: torch.optim.AdamW(p, lr=lr, fused=True)):
        flagged, plain = ([torch.nn.Parameter(torch.ones(3, 2))] for _ in range(2))
        optimizers = [build(flagged, 0.1), build(plain, 0.1)]
        for number, value in enumerate((1.0, math.nan, 2.0)):
            for parameters, optimizer in zip((flagged, plain), optimizers, strict=True):
                parameters[0].grad = torch.full((3, 2), value)
                optimizer.found_inf = torch.tensor(float(number == 1))
                if number != 1 or parameters is flagged:
                    optimizer.step()
        assert torch.equal(flagged[0], plain[0])
        states = [optimizer.state[p[0]] for optimizer, p in zip(optimizers, (flagged, plain), strict=True)]
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
        assert not torch.equal(plain[0], torch.ones(3, 2))


def test_buffers_are_put_back_by_the_flag():
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(2))
    snapshot = BufferSnapshot(model)
    for applied in (True, False):
        snapshot.take()
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        for buffer in model.buffers():
            buffer.add_(1).mul_(math.nan if buffer.is_floating_point() and not applied else 1)
        snapshot.put_back_unless(torch.tensor(applied))
        same = [torch.equal(buffer, before[name]) for name, buffer in model.named_buffers()]
        assert same == [not applied] * 6


def test_a_run_skips_them_and_is_not_saved_inside_a_streak(tmp_path, small_shards):
    """Rank 1's gradient is infinite in steps 4 to 6 under a finite loss; a save is due in step 5, and taken in 7."""
    config = small_config(tmp_path / "run", small_shards, "train.steps=8", "checkpoint.every_steps=5")
    assert ranks(2).run(inject.pretrain_with_bad_gradients, config, [4, 5, 6]) == [0, 0]
    found = losses(tmp_path / "run")
    assert len(found) == 8
    assert None not in found
    lines = [json.loads(line) for line in (tmp_path / "run" / "ledger-rank0.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line.get("skipped")] == [4, 5, 6]
    assert checkpoint.committed_steps(checkpoint.checkpoint_store(config)) == [0, 7, 8]


@pytest.mark.slow
@pytest.mark.parametrize("poison", ["gradient", "loss"])
def test_a_stop_in_a_streak_leaves_the_last_good_checkpoint_the_newest(tmp_path, small_shards, poison):
    """SIGTERM while step 7 of a streak from 5 on is under way: exit 75, nothing newer than step 4, and it goes on."""
    config = small_config(tmp_path / "run", small_shards, "train.steps=12", "checkpoint.every_steps=2")
    run = {"gradient": inject.pretrain_with_bad_gradients, "loss": inject.pretrain_with_poison}[poison]
    assert ranks(2).run(run, config, list(range(5, 13)), (7, signal.SIGTERM)) == [75, 75]
    assert checkpoint.committed_steps(checkpoint.checkpoint_store(config))[-1] == 4
    state = checkpoint.read_model_state(checkpoint.open_checkpoint(checkpoint.checkpoint_store(config), 4))
    assert all(tensor.double().isfinite().all() for tensor in state.values())
    assert ranks(2).run(run, config, []) == [0, 0]
    assert len(losses(tmp_path / "run")) == 12
    assert len(ledger(Path(config.run.dir))) == 12


def test_a_run_whose_last_steps_are_lost_says_so(tmp_path, small_shards):
    config = small_config(tmp_path / "run", small_shards, "train.steps=6", "checkpoint.every_steps=2")
    for error in ranks(2).run(inject.error_with_bad_gradients, config, [6]):
        assert "NotFinite: step 6, rank" in error
        assert "the gradient's norm is" in error
        assert "of step 4, is intact" in error


def test_too_many_in_a_row_are_not_forgotten_where_a_save_is_due_next(tmp_path, small_shards):
    """Steps 3 and 4 are lost, one more than may be; step 5 is good, a save is due in it, and it is read with step 4."""
    config = small_config(tmp_path / "run", small_shards, "train.max_skipped_steps=1", "checkpoint.every_steps=5")
    for error in ranks(2).run(inject.error_with_bad_gradients, config, [3, 4]):
        assert "NotFinite: step 4, rank" in error
        assert "in step 2 of a row" in error
    assert checkpoint.committed_steps(checkpoint.checkpoint_store(config)) == [0]


@pytest.mark.parametrize(("precision", "tf32"), [("fp32", False), ("bf16", True)])
def test_tf32_follows_the_precision_in_products_and_convolutions(tmp_path, precision, tf32):
    config = small_config(tmp_path, "", f"engine.precision={precision}", "engine.threads_per_rank=1")
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        prepare(config, World(0, 1, 0, 1, torch.device("cpu")))
        assert torch.backends.cudnn.allow_tf32 is tf32
        assert (torch.get_float32_matmul_precision() == "high") is tf32
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
