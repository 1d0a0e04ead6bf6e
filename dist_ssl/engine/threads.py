"""How many threads a rank computes with on a CPU: its share of what it may use."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path

from dist_ssl.distributed import gather_objects


def threads_of_this_rank(local_size: int) -> int:
    """Of the CPUs that this rank may run on, its part where other ranks may run on them too; 1 at least.

    A launcher's ranks share all that it may use, while srun gives each its own. Collective: one gather.
    """
    machine = Path("/proc/sys/kernel/random/boot_id").read_text()
    mine = os.sched_getaffinity(0)
    here = [cpus for there, cpus in gather_objects((machine, mine)) if there == machine]
    return share(mine, here, quota() / local_size)


def share(mine: AbstractSet[int], of_ranks: Sequence[AbstractSet[int]], limit: float) -> int:
    """This rank's threads, by the CPUs of all ranks on its machine, its own among them, and a limit of its time."""
    sharing = sum(not mine.isdisjoint(cpus) for cpus in of_ranks)
    return int(max(1, min(len(mine) // sharing, limit)))


def quota(root: Path = Path("/sys/fs/cgroup"), process: Path = Path("/proc/self/cgroup")) -> float:
    """The CPUs' time that a container or a service is given, in CPUs; infinity where there is no limit.

    The least of this process's cgroup and those above it, of version 2 or 1.
    """
    found = [float("inf")]
    for line in process.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / controllers
        own = top / path.lstrip("/")
        for folder in (own, *own.parents):
            if not folder.is_relative_to(top):
                break
            with contextlib.suppress(OSError, ValueError):  # not there, or "max" or -1: no limit
                if controllers:
                    given, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
                else:
                    given, period = map(int, (folder / "cpu.max").read_text().split())
                found += [given / period] if given > 0 else []
    return min(found)
