"""Failures in `dist-ssl plan`: how often to save, what failures take of a run, and what spare nodes would save of it.

A job dies with any of its nodes, so it meets one every M = (a node's mean time between failures) / nodes. Work is done
for tau seconds, then a save stops it for delta; a failure costs what was done since the last commit and R seconds until
training goes on. With failures that are memoryless, which nodes' are but for their first days (Daly 2006, eq. 20),

    wall time / work = M exp(R / M) (exp((tau + delta) / M) - 1) / tau

whose best tau is near sqrt(2 delta M) (Young 1974), and nearer with two more terms (Daly 2006, eq. 37). Saves are
written beside the training, one at a time: tau is no shorter than a write, and a failure loses one more: R carries it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dist_ssl.planning.estimate import Estimate

HOST_BYTES_PER_SECOND = 5e9  # of a copy from a GPU into pinned memory: PCIe gives 10 to 50, a shared host less
STORE_BYTES_PER_SECOND = 5e8  # that a node writes to a store
STALL_SECONDS, WRITE_SECONDS = 0.1, 2.0  # of the smallest save: the last verdict is read; files synced, ranks gathered
ENOUGH = 0.99  # of the time that spares should suffice


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """What is known of the nodes, and of what a failure costs; seconds."""

    mtbf_seconds: float  # of one node
    restart_seconds: float  # from a failure to the first new step, on nodes that are there
    replacement_seconds: float  # until Slurm has another node, or the failed one is back
    stall_seconds: float | None = None  # of a save; None: estimated


def best_interval(stall: float, between_failures: float) -> float:
    """Seconds of work between two saves that stop it for `stall` each (Daly 2006, eq. 37)."""
    if stall >= 2 * between_failures:
        return between_failures
    ratio = math.sqrt(stall / (2 * between_failures))
    return math.sqrt(2 * stall * between_failures) * (1 + ratio / 3 + ratio * ratio / 9) - stall


def wall_over_work(interval: float, stall: float, between_failures: float, lost: float) -> float:
    """How many times as long as its work a run takes; infinite where it can't be expected to end."""
    exponents = (interval + stall) / between_failures, lost / between_failures
    if max(exponents) > 500:
        return math.inf
    return between_failures * math.exp(exponents[1]) * math.expm1(exponents[0]) / interval


def spares(nodes: int, reliability: Reliability) -> int:
    """The fewest spare nodes that suffice 99% of the time: nodes away at once are a Poisson variable."""
    mean = nodes * reliability.replacement_seconds / reliability.mtbf_seconds
    term = total = math.exp(-mean)
    count = 0
    while total < ENOUGH and count < nodes:
        count += 1
        term *= mean / count
        total += term
    return count


def failures(
    reliability: Reliability,
    nodes: int,
    ranks: int,
    checkpoint_bytes: float,
    step_seconds: float | None = None,
    hours: float | None = None,
) -> list[Estimate]:
    """The estimates of a run on so many nodes; those of steps and hours where they are known."""
    between = reliability.mtbf_seconds / nodes
    stall, told = reliability.stall_seconds, "given"
    if stall is None:
        stall = STALL_SECONDS + checkpoint_bytes / ranks / HOST_BYTES_PER_SECOND
        told = "assumed: 0.1 s, and checkpoint / W at 5 GB/s into host memory"
    write = WRITE_SECONDS + checkpoint_bytes / nodes / STORE_BYTES_PER_SECOND
    interval = max(best_interval(stall, between), write, step_seconds or 0.0)
    waited = write + reliability.restart_seconds
    with_spares = wall_over_work(interval, stall, between, waited) - 1
    without = wall_over_work(interval, stall, between, waited + reliability.replacement_seconds) - 1
    found = [
        Estimate("between failures of the job", between / 3600, "h", "M = a node's mean time between failures / nodes"),
        Estimate("stall of a save", stall, "s", f"delta, {told}"),
        Estimate("writing a checkpoint", write, "s", "assumed: 2 s, and checkpoint / nodes at 0.5 GB/s"),
        Estimate(
            "best checkpoint interval", interval, "s",
            "sqrt(2 delta M) (1 + sqrt(delta / 2M) / 3 + delta / 18M) - delta, at least a write and a step (Daly 2006)",
        ),
    ]  # fmt: skip
    if step_seconds is not None:
        steps = max(1, round(interval / step_seconds))
        found.append(Estimate("best checkpoint.every_steps", steps, "", "interval / a step"))
    found += [
        Estimate("lost to failures and saves", 100 * without, "%", "M e^(R/M) (e^((tau+delta)/M) - 1) / tau - 1"),
        Estimate("the same with hot spares", 100 * with_spares, "%", "R without the wait for another node"),
        Estimate("hot spares that suffice", spares(nodes, reliability), "nodes", "99% of the time, by Poisson"),
    ]
    if hours is not None:
        found.append(Estimate("expected lost hours", hours * without, "h", "hours * what is lost"))
        found.append(Estimate("hours that hot spares save", hours * (without - with_spares), "h", "the difference"))
    return found
