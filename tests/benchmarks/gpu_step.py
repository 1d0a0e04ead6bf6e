"""A training step on this machine's GPU, and what it is held against: measured, for `tests.benchmarks.gpu`."""

from __future__ import annotations

import contextlib
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dist_ssl import config as configuration
from dist_ssl import distributed, engine
from dist_ssl.config import Config
from dist_ssl.data.manifest import load_manifest
from dist_ssl.data.quarantine import Quarantine
from dist_ssl.data.stream import Batch, draw_views, empty_crops, training_batches
from dist_ssl.models import GlobalBatchNorm, build_model
from dist_ssl.training import step as step_module
from dist_ssl.training import verdict
from dist_ssl.training.feed import Feed
from dist_ssl.training.step import Step
from tests.benchmarks import traffic

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WARM_UP, TIMED = (3, 10) if DEVICE.type == "cuda" else (1, 2)  # calls


def settings(encoder: str, size: int, batch: int, *overrides: str) -> Config:
    precision = "bf16" if DEVICE.type == "cuda" else "fp32"
    keys = [f"model.encoder={encoder}", f"augment.crop_size={size}", f"train.global_batch_size={batch}"]
    keys += ["optimizer.name=adamw", f"engine.precision={precision}", "engine.threads_per_rank=1"]
    return configuration.with_overrides(Config(), [*keys, *overrides])


def synthetic(config: Config) -> Batch:
    """A batch as the workers hand it over, of noise."""
    n = config.train.global_batch_size
    ids = np.arange(n)
    parameters, _ = draw_views(0, np.zeros(n, np.int64), ids, config.augment)
    crops = [torch.randint_like(crops, 256) for crops in empty_crops(n, config.augment)]
    numbers = torch.from_numpy(ids)
    return Batch(crops, parameters, numbers, numbers, numbers, numbers % 10, [str(i) for i in ids], {}).to(DEVICE)


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def milliseconds(call: Callable[[], Any], repetitions: int = TIMED) -> dict[str, float]:
    """Median, least and most of single calls, each waited for."""
    for _ in range(WARM_UP):
        call()
    found = []
    for _ in range(repetitions):
        synchronize()
        started = time.perf_counter()
        call()
        synchronize()
        found.append((time.perf_counter() - started) * 1e3)
    return {"ms": statistics.median(found), "least": min(found), "most": max(found)}


def peak_mib(call: Callable[[], Any]) -> float:
    if DEVICE.type != "cuda":
        return 0.0
    torch.cuda.reset_peak_memory_stats()
    call()
    synchronize()
    return torch.cuda.max_memory_allocated() / 2**20


class Timed:
    """Where a step's time goes: events on the stream around calls, read when all is over."""

    def __init__(self) -> None:
        self.marks: dict[str, list[tuple[Any, Any]]] = {}

    def __call__(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **keywords: Any) -> Any:
            begun, result, ended = self._now(), call(*arguments, **keywords), self._now()
            self.marks.setdefault(name, []).append((begun, ended))
            return result

        return timed

    def _now(self) -> Any:
        if DEVICE.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def medians(self) -> dict[str, float]:
        synchronize()
        span = (lambda a, b: a.elapsed_time(b)) if DEVICE.type == "cuda" else (lambda a, b: (b - a) * 1e3)
        return {name: statistics.median(span(*pair) for pair in pairs) for name, pairs in self.marks.items()}


def our_step(world: distributed.World, config: Config) -> dict[str, Any]:
    """One rank's whole step, as the loop takes it."""
    batch, numbers = synthetic(config), iter(range(10**6))
    model = engine.initialize(build_model(config), config, world)
    timed = Timed()
    train_step = Step(config, model, [[config.train.global_batch_size]])
    whole = train_step.__call__

    def step() -> None:
        result = whole(batch, next(numbers))
        optimizer = timed("optimizer", model.step)
        train_step.settle(optimizer(1e-4, verdict.agree(result.loss, verdict.Asked())).finite, 0.0)

    forward, backward = type(model).__call__, type(model).backward
    real_augment, real_loss = step_module.augment, step_module.loss_of
    try:
        found = milliseconds(step) | {"peak_mib": peak_mib(step), "host_syncs": host_syncs(step)}
        type(model).__call__, type(model).backward = timed("forward", forward), timed("backward", backward)  # type: ignore[method-assign]
        step_module.augment, step_module.loss_of = timed("augment", real_augment), timed("loss", real_loss)
        timed.marks.clear()
        milliseconds(step)
    finally:
        type(model).__call__, type(model).backward = forward, backward  # type: ignore[method-assign]
        step_module.augment, step_module.loss_of = real_augment, real_loss
    return found | {"parts_ms": timed.medians()}


