"""dist-ssl plan: its predictions against what real ranks hold, send, and write."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import time
from pathlib import Path

import pytest
import torch

from dist_ssl import checkpoint, distributed, engine, objective
from dist_ssl import config as configuration
from dist_ssl.checkpoint import Checkpointer, RunState, take_incarnation
from dist_ssl.config import Config
from dist_ssl.data.manifest import Manifest, Shard, load_manifest
from dist_ssl.data.stream import rank_streams, training_batches
from dist_ssl.models import build_model
from dist_ssl.planning import counts, estimate, stages
from dist_ssl.training import verdict
from tests.counting import Count, wire_bytes
from tests.pool import ranks

BATCH = 16
MULTI_CROP = "[{count=2},{count=6,crop_size=16}]"
IMAGENET = Path(__file__).parent.parent / "configs" / "simclr_resnet50_imagenet.toml"


def config_of(*overrides: str) -> Config:
    tiny = [
        "engine.precision=fp32",
        "model.encoder=resnet_tiny",
        "augment.crop_size=32",
        f"train.global_batch_size={BATCH}",
    ]
    head = ["model.head.hidden_dim=64", "model.head.output_dim=32"]
    return configuration.with_overrides(Config(), [*tiny, *head, *overrides])


def one_step(model: engine.Engine, config: Config) -> None:
    world, chunks = distributed.world_size(), config.objective.chunks
    n = BATCH // world
    parts = [[torch.randn(n // chunks * v, 3, side, side) for side, v in config.augment.sizes()] for _ in range(chunks)]
    with torch.set_grad_enabled(chunks == 1):
        z = torch.cat([model(*part)[1] for part in parts])
    leaf = z.detach().requires_grad_()
    loss = objective.nt_xent_views(leaf.unflatten(0, (n, -1)), 0.1, rows_per_rank=[n] * world)
    (gradient,) = torch.autograd.grad(loss, leaf)
    for part, slope in zip(parts, gradient.chunk(chunks), strict=True):
        model.backward(((z if chunks == 1 else model(*part)[1]) * slope).sum())
    model.step(1e-3, verdict.agree(loss.detach(), verdict.Asked()))


def live_bytes() -> int:
    """Of all tensors of this process, each storage once."""
    gc.collect()
    storages = {}
    for held in gc.get_objects():
        if type(held) is torch.Tensor or type(held) is torch.nn.Parameter:
            with contextlib.suppress(RuntimeError):  # of what a compilation traced, which has no storage
                storages[held.untyped_storage().data_ptr()] = held.untyped_storage().nbytes()
    return sum(storages.values())


def measure(settings: list[str], directory: str) -> tuple[int, int, int, int]:
    """(bytes held between steps, collectives and bytes sent in a step, bytes of a checkpoint) of this rank and run."""
    before = live_bytes()
    config = config_of(*settings, f"run.dir={json.dumps(directory)}")
    model = engine.initialize(build_model(config), config, distributed.initialize())
    one_step(model, config)
    one_step(model, config)
    held = live_bytes() - before
    with Count() as count:
        one_step(model, config)
    world = distributed.world_size()
    sent = wire_bytes(count.collectives, world)
    if distributed.rank() == 0:
        take_incarnation(directory)
    distributed.gather_objects(None)
    store = checkpoint.checkpoint_store(config)
    writer = Checkpointer(store, directory, config.checkpoint, model, 1)
    writer.save(RunState(3, 0, configuration.dumps(config), ""), dict(model.model.named_buffers()))
    writer.wait()
    files = Path(store.url(checkpoint.step_name(3))).rglob("*.safetensors")
    return held, len(count.collectives), sent, sum(file.stat().st_size for file in files)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        (0, ["optimizer.name=adamw"]),
        (1, ["optimizer.name=lars"]),
        (2, ["optimizer.name=adamw"]),
        (3, ["optimizer.name=lars"]),
        (0, ["optimizer.name=lars", "objective.chunks=2"]),
        (1, ["optimizer.name=adamw", "objective.chunks=2"]),
        (2, ["optimizer.name=lars", "objective.chunks=2"]),
        (1, ["optimizer.name=lars", f"augment.views={MULTI_CROP}"]),
    ],
)
def test_predictions_are_what_two_ranks_measure(stage, settings, tmp_path):
    settings = [f"engine.zero_stage={stage}", *settings]
    config = config_of(*settings)
    sizes = dataclasses.replace(estimate.Sizes.of(config, 2, measure=False), moment_bytes=8)
    state = estimate.state_bytes(sizes, stage).value
    wire = estimate.wire(config, sizes)[-1].value
    written = estimate.checkpoint(config, sizes)[0].value
    called = counts.collectives(config, sizes)[-1].value
    for held, collectives, sent, file_bytes in ranks(2).run(measure, settings, str(tmp_path)):
        assert held == pytest.approx(state, rel=0.05)
        assert collectives == pytest.approx(called, rel=0.05), (stage, settings)
        assert sent == pytest.approx(wire, rel=0.02)
        assert file_bytes == pytest.approx(written, rel=0.05)  # and its headers


def test_counts_at_a_thousand_ranks():
    config = configuration.load(IMAGENET, ["train.global_batch_size=4096"])
    sizes = estimate.Sizes.of(config, 8, measure=False, num_classes=21_000)
    few, many = (
        {c.name: c.value for c in counts.counts(config, dataclasses.replace(sizes, ranks=w))} for w in (8, 1024)
    )
    layers = len(sizes.batch_norm_channels)
    assert few["batch norm: collectives"] == 2 * layers
    of_64 = sum(each == 64 for each in sizes.batch_norm_channels)  # 0.5 MB by a gather on a GPU
    assert many["batch norm: collectives"] == 3 * layers - of_64, "reductions, which send less than gathers of so many"
    assert many["batch norm: sent"] < 1.4e6 + of_64 * 0.53e6
    assert sum((2 * each + 1) * 4 * 1023 for each in sizes.batch_norm_channels) > 225e6, "what gathers would"
    assert few["online probe: collectives"] == many["online probe: collectives"] == 3
    assert many["online probe: sent"] < 36e6
    assert many["files of a checkpoint"] == 1026
    sliced = configuration.load(IMAGENET, ["train.global_batch_size=4096", "model.batch_norm_images=256"])
    for ranks_, each in ((8, 0), (16, 0), (1024, 2)):
        found = counts.collectives(sliced, dataclasses.replace(sizes, ranks=ranks_))
        (norms,) = (part.value for part in found if part.name == "batch norm")
        assert norms == each * layers + 1


@pytest.mark.slow
def test_the_stage_that_is_recommended_fits_and_waits_least():
    def of(ranks, *overrides, gigabytes=80):
        config = configuration.load(IMAGENET, overrides)
        found = stages.stages(config, estimate.Sizes.of(config, ranks, measure=False))
        best = stages.recommended(found, gigabytes * 1e9)
        return None if best is None else best.zero_stage, found

    assert of(1)[0] == 0  # nobody to send to: the least memory
    best, (zero, one, two, three) = of(64)
    assert best == 1
    assert one.exposed_bytes == two.exposed_bytes == pytest.approx(zero.exposed_bytes / 2) == one.sent_bytes / 3
    assert three.host_waits
    assert not zero.host_waits
    best, (_, one, two, _) = of(64, "objective.chunks=8")
    assert best == 2  # which reduces behind each chunk's backward, and sends more
    assert two.sent_bytes == pytest.approx(17 / 3 * one.sent_bytes)
    assert one.exposed_bytes == one.sent_bytes
    assert of(64, gigabytes=0.01)[0] is None
    assert [stage.zero_stage for stage in of(64, "objective.name=byol")[1]] == [0, 1, 2]  # with a teacher not 3
    sized = [stage.memory_bytes for stage in of(64, "model.encoder=vit_b_16", "optimizer.name=adamw")[1]]
    assert of(64, "model.encoder=vit_b_16", "optimizer.name=adamw", gigabytes=1.2 * min(sized) / 1e9)[0] is not None


def test_activations_are_linear_in_the_batch_and_half_in_bf16_or_recomputed():
    plain = estimate.activation_bytes(build_model(config_of()), config_of())
    bigger = config_of("augment.crop_size=64")
    assert estimate.activation_bytes(build_model(bigger), bigger) == pytest.approx(4 * plain, rel=0.05)
    each = [config_of(f"augment.views={views}") for views in ("[{count=6,crop_size=16}]", MULTI_CROP)]
    small, both = (estimate.activation_bytes(build_model(config), config) for config in each)
    assert both == pytest.approx(plain + small, rel=0.05)
    recomputed = config_of("model.activation_checkpointing=true")
    assert estimate.activation_bytes(build_model(recomputed), recomputed) < 0.6 * plain


@pytest.mark.parametrize("views", ["[]", MULTI_CROP])
def test_the_shared_memory_is_what_workers_hold(small_shards, views):
    """Crops that two real workers have ready before the first is taken, by the blocks of their open segments."""
    keys = [f"data.shards={json.dumps(str(small_shards))}", "data.num_workers=2", "data.prefetch_batches=2"]
    config = config_of(*keys, f"augment.views={views}")
    sizes = len(config.augment.sizes())
    manifest = load_manifest(config.data.shards, config.storage)
    at = {"cursor": 0, "first_step": 0, "num_steps": 9, "rank": 0, "world_size": 1}
    with training_batches(config, manifest, **at) as batches:
        held, deadline = {}, time.monotonic() + 60
        while len(held) < 4 * sizes and time.monotonic() < deadline:
            time.sleep(0.2)
            held = shared_segments([worker.pid for worker in batches._iterator._workers], at_least=BATCH * 3 * 32 * 32)
    assert len(held) == config.data.num_workers * config.data.prefetch_batches * sizes
    with_those_in_hand = 2 * sum(held.values())  # four batches ahead, four in hand
    assert estimate.shared_memory(config, 1, 1).value == pytest.approx(with_those_in_hand, rel=0.05)


def shared_segments(pids: list[int], at_least: int) -> dict[int, int]:
    """Inode -> bytes, of the shared memory that these processes hold open."""
    found = {}
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if os.readlink(link).startswith("/dev/shm/torch"):
                    found[os.stat(link).st_ino] = os.stat(link).st_size
    return {inode: size for inode, size in found.items() if size >= at_least}


def test_the_working_set_is_that_of_the_stream():
    """The estimate's closed form against the stream's own list of a rank's shards' streams."""
    for streams, num_ranks in ((16, 2), (16, 8), (64, 512), (10, 4), (16, 16)):
        config = config_of(f"data.streams={streams}", "train.global_batch_size=4096")
        shards = [Shard(f"s3://b/{i:06d}.tar", f"s3://b/{i:06d}.index", 1000, 10, 0) for i in range(4 * streams)]
        manifest = Manifest("s3://b", tuple(shards))
        predicted = estimate.data(config, manifest, num_ranks, num_ranks, None)[0].value
        block = min(config.data.block_shards, -(-len(shards) // streams) + 1)
        worst = max(len(rank_streams(config, rank, num_ranks)) for rank in range(num_ranks))
        assert predicted == min(worst * block * 1000, 4000 * streams), (streams, num_ranks)


@pytest.mark.slow
def test_a_plan_for_512_gpus_and_a_billion_images():
    config = configuration.load(IMAGENET, ["train.global_batch_size=65536", "train.epochs=10", "engine.zero_stage=1"])
    found = {p.name: p for p in estimate.of_run(config, 64, 8, None, 1_000_000_000, 1000.0, 100.0)}
    assert found["steps"].value == -(-10 * 1_000_000_000 // 65536)
    assert found["hours"].value == pytest.approx(10 * 1e9 / (512 * 1000) / 3600, rel=1e-3)
    assert found["z and its log-sum-exps"].value == pytest.approx((4 * 131072 * 129 + 8 * 65536) * 511 / 512)
    assert all(one.formula for one in found.values())


def test_numbers_read_well():
    assert estimate.shown(estimate.Estimate("", 1_572_864_000, "bytes", "")) == "1.57 GB"
    assert estimate.shown(estimate.Estimate("", 2.5e9, "bytes/s", "")) == "2.5 GB/s"
    assert estimate.shown(estimate.Estimate("", 31279, "", "")) == "31,279"
    assert estimate.shown(estimate.Estimate("", 0.0853, "s", "")) == "0.0853 s"
