"""Pools of real gloo ranks that tests reuse: even a forked process takes a while until it has done its first step.

`ranks(W).run(function, *arguments)` calls an importable function on W processes that share a process group and
returns what each of them returned, in rank order. A pool is thrown away where a rank hung or died, or some raised and
others did not: their next collectives would not match. Forked processes can't start CUDA and stay on the CPU; those of
`device_ranks(W)` are fresh, each with a GPU of its own where there are any.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection, wait
from typing import Any

from tests import template


class RankFailed(Exception):
    """A function raised on at least one rank; `tracebacks[rank]` is None where it did not."""

    def __init__(self, tracebacks: list[str | None]):
        self.tracebacks = tracebacks
        super().__init__("\n".join(f"--- rank {r}\n{text}" for r, text in enumerate(tracebacks) if text))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _serve(connection: Connection, rank: int, size: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    import torch

    from dist_ssl import distributed

    torch.set_num_threads(1)
    distributed.initialize()
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        try:
            connection.send((True, function(*arguments)))
        except BaseException:
            connection.send((False, traceback.format_exc()))
        # A run keeps what it frees for its next step; the next test has no use for it.
        ctypes.CDLL(None).malloc_trim(0)


class Fresh:
    """A process that has imported nothing yet, with what is used of a `template.Child`."""

    def __init__(self, function: Callable[..., None], *arguments: Any):
        context = multiprocessing.get_context("spawn")
        self.connection, there = context.Pipe()
        self._process = context.Process(target=function, args=(there, *arguments), daemon=True)
        self._process.start()
        there.close()

    def kill(self) -> None:
        self._process.kill()

    def wait(self) -> None:
        self._process.join()


class Pool:
    def __init__(self, size: int, start: Callable[..., Any] = template.fork):
        self.size, self._start, port = size, start, free_port()
        self.processes = [start(_serve, rank, size, port) for rank in range(size)]
        self.connections = [process.connection for process in self.processes]

    def run(self, function: Callable[..., Any], *arguments: Any, timeout: float = 240.0) -> list[Any]:
        for connection in self.connections:
            connection.send((function, arguments))
        answers: list[tuple[bool, Any] | None] = [None] * self.size
        pending, died = dict(zip(self.connections, range(self.size), strict=True)), False
        while pending:
            ready = wait(list(pending), timeout)
            if not ready:
                self.close()
                raise TimeoutError(f"ranks {sorted(pending.values())} did not answer within {timeout} s")
            for connection in ready:
                rank = pending.pop(connection)  # type: ignore[call-overload]
                try:
                    answers[rank] = connection.recv()  # type: ignore[union-attr]
                except EOFError:
                    answers[rank], died = (False, "the process died"), True
                if not answers[rank][0]:  # type: ignore[index]
                    timeout = min(timeout, 20.0)  # its peers raise too, or are stuck waiting for it
        if not all(ok for ok, _ in answers):  # type: ignore[misc]
            if died or any(ok for ok, _ in answers):  # type: ignore[misc]
                self.close()
            raise RankFailed([None if ok else text for ok, text in answers])  # type: ignore[misc]
        return [value for _, value in answers]  # type: ignore[misc]

    def close(self) -> None:
        _pools.pop((self.size, self._start), None)
        for process in self.processes:
            process.kill()
            process.wait()


_pools: dict[tuple[int, Callable[..., Any]], Pool] = {}


def ranks(size: int, start: Callable[..., Any] = template.fork) -> Pool:
    """The pool of `size` ranks, started on first use."""
    if (size, start) not in _pools:
        _pools[size, start] = Pool(size, start)
    return _pools[size, start]


def device_ranks(size: int) -> Pool:
    """The pool of `size` ranks on GPUs, or on the CPU where there are none."""
    return ranks(size, Fresh)


def start_early(sizes: Iterable[int]) -> None:
    """Start pools and don't wait for them: they import torch while other tests run."""
    for size in sizes:
        ranks(size)
