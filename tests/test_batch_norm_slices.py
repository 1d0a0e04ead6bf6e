"""Batch norm over slices of the global batch: the same on any number of ranks, and nothing is sent beyond a slice."""

import signal
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import batch_norm

from dist_ssl import distributed, engine
from dist_ssl.config import UserError
from dist_ssl.data.manifest import load_manifest
from dist_ssl.data.stream import plan_of
from dist_ssl.models import GlobalBatchNorm, build_model, slices_of
from dist_ssl.planning import estimate
from dist_ssl.planning.before_start import check_config
from dist_ssl.training import verdict
from dist_ssl.training.step import Step
from tests import engines, trajectory
from tests.counting import Count
from tests.faults import inject
from tests.pool import ranks
from tests.test_distributed import on_gpus, slices
from tests.test_trajectory import relative_error
from tests.trajectory import small_config

IMAGES, CHANNELS = 22, 5  # 4 ranks of 2 slices hold 5 or 6 each


def one_layer(count: int, dtype: torch.dtype):
    """(y, dx, dweight, dbias, mean over ranks of both running statistics, collectives) of this rank's rows."""
    torch.manual_seed(0)
    x, g = (3 * torch.randn(2, IMAGES, CHANNELS, 4, 4, dtype=torch.float64) + 10).to(dtype)
    rows = slices(IMAGES, distributed.world_size())
    layer = GlobalBatchNorm(CHANNELS).to(dtype)
    layer.slices = slices_of(count)
    leaf = x.split(rows)[distributed.rank()].clone().requires_grad_()
    with Count() as seen:
        y = layer(leaf)
        y.backward(g.split(rows)[distributed.rank()])
    running = torch.stack([layer.running_mean, layer.running_var])
    running = distributed.sum_over_ranks(running) / distributed.world_size()
    return y.detach(), leaf.grad, layer.weight.grad, layer.bias.grad, *running, seen.collectives


@pytest.mark.parametrize("way", ["cpu", "gpu"])
@pytest.mark.parametrize(("size", "count", "peers"), [(1, 2, 1), (2, 2, 1), (4, 2, 2), (1, 11, 1)])
def test_each_slice_is_normalised_by_torchs_batch_norm(way, size, count, peers):
    dtype = torch.float64 if way == "cpu" else torch.float32
    torch.manual_seed(0)
    x, g = 3 * torch.randn(2, IMAGES, CHANNELS, 4, 4, dtype=torch.float64) + 10
    leaf, weight, bias = x.clone().requires_grad_(), x.new_ones(CHANNELS), x.new_zeros(CHANNELS)
    outputs, running = [], []
    for part in leaf.chunk(count):
        mean, variance = x.new_zeros(CHANNELS), x.new_ones(CHANNELS)
        outputs.append(batch_norm(part, mean, variance, weight.requires_grad_(), bias.requires_grad_(), training=True))
        running.append(torch.stack([mean, variance]))
    torch.cat(outputs).backward(g)
    answers = ranks(size).run(*([on_gpus] if way == "gpu" else []), one_layer, count, dtype)
    found = [torch.cat([a[k] for a in answers]) for k in (0, 1)] + [sum(a[k] for a in answers) for k in (2, 3)]
    expected = [torch.cat(outputs).detach(), leaf.grad, weight.grad, bias.grad]
    tolerance = 1e-9 if way == "cpu" else 1e-5
    for got, want in zip(found, expected, strict=True):
        assert float((got.double() - want).norm() / want.norm()) < tolerance
    for answer in answers:
        running_of_slices = torch.stack(running).mean(dim=0)
        assert torch.allclose(torch.stack(answer[4:6]).double(), running_of_slices, rtol=tolerance, atol=0)
        sent = [("allgather_base", 2 * CHANNELS + 1), ("allreduce", 2 * CHANNELS)] if peers > 1 else []
        assert answer[6] == [(name, numbers * dtype.itemsize) for name, numbers in sent]


