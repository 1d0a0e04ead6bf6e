"""One rank's tensors as one safetensors file: filled from the device into a reused host buffer, read back by ranges.

The host buffer *is* the file (8 bytes of length, a JSON header, the data), so that saving is one copy from the device
and one write. Copying into a fresh buffer takes six times as long (measured: 0.55 s against 0.09 s for 1.2 GB).
"""

from __future__ import annotations

import json
import mmap
from typing import Any

import torch
from torch import Tensor

from dist_ssl import storage
from dist_ssl.config import StorageConfig

_NAMES = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_TYPES = {name: dtype for dtype, name in _NAMES.items()}
_LONGEST_HEADER = 2**27


class HostBuffer:
    """A safetensors file in host memory, pinned where there is a GPU, laid out again only when the tensors change."""

    def __init__(self) -> None:
        self._layout: list[tuple[str, torch.dtype, int]] = []
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._places: list[Tensor] = []

    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Copy 1-D or any-shaped tensors in, flattened; returns when they are all in host memory."""
        layout = [(name, tensor.dtype, tensor.numel()) for name, tensor in tensors.items()]
        if layout != self._layout:
            self._lay_out(layout)
        for place, tensor in zip(self._places, tensors.values(), strict=True):
            place.copy_(tensor.detach().reshape(-1), non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()

    def view(self) -> memoryview:
        return memoryview(self._bytes.numpy())  # type: ignore[arg-type]

    def _lay_out(self, layout: list[tuple[str, torch.dtype, int]]) -> None:
        # The format allows no holes between tensors, so the widest types go first and all are aligned.
        header: dict[str, Any] = {}
        end = 0
        for name, dtype, numel in sorted(layout, key=lambda item: -item[1].itemsize):
            start, end = end, end + numel * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": [numel], "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        first = 8 + len(text)
        self._bytes = torch.empty(first + end, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        self._bytes[:first] = torch.frombuffer(bytearray(len(text).to_bytes(8, "little") + text), dtype=torch.uint8)
        self._places = []
        for name, dtype, _ in layout:
            start, stop = header[name]["data_offsets"]
            self._places.append(self._bytes[first + start : first + stop].view(dtype))
        self._layout = layout


class FileReader:
    """Ranges of the tensors in a safetensors file, local or in an object store; the header is read once."""

    def __init__(self, url: str, config: StorageConfig):
        self._url, self._config = url, config
        self._map: mmap.mmap | None = None
        if storage.is_local(url):
            with open(storage.filesystem(url, config)[1], "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        length = int.from_bytes(self._read(0, 8), "little")
        if length > _LONGEST_HEADER:
            raise ValueError(f"{url}: not a safetensors file: a header of {length} bytes")
        self._header: dict[str, Any] = json.loads(self._read(8, 8 + length))
        self._first = 8 + length

    def read(self, key: str, start: int, length: int) -> Tensor:
        """Elements [start, start + length) of a tensor, 1-D, in memory of its own. Raises KeyError."""
        described = self._header[key]
        dtype = _TYPES[described["dtype"]]
        first = self._first + described["data_offsets"][0] + start * dtype.itemsize
        data = self._read(first, first + length * dtype.itemsize)
        return torch.frombuffer(bytearray(data), dtype=dtype) if length else torch.empty(0, dtype=dtype)

    def _read(self, start: int, stop: int) -> bytes:
        if self._map is not None:
            return self._map[start:stop]
        return storage.read_bytes(self._url, self._config, start, stop)
