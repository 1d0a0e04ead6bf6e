"""How far a long job is: a bar on a terminal; in a log file a line now and then, and one at its end."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any

log = logging.getLogger(__name__)

FIRST_SECONDS, LINE_SECONDS = 5.0, 30.0  # until a log's first line, and between those after it


def duration(seconds: float) -> str:
    """40 s, 3 min 05 s, 2 h 10 min, 3 d 4 h."""
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 1440:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


class Progress(ExitStack):
    """Use as `with Progress("reading", total=100) as progress: progress.advance(10)`. Not `shown`, it does nothing.

    `done` of the total were so before; a bar that `stays` is left on the terminal at the end.
    """

    def __init__(self, what: str, total: int, shown: bool = True, done: int = 0, stays: bool = False):
        super().__init__()
        self._what, self._total, self._shown, self._done, self._stays = what, total, shown, done, stays
        self._note, self._started = "", time.monotonic()
        self._next_line = self._started + FIRST_SECONDS
        self._first: tuple[float, int] | None = None  # when how many were done, once the first of this start was
        self._bar: Any = None

    def __enter__(self) -> Progress:
        super().__enter__()
        if self._shown and sys.stderr.isatty():
            from rich import progress as rich
            from rich.console import Console

            columns = (
                rich.TextColumn("{task.description}"),
                rich.BarColumn(bar_width=24),
                rich.MofNCompleteColumn(),
                rich.TextColumn("{task.fields[note]}"),
                rich.TimeRemainingColumn(),
            )
            bar = rich.Progress(*columns, console=Console(stderr=True), transient=not self._stays)
            self._bar = self.enter_context(bar)
            self._task = self._bar.add_task(self._what, total=self._total, completed=self._done, note="")
        return self

    def advance(self, count: int = 1, doing: str | None = None, note: str | None = None) -> None:
        """`count` more of the total are done.

        `doing` says what comes next, where that changes; `note` what there is to tell, such as a loss, until the next.
        """
        self._done += count
        self._note = self._note if note is None else note
        what = f"{self._what}: {doing}" if doing else self._what
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, description=what, note=self._note)
        elif self._shown and self._done < self._total and (now := time.monotonic()) >= self._next_line:
            self._next_line = now + (LINE_SECONDS if self._first else FIRST_SECONDS)
            self._log(f"{what}: {self._done} of {self._total}{self._time_left(now)}")
        if count and self._first is None:
            self._first = time.monotonic(), self._done

    def __exit__(self, kind: Any, *details: Any) -> Any:
        if self._shown and kind is None and self._bar is None:
            self._log(f"{self._what}: {self._done} done in {time.monotonic() - self._started:.1f} s")
        return super().__exit__(kind, *details)

    def _time_left(self, now: float) -> str:
        """By the speed since the first was done, before which all got ready; empty where it is nothing or not known."""
        since, done = self._first or (now, self._done)
        if self._done == done:
            return ""
        seconds = (self._total - self._done) * (now - since) / (self._done - done)
        return f", {duration(seconds)} left" if seconds >= 1 else ""

    def _log(self, line: str) -> None:
        log.info("%s", f"{line}, {self._note}" if self._note else line)


def track(items: Iterable[Any], total: int, what: str, shown: bool = True) -> Iterator[Any]:
    """The items, their progress shown."""
    with Progress(what, total, shown) as progress:
        for item in items:
            yield item
            progress.advance()
