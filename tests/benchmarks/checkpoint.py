"""Stall, save and load of a checkpoint of 100M parameters, beside plain DeepSpeed and plain writes of the same bytes.

    python -m tests.benchmarks.checkpoint [--repetitions 4] [--json FILE]

Two gloo ranks, ZeRO 1, AdamW. All are done in turn in one run; ratios are what to look at. Reads are cold: the files
are dropped from the page cache before. The step is one of two 32x32 images a rank: the shortest there is.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dist_ssl import checkpoint, distributed
from dist_ssl.checkpoint import Checkpointer, RunState, take_incarnation
from tests import engines
from tests.pool import ranks
from tests.trajectory import small_config

SETTINGS = ["model.encoder=vit_b_16", "model.head.hidden_dim=8192", "model.head.output_dim=1024"]


def measure(folder: str, repetitions: int) -> list[dict[str, float]]:
    """On each rank: seconds of each part, one dictionary a repetition."""
    config = small_config(Path(folder) / "run", "", *SETTINGS, "checkpoint.keep_last=1")
    model = engines.build(config)
    shapes = engines.build_model(config)
    engines.take_steps(model, shapes, range(1))
    incarnation = distributed.broadcast_object(take_incarnation(config.run.dir) if distributed.rank() == 0 else None)
    store = checkpoint.checkpoint_store(config)
    checkpointer = Checkpointer(store, config.run.dir, config.checkpoint, model, incarnation)
    found = []
    for number in range(repetitions + 1):
        seconds: dict[str, float] = {}
        with timed(seconds, "step"):
            engines.take_steps(model, shapes, range(1))
        with timed(seconds, "stall"):
            checkpointer.save(RunState(number, 0, "", ""), dict(model.model.named_buffers()))
        started = time.perf_counter()
        checkpointer.wait()
        seconds["save"] = seconds["stall"] + time.perf_counter() - started
        with timed(seconds, "deepspeed"):
            model._engine.save_checkpoint(str(Path(folder) / "deepspeed"), tag=f"step-{number}")
        data = bytes(checkpointer._buffer.view())
        own = Path(folder) / f"plain-{distributed.rank()}"
        with timed(seconds, "plain write"), open(own, "wb") as file:
            file.write(data)
            os.fsync(file.fileno())
        for file in [own, *Path(config.run.dir, "checkpoints").rglob("*.safetensors")]:
            drop_from_cache(file)
        with timed(seconds, "load"):
            newest = checkpoint.newest_valid(store)
            assert newest is not None
            checkpoint.load(newest, model)
        with timed(seconds, "of it gathering"):  # the new weights to all ranks, over gloo: no reading
            model.after_load()
        seconds["read"] = seconds["load"] - seconds["of it gathering"]
        with timed(seconds, "plain read"), open(own, "rb") as file:
            file.read()
        seconds["megabytes a rank"] = len(data) / 1e6
        del data
        if distributed.rank() == 0:
            shutil.rmtree(Path(folder) / "deepspeed")
        dist.barrier()
        found.append(seconds)
    return found[1:]  # the first save makes the buffer


def drop_from_cache(path: Path) -> None:
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class timed:
    def __init__(self, seconds: dict[str, float], name: str):
        self.seconds, self.name = seconds, name

    def __enter__(self) -> None:
        dist.barrier()
        self.started = time.perf_counter()

    def __exit__(self, *_: Any) -> None:
        dist.barrier()
        self.seconds[self.name] = time.perf_counter() - self.started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=4)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = ranks(2).run(measure, folder, options.repetitions, timeout=1800)[0]
    number = sum(p.numel() for p in engines.build_model(small_config("x", "", *SETTINGS)).parameters())
    print(f"{number / 1e6:.0f}M parameters, 2 ranks, torch {torch.__version__}")
    for name in rows[0]:
        values = [row[name] for row in rows]
        print(f"{name:18} median {statistics.median(values):8.3f}  of {min(values):.3f} to {max(values):.3f}")
    for over, under, aim in (
        ("stall", "deepspeed", "<= 0.25"),
        ("stall", "step", "none"),
        ("plain write", "save", ">= 0.7"),
        ("plain read", "read", ">= 0.7"),
        ("plain read", "load", "none"),
    ):
        ratios = [row[over] / row[under] for row in rows]
        print(f"{over} / {under}: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}), aim {aim}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
