"""Where a rank's time goes on the CPU, adding up to the wall clock: `python -m tests.benchmarks.cpu_step CONFIG DIR`.

A run of `--steps` steps of a config (with `--set`, as `dist-ssl pretrain` takes it) whose parts are timed from outside,
each without the parts that it calls; on more ranks under `python -m torch.distributed.run --nproc-per-node W -m
tests.benchmarks.cpu_step ...`. Rank 0's table: wall and CPU milliseconds a step, the first `SKIPPED` left out. Workers
are processes of their own: only what is waited for shows here.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dist_ssl import config as configuration
from dist_ssl import distributed
from dist_ssl.engine import Engine
from dist_ssl.models import batch_norm, moments
from dist_ssl.training import step as step_module
from dist_ssl.training import train
from dist_ssl.training.feed import Feed
from dist_ssl.training.monitor import Monitor
from dist_ssl.training.step import Step

SKIPPED = 5
PARTS: list[tuple[str, Any, str]] = [
    ("waiting for data", Feed, "_fetch"),
    ("augmentation", step_module, "augment"),
    ("forward", Engine, "__call__"),
    ("loss", Step, "_contrast"),
    ("backward", Engine, "backward"),
    ("optimizer, DeepSpeed", Engine, "step"),
    ("batch norm's moments", batch_norm, "_moments"),
    ("gathers", moments, "all_gather_single"),
    ("gathers", distributed, "all_gather_single"),
    ("reductions", torch.distributed, "all_reduce"),
    ("diagnostics, logs", Monitor, "record"),
]


class Clock:
    """Charges time to the innermost part that is running."""

    def __init__(self) -> None:
        self.spent: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self.running = ["the loop itself"]
        self.mark = self.now()

    def now(self) -> tuple[float, float]:
        return time.perf_counter(), time.process_time()

    def charge(self) -> None:
        now = self.now()
        for i in range(2):
            self.spent[self.running[-1]][i] += now[i] - self.mark[i]
        self.mark = now

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def inner(*arguments: Any, **keywords: Any) -> Any:
            self.charge()
            self.running.append(name)
            try:
                return call(*arguments, **keywords)
            finally:
                self.charge()
                self.running.pop()

        return inner


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("run_dir", help="where the run may write; emptied first")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--steps", type=int, default=25)
    options = parser.parse_args()
    clock, seen = Clock(), 0
    for name, owner, attribute in PARTS:
        setattr(owner, attribute, clock.timed(name, getattr(owner, attribute)))
    compute = Step.__call__
    started: tuple[float, float] = clock.now()
    faults = 0

    def step(self: Step, *arguments: Any) -> Any:
        nonlocal seen, started, faults
        seen += 1
        if seen == SKIPPED + 1:
            clock.charge()
            clock.spent.clear()
            started, faults = clock.now(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        return compute(self, *arguments)

    Step.__call__ = step  # type: ignore[method-assign]
    loop = train.Run.loop

    def timed_loop(*arguments: Any) -> int:
        clock.charge()
        code = loop(*arguments)
        clock.charge()
        show(clock, started, faults, options.steps - SKIPPED)
        return code

    train.Run.loop = timed_loop  # type: ignore[method-assign]
    places = [f'run.dir="{options.run_dir}"', f"train.steps={options.steps}"]
    train.pretrain(configuration.load(options.config, [*options.overrides, *places]), restart=True)


def show(clock: Clock, started: tuple[float, float], faults: int, steps: int) -> None:
    if distributed.rank():
        return
    faults = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults) // steps
    wall, cpu = (1000 * (now - then) / steps for now, then in zip(clock.now(), started, strict=True))
    for name, spent in sorted(clock.spent.items(), key=lambda item: -item[1][0]):
        print(f"{name:24s} {1000 * spent[0] / steps:8.1f} ms  CPU {1000 * spent[1] / steps:8.1f} ms")
    summed = sum(spent[0] for spent in clock.spent.values()) * 1000 / steps
    print(f"{'sum':24s} {summed:8.1f} ms; by the clock {wall:.1f} ms, CPU {cpu:.1f} ms, {faults} page faults a step")


if __name__ == "__main__":
    main()
