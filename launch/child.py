"""A command that a runner of many (`sweep`, `lab`) waits for, and that is told what the runner is told."""

from __future__ import annotations

import os
import signal
import subprocess
from types import FrameType
from typing import Any

from dist_ssl.config.environment import EXIT_RUN_ME_AGAIN, STOP_SIGNALS


def run(command: list[str], **streams: Any) -> int:
    """Run a command and return its exit code; signals to this process are the command's, which commits first.

    75 where it was told to end, however the command did: one that was about to be complete, or an evaluation, exits
    with another code, and nothing is to be run after it. `streams` are Popen's.
    """
    told: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, frame: FrameType | None) -> None:
        told.append(number)
        # Ctrl-C reaches both, being of one terminal; a second one would have a launcher kill what is about to commit.
        if process is not None and not (number == signal.SIGINT and _in_the_foreground()):
            process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in STOP_SIGNALS}
    try:
        process = subprocess.Popen(command, **streams)
        if told:  # before there was anybody to tell
            process.send_signal(told[0])
        code = process.wait()
        return EXIT_RUN_ME_AGAIN if told else code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _in_the_foreground() -> bool:
    """Whether this process's group is the one that its terminal's keys are sent to."""
    try:
        with open("/dev/tty", "rb", buffering=0) as terminal:
            return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except OSError:
        return False
