"""Processes forked from one that has imported everything: a start costs a tenth of a second, not four of imports.

    child = fork(function, *arguments)    # runs function(connection, *arguments) there, then exits
    child.connection                      # this end of the pipe

The template is a process of its own: a fork of pytest's would take its threads, caches and captured output along.
Of torch it has run nothing but the imports, so no thread pool is lost in a fork.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import itertools
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing import reduction, spawn
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

IMPORTED = ("dist_ssl.training.train", "dist_ssl.cli", "pytest", "torch.utils.tensorboard")


class Child:
    """A forked process, with what is used of a `subprocess.Popen`."""

    def __init__(self, template: _Template, number: int, connection: Connection):
        self._template, self._number, self.connection = template, number, connection

    @property
    def pid(self) -> int:
        """Waits for the template's imports."""
        return self._template.answer("forked", self._number, None)  # type: ignore[return-value]

    def poll(self) -> int | None:
        return self._template.answer("ended", self._number, 0)

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def wait(self, timeout: float | None = None) -> int:
        code = self._template.answer("ended", self._number, timeout)
        if code is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        return code

    def kill(self) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


class _Template:
    """This end: asks for forks, and is told of each child's process id and exit code."""

    def __init__(self) -> None:
        here, there = socket.socketpair()
        # CUDA can't be used in a fork of a process that has asked for it: these tests are the CPU's.
        environment = os.environ | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "tests.template", str(there.fileno())]
        root = Path(__file__).parent.parent
        self._process = subprocess.Popen(command, pass_fds=[there.fileno()], env=environment, cwd=root)
        there.close()
        self._connection = Connection(here.detach())
        self._connection.send(bytes(multiprocessing.current_process().authkey))  # with which tensors are passed on
        self._numbers = itertools.count()
        self._answers: dict[tuple[str, int], int] = {}

    def close(self) -> None:
        self._connection.close()
        self._process.wait()

    def fork(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Child:
        here, there = socket.socketpair()
        spec = sys.modules["__main__"].__spec__
        self._connection.send((function, arguments, spec.name if spec else None))
        reduction.send_handle(self._connection, there.fileno(), self._process.pid)
        there.close()
        return Child(self, next(self._numbers), Connection(here.detach()))

    def answer(self, kind: str, number: int, timeout: float | None) -> int | None:
        """The process id ("forked") or exit code ("ended", -N for signal N) of a child; None after the time-out."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (kind, number) not in self._answers:
            if not self._connection.poll(None if deadline is None else max(0.0, deadline - time.monotonic())):
                return None
            said, whose, value = self._connection.recv()
            self._answers[said, whose] = value
        return self._answers[kind, number]


@functools.cache
def _started() -> _Template:
    template = _Template()
    atexit.register(template.close)
    return template


def fork(function: Callable[..., Any], *arguments: Any) -> Child:
    """Run the importable `function(connection, *arguments)` in a new process. Does not wait for it."""
    return _started().fork(function, arguments)


def _serve(parent: Connection) -> None:
    """Do as asked until the parent has ended; end its children then."""
    children: dict[int, tuple[int, int]] = {}  # file descriptor of a process -> (its number, its id)
    numbers = itertools.count()
    try:
        while True:
            for ready in wait([parent, *children]):
                if ready is parent:
                    _fork(parent, children, next(numbers))
                    continue
                number, pid = children.pop(ready)  # type: ignore[arg-type]
                os.close(ready)  # type: ignore[arg-type]
                parent.send(("ended", number, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))
    except (EOFError, ConnectionError):
        for _, pid in children.values():
            os.kill(pid, signal.SIGKILL)


def _fork(parent: Connection, children: dict[int, tuple[int, int]], number: int) -> None:
    function, arguments, main = parent.recv()
    descriptor = reduction.recv_handle(parent)
    pid = os.fork()
    if pid == 0:
        _run(parent, Connection(descriptor), function, arguments, main)
    os.close(descriptor)
    children[os.pidfd_open(pid)] = (number, pid)
    parent.send(("forked", number, pid))


def _run(
    parent: Connection,
    connection: Connection,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    main: str | None,
) -> None:
    """In the child: never returns. What it is sent later may name functions of the caller's own `-m` module."""
    code: Any = 1
    try:
        parent.close()
        if main is not None:
            spawn.prepare({"init_main_from_name": main})
        function(connection, *arguments)
        code = 0
    except SystemExit as stopped:
        code = stopped.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    for module in IMPORTED:
        importlib.import_module(module)
    connection = Connection(int(sys.argv[1]))
    multiprocessing.current_process().authkey = connection.recv()
    _serve(connection)
