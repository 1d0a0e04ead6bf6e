"""What `test_gpu_trainer.py` runs on each rank: on its GPU, or on the CPU where there is none."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from dist_ssl import checkpoint, distributed, engine
from dist_ssl import config as config_module
from dist_ssl.checkpoint import Checkpointer, RunState, take_incarnation
from dist_ssl.config import Config
from dist_ssl.data.manifest import load_manifest
from dist_ssl.data.quarantine import Quarantine
from dist_ssl.data.stream import plan_of, training_batches
from dist_ssl.engine.optimizers import build_optimizer
from dist_ssl.models import GlobalBatchNorm, build_model
from dist_ssl.training import verdict
from dist_ssl.training.feed import Feed
from dist_ssl.training.step import Step
from tests import engines


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double().cpu() - want.double().cpu()).norm() / want.double().cpu().norm())


def batch_norm_errors(shape: tuple[int, ...], dtype: torch.dtype) -> list[float]:
    """This rank's y, dx, running statistics and the ranks' summed dweight, against torch's on all ranks' rows."""
    device, world = distributed.initialize().device, distributed.world_size()
    generator = torch.Generator().manual_seed(0)
    x, residual, dy = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    residual = 8 * residual.sign()  # so that no rounding turns a ReLU over
    ours, theirs = GlobalBatchNorm(shape[1]).to(device), nn.BatchNorm2d(shape[1])
    for norm in (ours, theirs):
        nn.init.constant_(norm.weight, 1.5)
        nn.init.constant_(norm.bias, 0.25)
    theirs.double()
    wide, added = x.double().requires_grad_(), residual.double()
    y = F.relu(theirs(wide.reshape(*shape, *[1] * (4 - len(shape)))).view(shape) + added)
    y.backward(dy.double())
    rows = slice(shape[0] * distributed.rank() // world, shape[0] * (distributed.rank() + 1) // world)
    mine, given, slope = (t[rows].to(device) for t in (x, residual, dy))
    if len(shape) == 4:
        mine, given, slope = (t.contiguous(memory_format=torch.channels_last) for t in (mine, given, slope))
    mine.requires_grad_()
    got = ours(mine, given, relu=True)
    got.backward(slope)
    dweight = distributed.sum_over_ranks(ours.weight.grad.clone())
    pairs = [(got, y[rows]), (mine.grad, wide.grad[rows]), (dweight, theirs.weight.grad)]
    pairs += [(ours.running_mean, theirs.running_mean), (ours.running_var, theirs.running_var)]
    return [relative(a.detach(), b.detach()) for a, b in pairs]


class Plain:
    """What `Step` calls an engine, without DeepSpeed."""

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self, *views: Tensor) -> Any:
        return self.model(*views)

    def backward(self, loss: Tensor) -> None:
        loss.backward()


def _step_of(config: Config, model: Any) -> tuple[Step, Any]:
    """The step, and a feed of this rank's batches."""
    world, manifest = distributed.initialize(), load_manifest(config.data.shards, config.storage)
    plan = plan_of(config, manifest)
    rows = plan.rows_per_rank(config.train.global_batch_size, world.size, config.objective.chunks)
    at = {"cursor": 0, "first_step": 0, "num_steps": config.train.steps, "rank": world.rank, "world_size": world.size}
    batches = training_batches(config, manifest, **at)
    return Step(config, model, rows), Feed(batches, Quarantine(config.run.dir, config.data, 1), world.device)


def one_step(config: Config) -> tuple[float, float]:
    """A step of the engine against plain torch on the same ranks: how far the loss and the movement of weights are."""
    world = distributed.initialize()
    engine.prepare(config, world)
    plain = build_model(config).to(world.device)
    before = {name: p.detach().clone() for name, p in plain.named_parameters()}
    model = engine.initialize(build_model(config), config, world)
    step, feed = _step_of(config, model)
    batch = feed.next()
    result = step(batch, 0)
    model.step(1e-3, verdict.agree(result.loss, verdict.Asked()))

    expected = _step_of(config, Plain(plain))[0](batch, 0)
    for p in plain.parameters():
        p.grad = distributed.sum_over_ranks(p.grad) / world.size
    optimizer = build_optimizer(plain, config.optimizer)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    optimizer.step()
    gathered = distributed.gather_objects({key: t.cpu() for key, t in engines.held(model).items()})
    whole = gathered[:1] if model.fragments[0].replicated else gathered
    found = engines.assembled(whole)
    moved = {name: p.detach() - before[name] for name, p in plain.named_parameters()}
    got = torch.cat([found[name, "master"] - before[name].view(-1).cpu() for name in moved])
    return relative(result.loss, expected.loss), relative(got, torch.cat([m.view(-1) for m in moved.values()]))


