"""Which code a tensor takes: a GPU's kernels, or the CPU's. Every room asks here, so that the GPU's way can be followed
where there is no GPU: on fake tensors that only have shapes, or on small CPU tensors with stand-ins for its kernels.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator

from torch import Tensor

HAS_TRITON = importlib.util.find_spec("triton") is not None  # torch's builds without CUDA bring none
_as_on_gpu = False


def on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda or _as_on_gpu


@contextlib.contextmanager
def as_on_gpu() -> Iterator[None]:
    """In here every tensor takes the way that it would take on a GPU."""
    global _as_on_gpu
    before, _as_on_gpu = _as_on_gpu, True
    try:
        yield
    finally:
        _as_on_gpu = before
