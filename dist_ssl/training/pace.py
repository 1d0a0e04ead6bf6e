"""Each rank's pace: the seconds in which it waits for nobody, so that a straggler is named.

Ranks wait for each other in every step, so their steps all take as long as the slowest one's. What differs is what lies
between two collectives: waiting for this rank's own data, and making its views on the device. Those seconds are taken
in every step, on a GPU by its own events, and gathered when a step is logged: two numbers a rank, over gloo.
"""

from __future__ import annotations

import contextlib
import logging
import platform
import time
from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

from dist_ssl.distributed import gather_objects, gather_rows, rank, world_size

log = logging.getLogger(__name__)
MUCH_SLOWER, WORTH_IT = 1.5, 0.05  # times the median, and of a step's seconds what it must cost to be told


class Pace:
    """This rank's own seconds, and all ranks' when a step is logged."""

    def __init__(self, device: torch.device, spans_per_step: int):
        self._spans_per_step, self._spans = spans_per_step, 0  # those that are over
        self._cuda = device.type == "cuda"
        self._events: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque(maxlen=4096)
        self._seconds, self._waited, self._step, self._at = 0.0, 0.0, -1, 0.0

    @contextlib.contextmanager
    def own(self) -> Iterator[None]:
        """Count what is done in here. No collective inside; the host does not wait."""
        if self._cuda:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._events.append((start, end))
        else:
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began
            self._spans += 1

    def compare(self, step: int, waited_seconds: float, at: float) -> dict[str, float]:
        """Metrics of the ranks' own seconds a step since the last call; empty on one rank, and at the first call.

        `waited_seconds` are those without data since the start, `at` when the step was queued. Rank 0 warns of a
        straggler, with its node. Collective: one all-gather of two numbers on the host, and the nodes' names with it
        where there is something to warn of.
        """
        while self._events and self._events[0][1].query():
            start, end = self._events.popleft()
            self._seconds += start.elapsed_time(end) / 1000
            self._spans += 1
        steps, first = step - self._step, self._step < 0
        # Of spans and not of steps, since the step after this one has begun, but where a run ends.
        views = self._seconds / max(self._spans, 1) * self._spans_per_step
        mine = [views + (waited_seconds - self._waited) / steps, (at - self._at) / steps]
        self._seconds, self._spans, self._waited, self._step, self._at = 0.0, 0, waited_seconds, step, at
        if world_size() == 1:
            return {}
        seconds_w, step_seconds_w = gather_rows(torch.tensor([mine]), [1] * world_size()).unbind(dim=1)
        if first:  # what was counted is of warming up
            return {}
        found = spread(seconds_w)
        # All ranks come to the same answer, since it is of what was gathered.
        excess = found["rank_seconds_max"] - found["rank_seconds_median"]
        much = found["rank_seconds_max"] > MUCH_SLOWER * found["rank_seconds_median"]
        if much and excess > WORTH_IT * float(step_seconds_w.median()):
            slowest = int(found["slowest_rank"])
            nodes = gather_objects(platform.node())
            if rank() == 0:
                said = (
                    "step %d: rank %d on %s is slow: %.3f s a step of its own (data, views), where the median is %.3f s"
                )
                log.warning(
                    said, step, slowest, nodes[slowest], found["rank_seconds_max"], found["rank_seconds_median"]
                )
        return found


def spread(seconds_w: Tensor) -> dict[str, float]:
    """The least, the median and the most of the ranks' seconds (W,), and which rank's the most are."""
    return {
        "rank_seconds_min": float(seconds_w.min()),
        "rank_seconds_median": float(seconds_w.median()),
        "rank_seconds_max": float(seconds_w.max()),
        "slowest_rank": float(seconds_w.argmax()),
    }
