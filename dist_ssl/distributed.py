"""Everything that knows ranks: the process group, gathers of rows, errors raised on all ranks.

Also which of our code, the GPU's or the CPU's, a tensor goes through.

With no process group initialised every function here is that of a world of one and calls no collective.

Legend: W world size, m rows of this rank, M rows of all ranks.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

# torch 2.14 renamed it and warns of the old name; 2.11 knows only that one.
all_gather_single = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
GOODBYE_SECONDS = 5.0  # how long a failed rank 0 stays for the others to ask who failed

_peers: dict[int, Peers] = {}  # by their number, for as long as the process group is there
_store: dist.Store | None = None  # of the process group, for ranks that can't meet in a collective any more
HAS_TRITON = importlib.util.find_spec("triton") is not None  # torch's builds without CUDA bring none
_as_on_gpu = False


@dataclass(frozen=True)
class World:
    """This process's place among the ranks, and the device it computes on."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device


@dataclass(frozen=True)
class Peers:
    """Ranks side by side that share something; `group` is None where they are all ranks, and where `size` is 1."""

    size: int
    group: dist.ProcessGroup | None = None


def on_gpu(tensor: Tensor) -> bool:
    """Whether a tensor goes through a GPU's kernels. Every room asks here, so that it can be followed without one."""
    return tensor.is_cuda or _as_on_gpu


@contextlib.contextmanager
def as_on_gpu() -> Iterator[None]:
    """In here every tensor goes the GPU's way: a fake one, or a CPU's with stand-ins for the kernels."""
    global _as_on_gpu
    before, _as_on_gpu = _as_on_gpu, True
    try:
        yield
    finally:
        _as_on_gpu = before


def in_backward() -> bool:
    """Whether autograd is at work around this forward, which then is the recomputation of one that was before."""
    return not torch.compiler.is_compiling() and bool(torch._C._current_graph_task_id() != -1)


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def everyone() -> Peers:
    return Peers(world_size())


def peers(size: int) -> Peers:
    """The `size` ranks side by side that this one is of; `size` divides the world size. Collective, once a size."""
    if size in (1, world_size()):
        return Peers(size)
    if size not in _peers:
        group, _ = dist.new_subgroups(size)
        _peers[size] = Peers(size, group)
    return _peers[size]


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def initialize(timeout_minutes: float = 30.0) -> World:
    """Join the process group that the environment describes; alone, a world of one that has a group too.

    Collective. A rank that waits longer than the timeout for its peers, in this group or any other, fails with torch's
    error.
    """
    # Here, since the losses alone should not wait for what checks configs.
    from dist_ssl.config.environment import ranks_in_environment

    values = ranks_in_environment()
    if values is None:
        values = {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
        }
        values["MASTER_PORT"] = "0"
    os.environ.update(values)  # DeepSpeed reads them again
    local_rank, cuda = int(values["LOCAL_RANK"]), torch.cuda.is_available()
    if cuda and local_rank >= torch.cuda.device_count():
        raise RuntimeError(
            f"local rank {local_rank} has no GPU of its own: this node shows {torch.cuda.device_count()}; "
            "start one rank a GPU"
        )
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        timeout = timedelta(minutes=timeout_minutes)
        # Else every other group, DeepSpeed's clone of this one too, waits for torch's half hour.
        distributed_c10d.default_pg_timeout = timeout
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        if int(values["WORLD_SIZE"]) == 1:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        else:
            global _store
            _store, index, size = next(dist.rendezvous("env://", timeout=timeout))
            _store.set_timeout(timeout)
            dist.init_process_group(
                backend, store=_store, rank=index, world_size=size, timeout=timeout, device_id=device if cuda else None
            )
    return World(dist.get_rank(), dist.get_world_size(), local_rank, int(values["LOCAL_WORLD_SIZE"]), device)


def patience() -> timedelta:
    """How long a rank waits for its peers in a collective, of whatever group."""
    return distributed_c10d.default_pg_timeout


def shutdown() -> None:
    """Leave the process group, so that no rank is torn down while another still waits for it. Collective.

    Not for a `finally`: after an error on one rank the others wait elsewhere. That is what `fail` is for.
    """
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        _peers.clear()


