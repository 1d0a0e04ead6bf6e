"""Reading IDX, the format of MNIST's files: two zero bytes, 8 for "unsigned byte", the number of dimensions, their
sizes as big-endian 32-bit numbers, then the bytes. A file's claims are held against its length before they are used.
"""

from __future__ import annotations

import gzip
import os
import zlib
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_ssl.config import UserError

_GZIP_RATIO = 1032  # deflate makes a byte of at most so many


@lru_cache(maxsize=2)  # a worker asks once a shard for the same two files
def read(path: str, num_dims: int) -> NDArray[np.uint8]:
    """The array of an IDX file of unsigned bytes with `num_dims` dimensions, gzipped or not; read-only.

    Raises UserError where the file is not that, is cut, or holds no item.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; expected an IDX file, such as train-images-idx3-ubyte.gz")
    with open(path, "rb") as plain:
        zipped = plain.read(2) == b"\x1f\x8b"
        plain.seek(0)
        file: Any = gzip.GzipFile(fileobj=plain) if zipped else plain
        try:
            return _read(file, path, num_dims, os.path.getsize(path) * (_GZIP_RATIO if zipped else 1))
        except (EOFError, OSError, zlib.error) as error:
            raise UserError(f"{path}: not a whole gzip file: {error}") from None


def _read(file: Any, path: str, num_dims: int, most_bytes: int) -> NDArray[np.uint8]:
    magic = file.read(4)
    if magic != bytes((0, 0, 8, num_dims)):
        raise UserError(
            f"{path}: begins with {magic.hex(' ')}; expected 00 00 08 {num_dims:02x}, "
            f"an IDX file of unsigned bytes with {num_dims} dimension{'s' if num_dims > 1 else ''}"
        )
    header = file.read(4 * num_dims)
    sizes = [int.from_bytes(header[i : i + 4]) for i in range(0, len(header), 4)]
    count = prod(sizes)
    if len(header) < 4 * num_dims or count > most_bytes:
        raise UserError(f"{path}: its header tells of {'x'.join(map(str, sizes))} bytes, more than the file can hold")
    if count == 0:
        raise UserError(f"{path}: empty: {'x'.join(map(str, sizes))}")
    data = file.read(count + 1)
    if len(data) != count:
        found = f"only {len(data)}" if len(data) < count else "more"
        raise UserError(f"{path}: expected {'x'.join(map(str, sizes))} = {count} bytes by its header, found {found}")
    return np.frombuffer(data, np.uint8).reshape(sizes)
