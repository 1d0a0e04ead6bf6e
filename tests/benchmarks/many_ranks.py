"""A run on as many ranks as a machine takes: `python -m tests.benchmarks.many_ranks [--ranks 64] [--then 48]`.

Real gloo processes, the real loop, data, ledger and checkpoints, and a model of few parameters. One run is left alone.
Of another a rank is killed (kill -9) between two checkpoints, and it goes on with other ranks and another ZeRO stage.
Exit code 1 where the two consumed other samples, where their losses differ by more than rounding, or where what was
counted is more than 5% off what `dist-ssl plan` says.

Ranks are forked from one process that has imported everything: 64 take 3.5 GB of their own, and 20 steps of them
took 224 seconds on two cores that nothing else used (gloo rings wake each rank for each message). All: 9 to 12 minutes.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from dist_ssl import checkpoint
from dist_ssl.config import Config, StorageConfig
from dist_ssl.data.shards import write_shards
from dist_ssl.data.sources import open_source
from dist_ssl.planning import counts, estimate
from dist_ssl.storage.layout import step_name
from tests import trajectory
from tests.counting import Count, wire_bytes
from tests.faults import inject
from tests.faults.forked import ForkedLaunch
from tests.pool import Pool

TOLERANCE = 0.05
IMAGES = 3  # of a rank: 64 of them divide over 48 ranks too, as the plan's formulas take it
ROUNDING = 1e-4  # of AdamW's losses at 1e-5 after 20 steps: tests/test_trajectory.py
Row = tuple[str, float, float]  # what, counted, as `plan` says
Say = Callable[[str], None]  # what happened, as soon as it has


def counted(config: Config) -> list[list[tuple[str, int]]]:
    """A run to its end on this rank: the collectives of each step but the last, from forward to forward."""
    marks: list[int] = []
    logging.getLogger().setLevel("ERROR")
    with Count() as count, inject.at_each_step(lambda step, z: marks.append(len(count.collectives))):
        assert trajectory.pretrain(config) == 0
    return [count.collectives[first:last] for first, last in pairwise(marks)]


def against_plan(config: Config, steps: list[list[list[tuple[str, int]]]]) -> list[Row]:
    """What the ranks counted, of the step that sent least (some steps are logged), and what is on the disk."""
    ranks = len(steps)
    sizes = replace(estimate.Sizes.of(config, ranks, measure=False, num_classes=8), moment_bytes=8)
    calm = [min(of_rank, key=len) for of_rank in steps]
    files = [path for path in newest(config).rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files if path.suffix == ".safetensors")
    planned = {found.name: found.value for found in counts.counts(config, sizes)}
    return [
        ("collectives of a step", max(map(len, calm)), planned["collectives of a step"]),
        (
            "bytes a rank sends in a step",
            max(wire_bytes(of_rank, ranks) for of_rank in calm),
            planned["sent by a rank in a step"],
        ),
        ("files of a checkpoint", len(files), planned["files of a checkpoint"]),
        ("bytes of a checkpoint", size, planned["bytes of a checkpoint"]),
    ]


def newest(config: Config) -> Path:
    store = checkpoint.checkpoint_store(config)
    return Path(store.url(step_name(checkpoint.committed_steps(store)[-1])))


def left_alone(config: Config, ranks: int, say: Say) -> list[Row]:
    """A run to its end, from where its directory is, and its counts against the plan's."""
    started, pool = time.monotonic(), Pool(ranks)
    steps = pool.run(counted, config, timeout=3600)
    held = sum(psutil.Process(process.pid).memory_full_info().uss for process in pool.processes) / 1e9
    pool.close()
    seconds = time.monotonic() - started
    say(f"{_place(config, ranks)} to step {config.train.steps}: {seconds:.0f} s, {held:.1f} GB of their own")
    return against_plan(config, steps)


def killed(config: Config, ranks: int, step: int, say: Say) -> None:
    started, launch = time.monotonic(), ForkedLaunch(config, ranks)
    launch.wait_for_step(step, timeout=3600)
    launch.ranks()[ranks // 2].kill()
    code, seconds = launch.wait(), time.monotonic() - started
    committed = checkpoint.committed_steps(checkpoint.checkpoint_store(config))[-1]
    told = f"a rank killed in step {step + 1}, exit code {code}, {seconds:.0f} s; step {committed} is committed"
    say(f"{_place(config, ranks)}, {told}")


def _place(config: Config, ranks: int) -> str:
    return f"{ranks} ranks, ZeRO {config.engine.zero_stage}"


def compare(folder: Path, ranks: int, then: int, stages: tuple[int, int], steps: int, say: Say) -> tuple[bool, Table]:
    """(whether all holds, the counts)"""
    batch = IMAGES * ranks
    write_shards(
        open_source(f"shapes:{2 * batch}"), str(folder / "shards"), StorageConfig(), shard_mb=0.1, num_workers=0
    )
    shared = [f"train.steps={steps}", f"train.global_batch_size={batch}", f"checkpoint.every_steps={steps // 2}"]

    def config_of(name: str, stage: int) -> Config:
        return trajectory.small_config(folder / name / "run", folder / "shards", f"engine.zero_stage={stage}", *shared)

    alone, disturbed, resumed = (
        config_of("alone", stages[0]),
        config_of("other", stages[0]),
        config_of("other", stages[1]),
    )
    rows = {ranks: left_alone(alone, ranks, say)}
    killed(disturbed, ranks, 3 * steps // 4, say)
    rows[then] = left_alone(resumed, then, say)
    places = [Path(config.run.dir) for config in (alone, resumed)]
    ledgers, losses = [trajectory.ledger(place) for place in places], [trajectory.losses(place) for place in places]
    apart = max(abs(a - b) / abs(a) for a, b in zip(*losses, strict=True))
    equal, samples = ledgers[0] == ledgers[1], sum(map(len, ledgers[0].values()))
    say(f"ledgers of {samples} samples are {'equal' if equal else 'NOT EQUAL'}; losses at most {apart:.1e} apart")
    holds = equal and samples == batch * steps and apart < ROUNDING
    table = Table("", "counted", "plan", "ratio", title="counts against `dist-ssl plan`")
    for size, of_size in rows.items():
        for what, found, planned in of_size:
            table.add_row(f"{size} ranks, {what}", f"{found:,.0f}", f"{planned:,.0f}", f"{found / planned:.3f}")
            holds &= abs(found / planned - 1) < TOLERANCE
    return holds, table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--then", type=int, default=48)
    parser.add_argument("--stages", type=int, nargs=2, default=[1, 3], help="ZeRO stages, before and after")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    console = Console(width=120, highlight=False)
    with tempfile.TemporaryDirectory() as folder:
        holds, table = compare(
            Path(folder), options.ranks, options.then, tuple(options.stages), options.steps, console.print
        )
    console.print(table)
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
