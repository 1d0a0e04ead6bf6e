"""What a piece of code sends to other ranks and how large its tensors get, seen from torch's dispatcher."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Count(TorchDispatchMode):
    """Inside `with Count() as count`: collectives as (name, bytes given by this rank), and the largest tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: list[tuple[str, int]] = []
        self.largest = 0  # elements

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            name = func.name().removeprefix("c10d::").strip("_")
            given = args[1] if name.startswith(("allgather", "alltoall", "scatter")) else args[0]
            self.collectives.append((name, sum(t.nbytes for t in _tensors(given))))
        elif isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.numel())
        return out

    def wire_bytes(self, ranks: int) -> int:
        return wire_bytes(self.collectives, ranks)


def wire_bytes(collectives: list[tuple[str, int]], ranks: int) -> int:
    """Bytes that one rank sends: ring algorithms, which no backend can undercut."""
    share = (ranks - 1) / ranks
    factor = {"allgather": ranks - 1, "allgather_base": ranks - 1, "reduce_scatter_base": ranks - 1}
    factor |= {"allreduce": 2 * share, "alltoall": share, "scatter": share, "broadcast": share}
    return round(sum(factor[name] * size for name, size in collectives))


def _tensors(value: Any) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else [t for part in value for t in _tensors(part)]