def host_syncs(step: Callable[[], Any]) -> int | None:
    """How often a step waits for the device, by CUDA's own debug mode; None on a CPU."""
    if DEVICE.type != "cuda":
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
        return sum("synchroniz" in str(one.message) for one in caught)
    finally:
        torch.cuda.set_sync_debug_mode("default")


class SyncBatchNorm(nn.SyncBatchNorm):
    """torch's, in networks whose batch norm is asked for the addition and the ReLU behind it."""

    forward = traffic.BatchNorm.forward

    def normalise(self, x: Tensor) -> Tensor:
        return nn.SyncBatchNorm.forward(self, x)


def bare_network(config: Config, batch_norm: type[nn.Module] = traffic.BatchNorm) -> nn.Module:
    """The same model with torch's batch norm in place of the global one."""
    model = build_model(config)
    for module in model.modules():
        if isinstance(module, GlobalBatchNorm):
            module.__class__ = batch_norm
            module.process_group = None  # SyncBatchNorm's: all ranks
    return model.to(DEVICE)


def autocast(config: Config) -> Any:
    on = config.engine.precision == "bf16"
    return torch.autocast(DEVICE.type, torch.bfloat16) if on else contextlib.nullcontext()


def views_of(config: Config) -> list[Tensor]:
    """Noise in place of a batch's views, a tensor a size."""
    n, dtype = config.train.global_batch_size, torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
    shapes = [(n * num_views, 3, side, side) for side, num_views in config.augment.sizes()]
    views = (torch.randn(*shape, device=DEVICE, dtype=dtype) for shape in shapes)
    return [x.contiguous(memory_format=torch.channels_last) for x in views]


def bare(config: Config) -> dict[str, Any]:
    """Forward and backward of the network alone, and how many FLOPs they are."""
    model, views = bare_network(config), views_of(config)
    if config.engine.compile:
        model.compile()

    def step() -> None:
        with autocast(config):
            h, z, _ = model(*views)
        (h.float().square().mean() + z.float().square().mean()).backward()
        model.zero_grad()

    found: dict[str, Any] = milliseconds(step) | {"peak_mib": peak_mib(step)}
    if not config.engine.compile:
        with FlopCounterMode(display=False) as counter:
            step()
        found["flops"] = counter.get_total_flops()
    return found


def lightly_step(config: Config) -> dict[str, Any]:
    """What a user would write: DDP, SyncBatchNorm, lightly's NTXentLoss, AdamW, views that are augmented already."""
    from lightly.loss import NTXentLoss

    on_gpu = DEVICE.type == "cuda"
    model = bare_network(config, SyncBatchNorm if on_gpu else traffic.BatchNorm)
    parallel = nn.parallel.DistributedDataParallel(model, device_ids=[DEVICE.index or 0] if on_gpu else None)
    loss, views = NTXentLoss(0.1, gather_distributed=True), views_of(config)
    optimizer = torch.optim.AdamW(parallel.parameters(), 1e-4, fused=on_gpu)

    def step() -> None:
        with autocast(config):
            _, z, _ = parallel(*views)
        loss(z[0::2].float(), z[1::2].float()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return milliseconds(step) | {"peak_mib": peak_mib(step)}


def streamed_step(world: distributed.World, config: Config, folder: str, warm_up: int) -> dict[str, Any]:
    """Feed, step and optimizer as the loop takes them: milliseconds a step, those waited for data, images a second."""
    manifest, steps = load_manifest(config.data.shards, config.storage), config.train.steps or 0
    model = engine.initialize(build_model(config), config, world)
    train_step = Step(config, model, [[config.train.global_batch_size]])
    at = {"cursor": 0, "first_step": 0, "num_steps": steps, "rank": 0, "world_size": 1}
    with training_batches(config, manifest, **at) as batches:
        feed = Feed(batches, Quarantine(folder, config.data, manifest.num_samples), world.device)
        batch = feed.next()
        for number in range(steps):
            if number == warm_up:
                synchronize()
                started, waited = time.perf_counter(), feed.waited_seconds
            assert batch is not None
            result = train_step(batch, number)
            batch = feed.next()
            train_step.settle(model.step(1e-4, verdict.agree(result.loss, verdict.Asked())).finite, 0.0)
        synchronize()
    timed = steps - warm_up
    seconds, waited = (time.perf_counter() - started) / timed, (feed.waited_seconds - waited) / timed
    rate = config.train.global_batch_size / seconds
    return {"ms": 1e3 * seconds, "data_ms": 1e3 * waited, "images_per_second": rate}
