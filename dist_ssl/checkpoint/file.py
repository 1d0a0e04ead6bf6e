"""One rank's tensors as one safetensors file: filled from the device into a reused host buffer, read back by ranges.

The host buffer *is* the file (8 bytes of length, a JSON header, the data), so that saving is one copy from the device
and one write. Copying into a fresh buffer takes six times as long (measured: 0.55 s against 0.09 s for 1.2 GB).
"""

from __future__ import annotations

import json
import mmap
from functools import cached_property
from typing import Any

import torch
from isal import isal_zlib
from torch import Tensor

from dist_ssl.storage import Store, retry
from dist_ssl.storage.large_reads import read_file

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
_BLOCK_BYTES = 2**22
READ_AHEAD_BYTES = 2**20


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

    def not_finite(self) -> list[str]:
        """Names of the tensors that hold a NaN or an infinity: one pass over host memory, 8 GB/s on one core."""
        return [
            name
            for (name, dtype, numel), place in zip(self._layout, self._places, strict=True)
            if numel and dtype.is_floating_point and not torch.stack(torch.aminmax(place)).isfinite().all()
        ]

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


def _checksum(path: str) -> int:
    crc, block = 0, memoryview(bytearray(_BLOCK_BYTES))  # one: touching fresh memory costs more than reading into it
    with open(path, "rb", buffering=0) as file:
        while length := file.readinto(block):
            crc = isal_zlib.crc32(block[:length], crc)
    return crc


class FileReader:
    """Ranges of the tensors in a safetensors file: of a local one mapped, of one in an object store requested."""

    def __init__(self, store: Store, name: str, num_bytes: int):
        self._store, self._name, self._num_bytes, self._url = store, name, num_bytes, store.url(name)
        self._data: mmap.mmap | bytearray | None = None
        self._ahead, self._ahead_from = bytearray(), 0
        if (path := store.local_path(name)) is not None:
            with open(path, "rb") as file:
                # Private, since torch wants memory that could be written; nobody writes to it.
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def checksum(self, keep: bool) -> int:
        """crc32 of the file. With `keep` an object stays in memory, so that it is not fetched twice.

        Raises StorageError where it can't be read, also of a disk.
        """
        if (path := self._store.local_path(self._name)) is not None:
            return retry(self._url, self._store.config, lambda: _checksum(path))
        whole = bytearray(self._num_bytes if keep else 0)

        def take(offset: int, data: bytes) -> None:
            if keep:
                whole[offset : offset + len(data)] = data

        total = read_file(self._url, self._store.config, self._num_bytes, take)
        self._data = whole if keep else None
        assert total is not None
        return total

    @cached_property
    def header(self) -> dict[str, Any]:
        """The tensors' types and places, which count from the end of the header. Raises ValueError where it is none."""
        length = int.from_bytes(self._range(0, 8), "little")
        if length > _LONGEST_HEADER:
            raise ValueError(f"{self._url}: not a safetensors file: a header of {length} bytes")
        try:
            described: dict[str, Any] = json.loads(bytes(self._range(8, 8 + length)))
            for place in described.values():
                place["data_offsets"] = [8 + length + offset for offset in place["data_offsets"]]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self._url}: not a safetensors file: {error!r} in its header") from None
        return described

    def place(self, key: str) -> int:
        """Where a tensor begins: reading in this order asks an object store least. Raises KeyError."""
        return int(self.header[key]["data_offsets"][0])

    def read(self, key: str, start: int, length: int) -> Tensor:
        """Elements [start, start + length) of a tensor, 1-D, to copy from: of a mapped file a view. Raises KeyError."""
        dtype = _TYPES[self.header[key]["dtype"]]
        first = self.place(key) + start * dtype.itemsize
        data = self._range(first, first + length * dtype.itemsize)
        return torch.frombuffer(data, dtype=dtype) if length else torch.empty(0, dtype=dtype)

    def _range(self, start: int, stop: int) -> memoryview:
        data = self._data
        there = self._num_bytes if data is None else len(data)
        if stop > there:
            raise ValueError(f"{self._url}: expected bytes {start} to {stop}, but there are {there}")
        return self._requested(start, stop) if data is None else memoryview(data)[start:stop]

    def _requested(self, start: int, stop: int) -> memoryview:
        """Bytes of an object, and with them what probably is asked for next: a request costs as much as its wait."""
        first = self._ahead_from
        if not first <= start <= stop <= first + len(self._ahead):
            end = max(stop, min(start + READ_AHEAD_BYTES, self._num_bytes))
            self._ahead_from, self._ahead = start, bytearray(self._store.read(self._name, start, end))
        return memoryview(self._ahead)[start - self._ahead_from : stop - self._ahead_from]
