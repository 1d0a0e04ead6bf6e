"""Images that are read where they lie, without a copy into shards: the files of a folder, the rows of an IDX file.

A manifest lists them in parts, as it lists shards, each with a member index, so that plan, ledger and resume are the
same. Of a folder a member's key is its path under it; of an IDX file the offset is that in its pixels. What changed
since it was indexed is an error, not a bad sample: nobody promised that a folder stays as it is, and a run that went
on with other images would not be the run that was begun.
"""

from __future__ import annotations

import contextlib
import io
import os
import shlex
from collections.abc import Iterator
from typing import Any

from isal import isal_zlib
from PIL import Image

from dist_ssl import storage
from dist_ssl.config import StorageConfig, UserError
from dist_ssl.data import idx
from dist_ssl.data.decode import BadSample, decode
from dist_ssl.data.manifest import MemberIndex, Shard, load_manifest, manifest_folder


def read_image(shard: Shard, index: MemberIndex, member: int, config: StorageConfig) -> bytes:
    """The bytes of an image file. Raises UserError where it is gone or not the one that was indexed."""
    data, width = _bytes_of(shard, index, member, config)
    if (len(data), isal_zlib.crc32(data)) != (int(index.sizes[member]), int(index.crcs[member])):
        raise _changed(shard, index.keys[member], "is not the image that was indexed")
    return data if width is None else as_bitmap(data, width)


def damaged(
    shard: Shard, index: MemberIndex, max_pixels: int | None, config: StorageConfig
) -> Iterator[tuple[str, str]]:
    """(key, reason) of each member that changed since, and with `max_pixels` of each that can't be decoded."""
    for member, key in enumerate(index.keys):
        try:
            data = read_image(shard, index, member, config)
            if max_pixels is not None:
                decode(data, max_pixels)
        except (UserError, BadSample) as error:
            yield key, str(error)


def as_bitmap(pixels: bytes, width: int) -> bytes:
    """Grey pixels as a file: of all formats the one that costs least to write and to read."""
    buffer = io.BytesIO()
    Image.frombytes("L", (width, len(pixels) // width), pixels).save(buffer, "BMP")
    return buffer.getvalue()


def _bytes_of(shard: Shard, index: MemberIndex, member: int, config: StorageConfig) -> tuple[bytes, int | None]:
    """What lies there now, a byte more where it grew; of an IDX file pixels and their width."""
    size, key = int(index.sizes[member]), index.keys[member]
    if shard.kind == "idx":
        pixels = idx.read(shard.url, 3)
        start = int(index.offsets[member])
        return pixels.reshape(-1)[start : start + size].tobytes(), pixels.shape[2]
    if key.startswith("/") or ".." in key.split("/") or "\0" in key:
        raise UserError(f"{shard.index_url}: refused {key!r}: names may not be absolute or hold '..'")
    path = os.path.join(shard.url, key)

    def read() -> bytes:
        with open(path, "rb", buffering=0) as file:
            return file.read(size + 1)

    try:
        return storage.retry(path, config, read), None
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise _changed(shard, key, "is gone") from None


def _changed(shard: Shard, key: str, what: str) -> UserError:
    made: dict[str, Any] = {}
    place = os.path.dirname(shard.index_url)
    with contextlib.suppress(OSError, UserError):  # as it was made
        made = load_manifest(place, StorageConfig()).details
    images = f"{shard.kind}:{shard.url}"
    index = f"dist-ssl shards index {shlex.quote(made.get('source', images) if shard.kind == 'idx' else images)}"
    if made.get("test_fraction"):
        index += f" --test-fraction {made['test_fraction']:g}"
        place = os.path.dirname(place)
    index += f" --seed {made['seed']}" if made.get("seed") else ""
    index += f" --output {shlex.quote(place)}" if place != manifest_folder(images) else ""
    where = f"{shard.url}/{key}" if shard.kind == "folder" else f"{shard.url}, image {key}"
    return UserError(
        f"{where}: {what}; put it back and start again, which goes on, or, for a new run, index the images as they are "
        f"now: {index} --rebuild"
    )
