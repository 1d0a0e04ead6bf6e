"""The trainer on GPUs: one rank where there is one, two ranks too where there are two. `pytest -m gpu`.

Nothing in here is CUDA's alone: DIST_SSL_GPU_TESTS_ON_CPU=1 runs the same on the CPU, to see that the tests are right.
"""

import os
import signal

import pytest
import torch

from dist_ssl.config import Config
from tests import engines, gpu_trainer, trajectory
from tests.faults.harness import Launch, send
from tests.pool import device_ranks
from tests.test_augment_triton import differences
from tests.trajectory import small_config

ON_CPU = os.environ.get("DIST_SSL_GPU_TESTS_ON_CPU") == "1"
GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not (GPUS or ON_CPU), reason="no CUDA device")]
SIZES = [1, pytest.param(2, marks=pytest.mark.skipif(GPUS < 2 and not ON_CPU, reason="one CUDA device"))]
# On a GPU batch norm's statistics are fp32: see GlobalBatchNorm.
EXACT = 1e-5 if not GPUS else 1e-3


def on(size: int, function, *arguments):
    return device_ranks(size).run(function, *arguments)


def settings(folder, shards, *overrides) -> Config:
    return small_config(folder, shards, "checkpoint.every_steps=2", "train.steps=6", *overrides)


@pytest.mark.parametrize("size", SIZES)
def test_ranks_have_the_device_that_is_meant(size):
    assert on(size, gpu_trainer.device_of) == ["cuda" if GPUS else "cpu"] * size
    assert on(size, gpu_trainer.all_gathered) == [list(range(size))] * size


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("shape", [(33, 24), (9, 16, 7, 5), (16, 64, 28, 28)])
def test_global_batch_norm_is_torchs(size, shape, dtype, tolerance):
    for errors in on(size, gpu_trainer.batch_norm_errors, shape, dtype):
        assert max(errors) <= tolerance


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("optimizer", ["adamw", "lars"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_of_the_engine_is_plain_torchs(tmp_path, small_shards, size, stage, optimizer):
    config = settings(tmp_path, small_shards, f"engine.zero_stage={stage}", f"optimizer.name={optimizer}")
    for loss, movement in on(size, gpu_trainer.one_step, config):
        assert loss <= 1e-6
        # AdamW's first step is the gradient's sign: where that is all rounding, it may go either way.
        assert movement <= (3e-2 if optimizer == "adamw" else EXACT)


@pytest.mark.parametrize("size", SIZES)
def test_gradients_in_chunks_are_those_of_one(tmp_path, small_shards, size):
    whole, chunked = (
        on(size, gpu_trainer.gradient_without_batch_statistics, settings(tmp_path, small_shards, *keys))
        for keys in (["engine.zero_stage=1"], ["engine.zero_stage=1", "objective.chunks=3"])
    )
    for got, expected in zip(chunked, whole, strict=True):
        assert gpu_trainer.relative(got, expected) <= 1e-5


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stage", [1, 3])
def test_a_save_is_of_the_moment_it_began(tmp_path, size, stage):
    config = settings(tmp_path, "", f"engine.zero_stage={stage}", "checkpoint.asynchronous=true")
    assert on(size, gpu_trainer.saved_behind_the_run, config) == [True] * size


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("optimizer", ["adamw", "lars"])
def test_a_nan_is_skipped_on_the_device(tmp_path, small_shards, size, stage, optimizer):
    config = settings(tmp_path, small_shards, f"engine.zero_stage={stage}", f"optimizer.name={optimizer}")
    for applied, untouched in on(size, gpu_trainer.step_with_a_nan_loss, config):
        assert applied == [True, False, True]
        assert untouched
    for answers in on(size, engines.poisoned_steps, config, "inf"):
        assert answers["applied"] == [True, False, True]
        assert all(torch.equal(answers["after 2"][key], values) for key, values in answers["after 1"].items())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "keys", [[], ["engine.precision=bf16"], ["objective.chunks=2"]], ids=["fp32", "bf16", "chunks"]
)
@pytest.mark.parametrize("stage", [0, 1, 2])  # under ZeRO 3 DeepSpeed waits
def test_the_host_waits_for_nothing_in_a_step(tmp_path, small_shards, size, stage, keys):
    workers = [] if ON_CPU else ["data.num_workers=1"]  # which pin memory
    config = settings(tmp_path, small_shards, f"engine.zero_stage={stage}", "optimizer.name=lars", *keys, *workers)
    assert on(size, gpu_trainer.step_that_waits_for_nothing, config) == [6] * size


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_run_in_bf16_is_one_in_fp32_to_rounding(tmp_path, small_shards, size, stage):
    for precision in ("fp32", "bf16"):
        config = settings(
            tmp_path / precision, small_shards, f"engine.precision={precision}", f"engine.zero_stage={stage}"
        )
        assert on(size, trajectory.pretrain, config) == [0] * size
    wide, narrow = (trajectory.losses(tmp_path / precision) for precision in ("fp32", "bf16"))
    assert len(narrow) == 6
    assert narrow != wide
    assert narrow == pytest.approx(wide, rel=2e-2)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_kill_9_and_the_same_command_again_change_no_bit(tmp_path, small_shards, size, precision):
    """In processes of their own, with worker processes, under `deterministic`."""

    def launch(name):
        keys = ["engine.deterministic=true", f"engine.precision={precision}", "data.num_workers=1"]
        return Launch(small_config(tmp_path / name / "run", small_shards, "train.steps=16", *keys), size)

    whole = launch("whole")
    assert whole.wait() == 0, whole.said()
    killed = launch("killed")
    killed.wait_for_step(7)
    send(killed.ranks()[-1:], signal.SIGKILL)
    killed.wait()
    again = launch("killed")
    assert again.wait() == 0, again.said()
    assert trajectory.losses(again.run_dir) == trajectory.losses(whole.run_dir)
    assert trajectory.ledger(again.run_dir) == trajectory.ledger(whole.run_dir)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_augmentation_is_the_cpus(dtype):
    if not GPUS:
        pytest.skip("the kernels are the GPU's; test_augment_triton has them in the interpreter")
    from_cpu, from_alone, channels_last = differences(224, dtype, "cuda")
    assert from_cpu <= (1 / 255 if dtype == "float32" else 2**-6 * 0.23)
    assert from_alone == 0
    assert channels_last