def gradient_without_batch_statistics(config: Config) -> Tensor:
    """The averaged gradient of a step whose batch norm takes its running statistics, so that chunks are no batches."""
    world = distributed.initialize()
    engine.prepare(config, world)
    model = engine.initialize(build_model(config), config, world)
    model.model.eval()
    step, feed = _step_of(config, model)
    kept: dict[tuple[str, int], Tensor] = {}

    def keep(*_: Any, **__: Any) -> None:  # called once a group
        for f in model.fragments:
            if f.flat.grad is not None:
                kept[f.name, f.offset] = f.of(f.flat.grad).cpu()

    model._apply = keep  # type: ignore[method-assign]
    result = step(feed.next(), 0)
    model.step(0.0, verdict.agree(result.loss, verdict.Asked()))
    return torch.cat([kept[key] for key in sorted(kept)])


def saved_behind_the_run(config: Config) -> bool:
    """Whether a checkpoint holds what was there when its save began, though steps were taken while it was written."""
    model, device = engines.build(config), distributed.initialize().device
    optimizer_step(model, device)
    incarnation = distributed.broadcast_object(take_incarnation(config.run.dir) if distributed.rank() == 0 else None)
    store = checkpoint.checkpoint_store(config)
    checkpointer = Checkpointer(store, config.run.dir, config.checkpoint, model, incarnation)
    then = engines.held(model)
    checkpointer.save(RunState(1, 4, config_module.dumps(config), "data"), dict(model.model.named_buffers()))
    for _ in range(3):
        optimizer_step(model, device)
    checkpointer.wait()
    now = engines.held(model)
    again = engines.build(config)
    found = checkpoint.newest_valid(store)
    assert found is not None
    checkpoint.load(found, again)
    loaded = engines.held(again)
    moved = any(not torch.equal(now[key], values) for key, values in then.items())
    return moved and all(torch.equal(loaded[key], values) for key, values in then.items())


def optimizer_step(model: engine.Engine, device: torch.device) -> None:
    h, z, _ = model(torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(device))
    loss = (h.square().mean() + z.square().mean()).float()
    model.backward(loss)
    model.step(0.01, verdict.agree(loss.detach(), verdict.Asked()))


def step_with_a_nan_loss(config: Config) -> tuple[list[bool], bool]:
    """Which of three steps were applied, the second's loss being NaN on the last rank, and whether it changed anything.

    "Anything" is weights, optimizer state and batch norm's statistics.
    """
    world = distributed.initialize()
    model = engines.build(config)
    step, feed = _step_of(config, model)
    applied, held = [], []
    for number in range(3):
        bad = float("nan") if number == 1 and world.rank == world.size - 1 else 1.0
        hook = model.model.register_forward_hook(lambda module, given, out, bad=bad: (*out[:2], out[2] * bad))
        result = step(feed.next(), number)
        hook.remove()
        decided = model.step(1e-3, verdict.agree(result.loss, verdict.Asked()))
        step.settle(decided.finite, 0.0)
        applied.append(verdict.read(decided).finite)
        buffers = {(name, "buffer", 0): b.clone() for name, b in model.model.named_buffers()}
        held.append(engines.held(model) | buffers)
    return applied, all(torch.equal(held[1][key], values) for key, values in held[0].items())


def step_that_waits_for_nothing(config: Config) -> int:
    """How many unlogged steps were taken under CUDA's debug mode, in which a wait of the host raises."""
    world = distributed.initialize()
    engine.prepare(config, world)
    model = engine.initialize(build_model(config), config, world)
    step, feed = _step_of(config, model)
    batch, taken = feed.next(), 0
    while batch is not None:
        if taken == 3 and world.device.type == "cuda":  # allocations, compilations and first collectives are over
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            result = step(batch, taken)
            batch = feed.next()
            step.settle(model.step(1e-4, verdict.agree(result.loss, verdict.Asked())).finite, 0.0)
        finally:
            if world.device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        taken += 1
    assert feed.error is None
    return taken


def device_of() -> str:
    return distributed.initialize().device.type


def metrics(run_dir: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def all_gathered() -> list[int]:
    """The backend that the device's collectives go through."""
    device = distributed.initialize().device
    mine = torch.full((1,), dist.get_rank(), device=device)
    return distributed.gather_rows(mine, [1] * dist.get_world_size()).tolist()