def fail(exit_code: int, say: Callable[[], None]) -> int:
    """The exit code of the first rank that failed, which has called its `say`; call it before exiting on an error.

    It says so first of all: a launcher ends all ranks as soon as one is gone.

    Not collective, since the others may wait in any collective: they fail in it as this rank's connections close, ask
    here too, and learn that theirs is not the error to be told. (What waits inside NCCL is ended by its launcher.)
    """
    if _store is None or not dist.is_initialized():
        say()
        return exit_code
    first = mine = f"{rank()} {exit_code}"
    with contextlib.suppress(RuntimeError):  # the store went with rank 0: killed, it told nobody why
        first = _store.compare_set("failed", "", mine).decode()
    if first == mine:
        say()
    with contextlib.suppress(RuntimeError):
        failed = _store.add("num_failed", 1)
        if rank() == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            # The store is in this process: it stays until the others have asked.
            size, deadline = world_size(), time.monotonic() + GOODBYE_SECONDS
            leave = threading.Timer(2 * GOODBYE_SECONDS, os._exit, [exit_code])  # should leaving the group not end
            leave.daemon = True
            leave.start()
            dist.destroy_process_group()
            while failed < size and time.monotonic() < deadline:
                time.sleep(0.05)
                failed = _store.add("num_failed", 0)
    return int(first.split()[1])


def gather_rows(rows: Tensor, rows_per_rank: Sequence[int]) -> Tensor:
    """(m, ...) of each rank -> (M, ...), in rank order, without gradient. Collective: one all-gather.

    gloo and NCCL gather equal shapes only, so uneven ranks are padded to the largest.
    """
    if len(rows_per_rank) == 1:
        return rows
    largest = max(rows_per_rank)
    sent = rows.contiguous()
    if rows.shape[0] < largest:
        sent = torch.cat([sent, sent.new_zeros(largest - rows.shape[0], *rows.shape[1:])])
    received = sent.new_empty(len(rows_per_rank) * largest, *rows.shape[1:])
    all_gather_single(received, sent)
    if min(rows_per_rank) == largest:
        return received
    return torch.cat([received[r * largest : r * largest + n] for r, n in enumerate(rows_per_rank)])


def sum_over_ranks(values: Tensor) -> Tensor:
    """`values` of all ranks added up, in place, without gradient. Collective: one all-reduce."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def gather_objects(value: Any) -> list[Any]:
    """Small picklable values of all ranks, in rank order. Collective."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def broadcast_object(value: Any) -> Any:
    """Rank 0's value on every rank. Collective."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


class Verdict:
    """What all ranks have agreed on, on its way to the host: numbers summed over ranks, flags that any of them raised.

    `finite`, a bool scalar on the device, says whether all the numbers are; it is there for what is queued next.
    """

    def __init__(self, sums: Tensor, num_flags: int):
        self._num_flags = num_flags
        self.finite = sums.isfinite().all()
        self._arrived: torch.cuda.Event | None = None
        self._sums = sums
        if sums.is_cuda:
            self._sums = torch.empty(sums.shape, dtype=sums.dtype, pin_memory=True).copy_(sums, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> tuple[list[float], list[bool]]:
        """(numbers, flags) on the host; waits for the device to come so far."""
        if self._arrived is not None:
            self._arrived.synchronize()
        values = self._sums.tolist()
        split = len(values) - self._num_flags
        return values[:split], [count > 0 for count in values[split:]]


def agree(numbers: Sequence[Tensor], flags: Sequence[bool]) -> Verdict:
    """The sums over ranks of scalars on the device, and for each flag whether any rank raised it.

    Collective: one small all-reduce, on the device and by its backend, so that the host waits for nothing.
    """
    device = numbers[0].device
    raised = torch.tensor(flags, dtype=torch.float64, pin_memory=device.type == "cuda")
    sums = torch.cat([torch.stack([number.double() for number in numbers]), raised.to(device, non_blocking=True)])
    if world_size() > 1:
        dist.all_reduce(sums)
    return Verdict(sums, len(flags))


def raise_together(error: BaseException | None) -> None:
    """Raise the first rank's error on every rank, or on none. Collective.

    For a check that may fail on one rank only: the others would wait in the next collective for ever. They raise an
    error of its kind where that is made of a message alone, a RuntimeError that names it where not.
    """
    described = None if error is None else _described(error)
    for failed_rank, failure in enumerate(gather_objects(described)):
        if failure is not None:
            kind, message = failure
            if error is not None and rank() == failed_rank:
                raise error
            raise kind(f"rank {failed_rank}: {message}")


def _described(error: BaseException) -> tuple[type[BaseException], str]:
    """Its kind and message, as other ranks can receive and raise them."""
    kind, message = type(error), str(error)
    try:
        pickle.dumps(kind)
        kind(message)
    except Exception:  # json's and unicode's want more than a message; a kind that a function made can't be sent
        return RuntimeError, f"{kind.__name__}: {message}"
    return kind, message


@contextlib.contextmanager
def together() -> Iterator[None]:
    """An error in this block on any rank is raised on all of them at its end. Collective; no collective inside."""
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    raise_together(error)
