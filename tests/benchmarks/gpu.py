"""What can only be measured on a GPU, in under nine minutes: `python -m tests.benchmarks.gpu --out FILE`.

Each result is a line of JSON, written as it comes, so that a run that is cut short loses nothing. From a checkout:
nothing but torch, torchvision, triton and DeepSpeed is needed; lightly and open_clip are measured where they are there.

    step        the training step (augment, forward, loss, backward, optimizer) of this project, eager and compiled,
                its parts, memory, FLOP utilisation and host synchronisations; beside the same network's bare forward
                and backward, and beside torch's DDP with SyncBatchNorm and lightly's loss
    objective   NT-Xent and its gradient at M = 4,096 to 1,048,576 views, beside lightly's and open_clip's
    augment     two views an image, images a second

`--tiny` goes through all of it in a minute on any machine, on a CPU too: numbers of no meaning, for a test.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dist_ssl import config as configuration
from dist_ssl import distributed, engine
from dist_ssl.augment import augment
from dist_ssl.config import AugmentConfig, Config
from dist_ssl.data.stream import Batch, draw_views, empty_crops
from dist_ssl.models import GlobalBatchNorm, build_model
from dist_ssl.objective import nt_xent
from dist_ssl.training import step as step_module
from dist_ssl.training import verdict
from dist_ssl.training.step import Step
from tests.benchmarks import traffic

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # bf16, dense, as the makers print it
WARM_UP, TIMED = 3, 10
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


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
    batch, seeds = synthetic(config), iter(range(10**6))
    model = engine.initialize(build_model(config), config, world)
    timed = Timed()
    train_step = Step(config, model, [[config.train.global_batch_size]])
    train_step._loss = timed("loss", train_step._loss)  # type: ignore[method-assign]
    whole = train_step.__call__

    def step() -> None:
        result = whole(batch, next(seeds))
        optimizer = timed("optimizer", model.step)
        train_step.settle(optimizer(1e-4, verdict.agree(result.loss, verdict.Asked())).finite, 0.0)

    forward, backward = type(model).__call__, type(model).backward
    real_augment = step_module.augment
    try:
        found = milliseconds(step) | {"peak_mib": peak_mib(step), "host_syncs": host_syncs(step)}
        type(model).__call__, type(model).backward = timed("forward", forward), timed("backward", backward)  # type: ignore[method-assign]
        step_module.augment = timed("augment", real_augment)  # type: ignore[assignment]
        timed.marks.clear()
        milliseconds(step)
    finally:
        type(model).__call__, type(model).backward = forward, backward  # type: ignore[method-assign]
        step_module.augment = real_augment  # type: ignore[assignment]
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


def images(config: Config) -> list[Tensor]:
    """As the model takes them, a tensor a size."""
    n = config.train.global_batch_size
    dtype = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
    views = [torch.randn(n * v, 3, side, side, device=DEVICE, dtype=dtype) for side, v in config.augment.sizes()]
    return [x.contiguous(memory_format=torch.channels_last) for x in views]


def bare(config: Config) -> dict[str, Any]:
    """Forward and backward of the network alone, and how many FLOPs they are."""
    model, views = bare_network(config), images(config)
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
    loss, views = NTXentLoss(0.1, gather_distributed=True), images(config)
    optimizer = torch.optim.AdamW(parallel.parameters(), 1e-4, fused=on_gpu)

    def step() -> None:
        with autocast(config):
            _, z = parallel(*views)
        loss(z[0::2].float(), z[1::2].float()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return milliseconds(step) | {"peak_mib": peak_mib(step)}


def steps(say: Callable[..., None], tiny: bool) -> None:
    world = distributed.initialize()
    cases = [("resnet50", 224, 256), ("vit_s_16", 224, 256), ("vit_s_16", 224, 512), ("vit_b_16", 224, 256)]
    for encoder, size, batch in [("resnet_tiny", 32, 8)] if tiny else cases:
        for compiled in (False,) if tiny else (False, True):
            config = settings(encoder, size, batch, f"engine.compile={'true' if compiled else 'false'}")
            engine.prepare(config, world)
            about = {"part": "step", "encoder": encoder, "images": batch, "compiled": compiled}
            found = {}
            for name, measure in (
                ("bare", bare),
                ("dist_ssl", partial(our_step, world)),
                ("lightly", lightly_step),
            ):
                if compiled and name == "lightly":
                    continue
                try:
                    found[name] = measure(config)
                except (torch.cuda.OutOfMemoryError, ImportError) as error:
                    found[name] = {"error": str(error).splitlines()[0]}
                say(about | {"of": name} | found[name])
                if DEVICE.type == "cuda":
                    torch.cuda.empty_cache()
            if "ms" in found["bare"] and "ms" in found["dist_ssl"]:
                ratio = found["bare"]["ms"] / found["dist_ssl"]["ms"]
                row = {"of": "ratio", "bare/step": ratio, "images_per_second": 1e3 * batch / found["dist_ssl"]["ms"]}
                peak = next((p for name, p in PEAK_FLOPS.items() if name in device_name()), None)
                if peak and "flops" in found["bare"]:
                    row["flop_utilisation"] = found["bare"]["flops"] / (found["dist_ssl"]["ms"] / 1e3) / peak
                say(about | row)


def objectives(say: Callable[..., None], tiny: bool) -> None:
    """Through `tests.benchmarks.objective`, which measures a GPU by events; on a CPU the call alone."""
    if tiny or DEVICE.type != "cuda":
        z1, z2 = (torch.randn(64, 16, device=DEVICE, requires_grad=True) for _ in range(2))
        say(
            {"part": "objective", "of": "dist_ssl", "views": 128}
            | milliseconds(lambda: nt_xent(z1, z2, 0.1).backward())
        )
        return
    from tests.benchmarks.objective import measure_gpu

    for views in (4096, 16384, 65536, 262144, 1048576):
        for name in ("dist_ssl", "lightly", "open_clip"):
            if views > 65536 and name != "dist_ssl":
                continue  # a matrix of all pairs
            try:
                say({"part": "objective", "views": views} | measure_gpu(name, views, 128, torch.bfloat16, 5))
            except (torch.cuda.OutOfMemoryError, ImportError) as error:
                say({"part": "objective", "of": name, "views": views, "error": str(error).splitlines()[0]})


def augmentation(say: Callable[..., None], tiny: bool) -> None:
    size, n = (32, 8) if tiny else (224, 256)
    config = AugmentConfig(crop_size=size)
    crops = torch.randint(0, 256, (n, 2, 3, size, size), dtype=torch.uint8, device=DEVICE)
    drawn, _ = draw_views(0, np.zeros(n, np.int64), np.arange(n), config)
    found = milliseconds(lambda: augment(crops, drawn, config))
    say({"part": "augment", "images": n, "images_per_second": 1e3 * n / found["ms"]} | found)


def device_name() -> str:
    return torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"


PARTS = {"step": steps, "objective": objectives, "augment": augmentation}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a file of JSON lines")
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--tiny", action="store_true", help="shapes of no meaning, on any machine")
    options = parser.parse_args()
    with options.out.open("w", buffering=1) as file:

        def say(row: dict[str, Any]) -> None:
            file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)

        versions = {"torch": torch.__version__, "torchvision": torchvision.__version__}
        say({"part": "machine", "device": device_name()} | versions)
        for part in options.parts:
            PARTS[part](say, options.tiny)
    distributed.shutdown()


if __name__ == "__main__":
    main()