@pytest.mark.parametrize(
    ("size", "chunks", "images"),
    [
        (2, 1, 5),
        (4, 1, 10),
        pytest.param(2, 2, 5, marks=pytest.mark.slow),
        pytest.param(4, 2, 5, marks=pytest.mark.slow),
    ],
)
def test_same_loss_and_gradient_on_any_ranks(tmp_path, small_shards, size, chunks, images):
    config = small_config(
        tmp_path, small_shards, f"model.batch_norm_images={images}", f"objective.chunks={chunks}", "run.seed=7"
    )
    ((loss, gradient),) = ranks(1).run(trajectory.loss_and_gradient, config)
    for other_loss, other_gradient in ranks(size).run(trajectory.loss_and_gradient, config):
        assert other_loss == pytest.approx(loss, rel=1e-6)
        assert relative_error(other_gradient, gradient) < 1e-5
    whole = small_config(tmp_path, small_shards, f"objective.chunks={chunks}", "run.seed=7")
    assert loss != ranks(1).run(trajectory.loss_and_gradient, whole)[0][0]


@pytest.mark.slow
def test_running_statistics_are_the_mean_over_slices_and_a_checkpoint_goes_on_elsewhere(tmp_path, small_shards):
    settings = ("model.batch_norm_images=5", "train.steps=6", "checkpoint.every_steps=3", "objective.name=byol")
    one, many = (small_config(tmp_path / name, small_shards, *settings) for name in ("one", "many"))
    assert ranks(1).run(trajectory.pretrain, one) == [0]
    assert ranks(2).run(inject.pretrain_with_signal, many, 3, signal.SIGTERM) == [75, 75]
    assert ranks(4).run(trajectory.pretrain, many) == [0] * 4
    losses, other_losses = (trajectory.losses(tmp_path / name) for name in ("one", "many"))
    state, other_state = (engines.full_state(config, 6) for config in (one, many))
    assert other_losses == pytest.approx(losses, rel=1e-5)
    running = [name for name in state if "running" in name]
    for name in running:
        torch.testing.assert_close(other_state[name], state[name], rtol=1e-3, atol=1e-5)


def sent_in_a_step(config):
    """(collectives, bytes) of this rank."""
    world = distributed.initialize()
    manifest = load_manifest(config.data.shards, config.storage)
    model = engine.initialize(build_model(config), config, world)
    rows = plan_of(config, manifest).rows_per_rank(config.train.global_batch_size, world.size)
    step, batch = Step(config, model, rows), next(trajectory.batches(config, manifest, 1))
    with Count() as seen:
        agreed = model.step(0.0, verdict.agree(step(batch, 0).loss, verdict.Asked()))
        step.settle(agreed.finite, 0.0)
    return len(seen.collectives), seen.wire_bytes(world.size)


def test_only_running_statistics_leave_a_rank_that_holds_whole_slices(tmp_path, small_shards):
    whole, sliced = (
        small_config(tmp_path, small_shards, "engine.zero_stage=0", *more)
        for more in ((), ("model.batch_norm_images=10",))
    )
    for before, after in zip(*(ranks(2).run(sent_in_a_step, config) for config in (whole, sliced)), strict=True):
        sizes = replace(estimate.Sizes.of(sliced, 2, measure=False), moment_bytes=8)
        layers = len(sizes.batch_norm_channels)
        assert before[0] - after[0] == 2 * layers - 1
        for (_, sent), config in zip((before, after), (whole, sliced), strict=True):
            assert sent == pytest.approx(estimate.wire(config, sizes)[-1].value, rel=0.02)
        assert after[1] < before[1]


def test_ranks_that_do_not_fit_the_slices_are_one_line(tmp_path, small_shards):
    config = small_config(tmp_path, small_shards, "model.batch_norm_images=5")
    for fitting in (1, 2, 4, 8):
        check_config(config, fitting)
    with pytest.raises(UserError, match=r"3 ranks can't share 4 slices of 5 images evenly; take 2 or 4 ranks"):
        check_config(config, 3)
    with pytest.raises(UserError, match=r"model\.batch_norm_images: expected a divisor of .* = 20, got 6"):
        small_config(tmp_path, small_shards, "model.batch_norm_images=6")
    with pytest.raises(UserError, match=r"= 20 / 2, got 4"):
        small_config(tmp_path, small_shards, "model.batch_norm_images=4", "objective.chunks=2")
