"""How far a long job is: a bar on a terminal; in a log file a line now and then, and one at its end."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any

log = logging.getLogger(__name__)

LINE_SECONDS = 30.0  # between lines of a log


class Progress(ExitStack):
    """Use as `with Progress("reading", total=100) as progress: progress.advance(10)`. Not `shown`, it does nothing."""

    def __init__(self, what: str, total: int, shown: bool = True):
        super().__init__()
        self._what, self._total, self._shown, self._done = what, total, shown, 0
        self._started = self._said = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> Progress:
        super().__enter__()
        if self._shown and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress as Bar

            self._bar = self.enter_context(Bar(console=Console(stderr=True), transient=True))
            self._task = self._bar.add_task(self._what, total=self._total)
        return self

    def advance(self, count: int = 1, doing: str | None = None) -> None:
        """`count` more of the total are done; `doing` says what comes next, where that changes."""
        self._done += count
        what = f"{self._what}: {doing}" if doing else self._what
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, description=what)
        elif self._shown and self._done < self._total and time.monotonic() - self._said >= LINE_SECONDS:
            self._said = time.monotonic()
            log.info("%s: %d of %d", what, self._done, self._total)

    def __exit__(self, kind: Any, *details: Any) -> Any:
        if self._shown and kind is None and self._bar is None:
            log.info("%s: %d done in %.1f s", self._what, self._done, time.monotonic() - self._started)
        return super().__exit__(kind, *details)


def track(items: Iterable[Any], total: int, what: str, shown: bool = True) -> Iterator[Any]:
    """The items, their progress shown."""
    with Progress(what, total, shown) as progress:
        for item in items:
            yield item
            progress.advance()
