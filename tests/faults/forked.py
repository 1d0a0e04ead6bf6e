"""A launcher forked from the template (tests/template.py), as its ranks are, which run the same `dist-ssl pretrain`.

A start takes two seconds of a core then, where `launch.local` imports torch and DeepSpeed once a rank and needs
fifteen. For what comes after the start; what the launcher itself does is tested on `launch.local`.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from dist_ssl import cli
from dist_ssl.config import Config
from tests import template
from tests.faults.harness import Launch, children, write_config
from tests.pool import free_port

_context = multiprocessing.get_context("fork")


class ForkedLaunch(Launch):
    """As `Launch`, without the imports, and without restarts.

    `grace_seconds`, as torch's elastic agent has them, are between SIGTERM to the survivors of a dead rank and SIGKILL.
    """

    def __init__(self, config: Config, size: int, grace_seconds: float = 30.0, **environment: str):
        path = write_config(config)
        self.run_dir = Path(config.run.dir)
        self.output = path.parent / f"launch-{time.monotonic_ns()}.log"
        self.process = template.fork(_launch, path, size, self.output, grace_seconds, environment)

    def ranks(self) -> list[psutil.Process]:
        return sorted(children(self.process.pid), key=lambda process: process.pid)


def _launch(
    connection: Connection, path: Path, size: int, output: Path, grace_seconds: float, environment: dict[str, str]
) -> None:
    """Run the ranks; take the others down with one that fails; exit as the first of them did."""
    os.setsid()
    os.environ |= environment
    with open(output, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    port = free_port()
    ranks = [_context.Process(target=_rank, args=(path, rank, size, port)) for rank in range(size)]
    for process in ranks:
        process.start()

    def pass_on(number: int, frame: Any) -> None:
        for process in ranks:
            process.terminate()

    signal.signal(signal.SIGTERM, pass_on)
    first, kill_at = 0, float("inf")
    while True:
        running = any(process.exitcode is None for process in ranks)
        if not first and (first := next((process.exitcode for process in ranks if process.exitcode), 0)):
            kill_at = time.monotonic() + grace_seconds
            pass_on(signal.SIGTERM, None)
        if not running:
            sys.exit(first if first >= 0 else 128 - first)
        if time.monotonic() > kill_at:
            for process in ranks:
                process.kill()
        time.sleep(0.05)


def _rank(path: Path, rank: int, size: int, port: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["TORCHELASTIC_RUN_ID"] = "forked"  # the ranks end with their launcher
    sys.argv = ["dist-ssl", "pretrain", str(path)]
    cli.main()
