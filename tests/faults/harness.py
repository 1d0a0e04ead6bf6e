"""Real launches of `python -m launch.local` that tests kill, stop and start again."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from dist_ssl import config as config_module
from dist_ssl.config import Config

ROOT = Path(__file__).parent.parent.parent


class Launch:
    """A launcher process and the ranks under it. `output` is the file that all of them write to."""

    def __init__(self, config: Config, size: int, *arguments: str, restarts: int = 0):
        path = write_config(config)
        self.run_dir = Path(config.run.dir)
        self.output = path.parent / f"launch-{time.monotonic_ns()}.log"
        command = [sys.executable, "-m", "launch.local", "pretrain", str(path), "--ranks", str(size)]
        command += ["--max-restarts", str(restarts), *arguments]
        with open(self.output, "wb") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True
            )

    def ranks(self) -> list[psutil.Process]:
        """The rank processes, in rank order."""
        found = {}
        for child in children(self.process.pid):
            try:
                environment, command = child.environ(), child.cmdline()
            except psutil.Error:
                continue
            if "dist_ssl.cli" in command and "RANK" in environment and child.status() != psutil.STATUS_ZOMBIE:
                found[int(environment["RANK"])] = child
        return [found[rank] for rank in sorted(found)]

    def wait_for_step(self, step: int, timeout: float = 120.0) -> None:
        """Until metrics.jsonl has this step. Raises where the launch ends before."""
        deadline = time.monotonic() + timeout
        while last_step(self.run_dir) < step:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"step {step} was not reached:\n{self.said()}")
            time.sleep(0.02)

    def wait(self, timeout: float = 240.0) -> int:
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            said = self.said()
            self.kill()
            raise AssertionError(f"still running after {timeout} s:\n{said}") from None

    def processes(self) -> list[psutil.Process]:
        """Everything under the launcher, and itself."""
        return [*children(self.process.pid), psutil.Process(self.process.pid)]

    def kill(self) -> None:
        """kill -9 of the launcher and everything under it."""
        processes = self.processes()
        send(processes, signal.SIGKILL)
        self.process.wait()
        psutil.wait_procs(processes, timeout=30)

    def said(self) -> str:
        return self.output.read_text(errors="replace")


def write_config(config: Config) -> Path:
    folder = Path(config.run.dir).parent
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "given.toml"
    path.write_text(config_module.dumps(config))
    return path


def children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []


def with_no_error(call: Any) -> None:
    try:
        call()
    except psutil.Error:
        return


def last_step(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            lines = file.read().splitlines()
    except OSError:
        return -1
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (json.JSONDecodeError, KeyError):
            continue
    return -1


def send(processes: list[psutil.Process], number: int) -> None:
    for process in processes:
        with_no_error(lambda process=process: process.send_signal(number))
