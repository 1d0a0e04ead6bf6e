"""What can only be measured on a GPU, in under nine minutes: `python -m tests.benchmarks.gpu --out FILE`.

Each result is a line of JSON, written as it comes, so that a run that is cut short loses nothing; what has not begun
after `--minutes` is left out, and said so. From a checkout: nothing but torch, torchvision, triton, DeepSpeed and the
other packages of CONTRIBUTING's list is needed; lightly and open_clip are measured where they are there.

    step        the training step (augment, forward, loss, backward, optimizer) of this project on synthetic crops, its
                parts, memory, FLOP utilisation and host synchronisations; beside the same network's bare forward and
                backward, and beside torch's DDP with SyncBatchNorm and lightly's loss
    objective   NT-Xent and its gradient at M = 4,096 to 1,048,576 views, beside lightly's and open_clip's
    augment     two views an image, images a second
    stream      the step on JPEGs of 500x375 from shards through worker processes, and how long it waited for them
    compiled    `step` through torch.compile

`--tiny` goes through all of it in a minute on any machine, on a CPU too: numbers of no meaning, for a test. (On a CPU
name the parts and leave `compiled` out, which takes some minutes more.)
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision

from dist_ssl import distributed, engine
from dist_ssl.augment import augment
from dist_ssl.config import AugmentConfig
from dist_ssl.data.stream import draw_views
from tests.benchmarks.gpu_step import (
    DEVICE,
    TIMED,
    WARM_UP,
    bare,
    lightly_step,
    milliseconds,
    our_step,
    settings,
    streamed_step,
)
from tests.benchmarks.input import photo_shards
from tests.benchmarks.objective import candidate, measure_gpu

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # bf16, dense, as the makers print it
# Encoder, side of a view in pixels, images of a step.
CASES = [
    ("resnet50", 224, 256),
    ("vit_s_16", 224, 256),
    ("vit_b_16", 224, 256),
    ("vit_s_16", 224, 512),
    ("resnet50", 224, 512),
    ("vit_b_16", 224, 512),
]
TINY = [("resnet_tiny", 32, 8), ("vit_s_16", 32, 8)]
OUT_OF_MEMORY = (torch.cuda.OutOfMemoryError, ImportError)  # and a peer that is not installed: a row says so


class Report:
    """Rows of JSON, written as they come; `late` once the time is up."""

    def __init__(self, file: Any, minutes: float):
        self._file, self._deadline = file, time.monotonic() + 60 * minutes

    def __call__(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)

    def late(self, about: dict[str, Any]) -> bool:
        """Whether nothing is to begin any more; then this row says what is left out."""
        over = time.monotonic() > self._deadline
        if over:
            self(about | {"left_out": "the time was up"})
        return over


def steps(say: Report, tiny: bool, compiled: bool = False) -> None:
    world = distributed.initialize()
    for encoder, size, batch in (TINY[:1] if compiled else TINY) if tiny else CASES:
        config = settings(encoder, size, batch, f"engine.compile={'true' if compiled else 'false'}")
        engine.prepare(config, world)
        about = {"part": "compiled" if compiled else "step", "encoder": encoder, "images": batch}
        measures = {"bare": bare, "dist_ssl": partial(our_step, world), "lightly": lightly_step}
        found: dict[str, Any] = {}
        for name in ("bare", "dist_ssl") if compiled else measures:
            if say.late(about | {"of": name}):
                return
            try:
                found[name] = measures[name](config)
            except OUT_OF_MEMORY as error:
                found[name] = {"error": str(error).splitlines()[0]}
            say(about | {"of": name} | found[name])
            if DEVICE.type == "cuda":
                torch.cuda.empty_cache()
        if "ms" in found["bare"] and "ms" in found["dist_ssl"]:
            say(about | ratios(found, batch))


def ratios(found: dict[str, Any], batch: int) -> dict[str, Any]:
    """Against the bare network and lightly's step, and of the card's peak, by the FLOPs that the bare one counted."""
    step_ms = found["dist_ssl"]["ms"]
    row = {"of": "ratio", "bare/step": found["bare"]["ms"] / step_ms, "images_per_second": 1e3 * batch / step_ms}
    if "ms" in found.get("lightly", {}):
        row["lightly/step"] = found["lightly"]["ms"] / step_ms
    peak = next((p for name, p in PEAK_FLOPS.items() if name in device_name()), None)
    if peak and "flops" in found["bare"]:
        row["flop_utilisation"] = found["bare"]["flops"] / (step_ms / 1e3) / peak
    return row


def streamed(say: Report, tiny: bool) -> None:
    world, workers = distributed.initialize(), 0 if tiny else max(1, (os.cpu_count() or 1) - 2)
    with tempfile.TemporaryDirectory() as folder:
        shards = photo_shards(Path(folder), 16 if tiny else 512, 2.0)
        for encoder, size, batch in TINY[:1] if tiny else CASES[:2]:
            warm_up, timed = (1, 2) if tiny else (workers + WARM_UP, 2 * TIMED)  # until what was ready has gone
            keys = [f"data.shards={json.dumps(shards)}", f"data.num_workers={workers}", "data.prefetch_batches=1"]
            config = settings(encoder, size, batch, *keys, "data.streams=4", f"train.steps={warm_up + timed}")
            about = {"part": "stream", "encoder": encoder, "images": batch, "workers": workers}
            if say.late(about):
                return
            engine.prepare(config, world)
            say(about | streamed_step(world, config, folder, warm_up))


def objectives(say: Report, tiny: bool) -> None:
    """Through `tests.benchmarks.objective`, which measures a GPU; on a CPU the call alone."""
    for views in (128,) if tiny else (4096, 16384, 65536, 262144, 1048576):
        for name in ("dist_ssl", "lightly", "open_clip"):
            about = {"part": "objective", "of": name, "views": views}
            if views > 65536 and name != "dist_ssl":
                continue  # a matrix of all pairs
            if say.late(about):
                return
            try:
                if DEVICE.type == "cuda":
                    say(about | measure_gpu(name, views, 128, torch.bfloat16, 5))
                else:
                    say(about | milliseconds(on_cpu(name, views)))
            except OUT_OF_MEMORY as error:
                say(about | {"error": str(error).splitlines()[0]})


def on_cpu(name: str, views: int) -> Callable[[], Any]:
    loss, (z1, z2) = candidate(name), (torch.randn(views // 2, 16, requires_grad=True) for _ in range(2))
    return lambda: loss(z1, z2).backward()


def augmentation(say: Report, tiny: bool) -> None:
    size, n = (32, 8) if tiny else (224, 256)
    if say.late({"part": "augment", "images": n}):
        return
    config = AugmentConfig(crop_size=size)
    crops = torch.randint(0, 256, (n, 2, 3, size, size), dtype=torch.uint8, device=DEVICE)
    drawn, _ = draw_views(0, np.zeros(n, np.int64), np.arange(n), config)
    found = milliseconds(lambda: augment(crops, drawn, config))
    say({"part": "augment", "images": n, "images_per_second": 1e3 * n / found["ms"]} | found)


def device_name() -> str:
    return torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"


PARTS = {
    "step": steps,
    "objective": objectives,
    "augment": augmentation,
    "stream": streamed,
    "compiled": partial(steps, compiled=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a file of JSON lines")
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=8.0, help="nothing begins after so many")
    parser.add_argument("--tiny", action="store_true", help="shapes of no meaning, on any machine")
    options = parser.parse_args()
    with options.out.open("w", buffering=1) as file:
        say = Report(file, options.minutes)
        versions = {"torch": torch.__version__, "torchvision": torchvision.__version__}
        say({"part": "machine", "device": device_name()} | versions)
        for part in options.parts:
            PARTS[part](say, options.tiny)
    distributed.shutdown()


if __name__ == "__main__":
    main()
