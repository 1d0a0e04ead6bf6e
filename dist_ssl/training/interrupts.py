"""What ends a run from outside: signals, a wall-time limit, and a watchdog over a run that has stopped moving."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import logging
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from dist_ssl.config.environment import EXIT_HANGING, STOP_SIGNALS, exit_code_file, started_by_local_launcher
from dist_ssl.distributed import rank

log = logging.getLogger(__name__)

# What a rank asks for is heard when the next step is queued, and the commit follows that step's end: two steps. The
# third, and half of a save, are for those that take longer than any before.
STEPS_BEFORE_COMMIT, SAVES_BEFORE_LIMIT = 3, 1.5


class StopRequest:
    """Set by SIGTERM, SIGINT, SIGUSR1, SIGUSR2 or the wall-time limit, from `started` on by time.monotonic.

    The loop asks after each step; the limit is heeded early enough for a commit before it.

    A signal only sets a flag: saving is collective, so it waits until all ranks agree on the step. Where the loop does
    not come to an end within `grace_seconds` of a signal (a peer died, and this rank waits for it) the process exits
    without saving.
    """

    def __init__(self, grace_seconds: float, wall_time_minutes: float | None, started: float):
        self._grace_seconds = grace_seconds
        self._limit = started + wall_time_minutes * 60 if wall_time_minutes else float("inf")
        self._asked_at: deque[float] = deque(maxlen=16)  # a first step that was slow to compile is forgotten
        self._is_late = False
        self._signal: int | None = None
        self._agreed = False
        self._timer: threading.Timer | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._on_signal) for number in STOP_SIGNALS}
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # the CLI blocks some until now
        return self

    def agreed(self) -> None:
        """All ranks have ended their step: from here on the commit may take as long as it takes, whatever comes."""
        self._agreed = True
        if self._timer is not None:
            self._timer.cancel()

    def __exit__(self, *exception: Any) -> None:
        self.agreed()
        if self._before:
            # Too late to matter: the run is over, and must not end as one that was killed.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGUSR2})
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def is_due(self, seconds_to_save: float) -> bool:
        """Whether to stop; call once a step. A save from now on would take so many seconds."""
        now = time.monotonic()
        self._asked_at.append(now)
        slowest_step = max((later - one for one, later in pairwise(self._asked_at)), default=0.0)
        reserve = STEPS_BEFORE_COMMIT * slowest_step + SAVES_BEFORE_LIMIT * seconds_to_save
        self._is_late |= now + reserve > self._limit
        return self._signal is not None or self._is_late

    def reason(self) -> str:
        if self._signal is not None:
            return signal.Signals(self._signal).name
        return "checkpoint.wall_time_minutes" if self._is_late else "a signal to another rank, or its time limit"

    def _on_signal(self, number: int, frame: Any) -> None:
        if self._signal is None:
            self._signal = number
            if self._agreed:
                return
            self._timer = threading.Timer(self._grace_seconds, self._give_up)
            self._timer.daemon = True
            self._timer.start()

    def _give_up(self) -> None:
        message = (
            f"rank {rank()}: the ranks did not agree to stop within engine.grace_seconds = {self._grace_seconds:g}, "
            "which must hold two steps: a peer may be gone; exiting without saving\n"
        )
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, message.encode())
        os._exit(1)


class Watchdog:
    """Ends the process, with the stacks of its threads on stderr, when `beat` was not called for `minutes`."""

    def __init__(self, minutes: float):
        self._seconds, self._paused = minutes * 60, False
        self._last, self._step = time.monotonic(), 0
        self._done = threading.Event()

    def __enter__(self) -> Watchdog:
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._done.set()

    def beat(self, step: int) -> None:
        self._last, self._step = time.monotonic(), step

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """While a save is waited for: a disk may take its time, and an object store has time-outs of its own."""
        self._paused = True
        try:
            yield
        finally:
            self._last, self._paused = time.monotonic(), False

    def _watch(self) -> None:
        while not self._done.wait(min(1.0, self._seconds / 4)):
            if not self._paused and time.monotonic() - self._last > self._seconds:
                stderr = sys.__stderr__.fileno() if sys.__stderr__ else 2
                os.write(
                    stderr,
                    f"rank {rank()}: no step since step {self._step} for engine.hang_minutes = "
                    f"{self._seconds / 60:g}: this rank or one it waits for hangs; its stacks:\n".encode(),
                )
                faulthandler.dump_traceback(file=stderr)
                os._exit(EXIT_HANGING)


def end_with_the_launcher() -> None:
    """Where the local launcher is killed with -9, its ranks get SIGTERM: they commit and end, not train on unseen."""
    if started_by_local_launcher() and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def tell_the_launcher(code: int) -> None:
    """A launcher that was signalled does not see its ranks' exit codes: the first of them writes its own."""
    path = exit_code_file()
    if path is not None:
        Path(path).write_text(str(code))
