"""The manifest, which lists shards, and the member index of a shard, which is binary and read when it is needed.

A manifest is JSON and holds shards only, so that a hundred million samples load at once. A member index lists the
samples of a shard: where their image and their .json lie, checksum, label, key. Reading one runs nothing: numbers
and UTF-8. Images that stay where they are (`in_place`) are listed alike, as shards that have no tar.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray

from dist_ssl import storage
from dist_ssl.config import StorageConfig, UserError
from dist_ssl.data.patterns import absolute, expand
from dist_ssl.data.shard_list import KINDS, Kind, Shard, Shards

MANIFEST = "manifest.json"
IN_PLACE = ".dist_ssl"  # the folder of a manifest inside a folder of images, and the ending of one beside an IDX file
FORMAT = "dist_ssl manifest 1"
FORMAT_OF_HEADERS = "dist_ssl manifest 2"  # some shards of which were indexed by their headers alone

_PLAIN_NAME = re.compile(r"\w[\w.-]*")  # of a file: that says nothing of where it is
_MAGIC = b"DSSLIDX1"
_MAGIC_OF_HEADERS = b"DSSLIDX2"
_BLOCK = 512  # of a tar: a header's bytes
_HEADER = struct.Struct("<8sQQIQ")  # magic, samples, shard bytes, shard crc32, bytes of the keys
_COLUMNS = {"offsets": "<u8", "sizes": "<u8", "crcs": "<u4", "labels": "<i8"}
_COLUMNS |= {"json_offsets": "<u8", "json_sizes": "<u8", "key_ends": "<u8"}


@dataclass(frozen=True)
class MemberIndex:
    """Where the samples of one shard are; arrays of length n.

    `offsets`, `sizes`, `crcs`: the image's bytes in the tar; `labels`: -1 where there is none; `json_offsets`,
    `json_sizes`: the sample's .json, size 0 where there is none. Of a folder's files, keys are their paths under it.
    With `headers_only` no image was read: `crcs` are of the images' tar headers (name, size, time), the 512 bytes
    before each, and `shard_crc32` is `table_crc32`.
    """

    shard_bytes: int
    shard_crc32: int
    keys: Sequence[str]
    offsets: NDArray[np.uint64]
    sizes: NDArray[np.uint64]
    crcs: NDArray[np.uint32]
    labels: NDArray[np.int64]
    json_offsets: NDArray[np.uint64]
    json_sizes: NDArray[np.uint64]
    headers_only: bool = False

    def __len__(self) -> int:
        return len(self.offsets)

    def shard(self, url: str, index_url: str, kind: Kind = "tar") -> Shard:
        """Whose member index this is, as a manifest lists it."""
        return Shard(url, index_url, self.shard_bytes, len(self), self.shard_crc32, kind, self.headers_only)

    @property
    def table_crc32(self) -> int:
        """What stands for a shard whose images were not read: where they lie, their sizes, keys and headers."""
        total = isal_zlib.crc32("\0".join(self.keys).encode("utf-8", "surrogateescape"))
        for name in ("offsets", "sizes", "crcs", "json_offsets", "json_sizes"):
            total = isal_zlib.crc32(getattr(self, name).astype(_COLUMNS[name]).tobytes(), total)
        return total

    def place(self, member: int) -> tuple[int, int]:
        """Bytes [start, stop) of the tar that are read for an image; `image_in` takes it out of them."""
        start, size = int(self.offsets[member]), int(self.sizes[member])
        return start - _BLOCK * self.headers_only, start + size

    def checked(self, member: int) -> tuple[int, int]:
        """Bytes [start, stop) of the tar that `crcs` is of."""
        start, stop = self.place(member)
        return start, start + _BLOCK if self.headers_only else stop

    @property
    def difference(self) -> str:
        """What an image is called whose checksum is another."""
        told = "its header is not the one that was" if self.headers_only else "its bytes are not those that were"
        return f"{told} indexed (crc32)"

    def image_in(self, data: bytes, member: int) -> bytes | None:
        """The image in the bytes at `place`; None where they, or its header, are not those that were indexed."""
        start, stop = self.place(member)
        checked = data[:_BLOCK] if self.headers_only else data
        if len(data) != stop - start or isal_zlib.crc32(checked) != int(self.crcs[member]):
            return None
        return data[_BLOCK:] if self.headers_only else data

    def to_bytes(self) -> bytes:
        encoded = [key.encode("utf-8", "surrogateescape") for key in self.keys]
        blob = b"".join(encoded)
        ends = np.cumsum([len(key) for key in encoded], dtype=np.uint64) if encoded else np.empty(0, np.uint64)
        magic = _MAGIC_OF_HEADERS if self.headers_only else _MAGIC
        parts = [_HEADER.pack(magic, len(self), self.shard_bytes, self.shard_crc32, len(blob))]
        for name, kind in _COLUMNS.items():
            parts.append((ends if name == "key_ends" else getattr(self, name)).astype(kind).tobytes())
        body = b"".join([*parts, blob])
        return body + struct.pack("<I", isal_zlib.crc32(body))

    @staticmethod
    def from_bytes(data: bytes | memoryview, name: str) -> MemberIndex:
        """Raises UserError where the bytes are not a whole index."""
        if len(data) < _HEADER.size + 4 or isal_zlib.crc32(data[:-4]) != struct.unpack("<I", data[-4:])[0]:
            raise UserError(f"{name}: not a whole member index; build it again with `dist-ssl shards index --rebuild`")
        magic, count, shard_bytes, crc, blob_size = _HEADER.unpack_from(data)
        expected = _HEADER.size + count * sum(np.dtype(kind).itemsize for kind in _COLUMNS.values()) + blob_size + 4
        if magic not in (_MAGIC, _MAGIC_OF_HEADERS) or len(data) != expected:
            raise UserError(f"{name}: not a member index of this version; build it again with `dist-ssl shards index`")
        columns, at = {}, _HEADER.size
        for column, kind in _COLUMNS.items():
            columns[column] = np.frombuffer(data, kind, count, at)
            at += columns[column].nbytes
        keys = _Keys(data[at : at + blob_size], columns.pop("key_ends"))
        return MemberIndex(shard_bytes, crc, keys, **columns, headers_only=magic == _MAGIC_OF_HEADERS)


class _Keys(Sequence[str]):
    """Keys out of one string, made when asked for: a shard may hold tens of thousands."""

    def __init__(self, blob: bytes | memoryview, ends: NDArray[np.uint64]):
        self._blob, self._ends = blob, ends

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        if not 0 <= i < len(self):
            raise IndexError(i)
        key = self._blob[int(self._ends[i - 1]) if i else 0 : int(self._ends[i])]
        return str(key, "utf-8", "surrogateescape")


@dataclass(frozen=True)
class Manifest:
    """The shards of a data set, in order. `hash` covers order, names, counts and checksums, not where they lie.

    Of a shard that was indexed by its headers alone it covers the member table where else it covers the bytes.
    """

    url: str
    shards: Sequence[Shard]  # `Shards`, whatever it is made of
    classes: tuple[str, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)  # how it was made, for people

    def __post_init__(self) -> None:
        object.__setattr__(self, "shards", Shards.of(self.shards))

    @property
    def columns(self) -> Shards:
        return cast(Shards, self.shards)

    @property
    def counts(self) -> NDArray[np.int64]:
        return self.columns.num_samples

    @property
    def num_samples(self) -> int:
        return int(self.counts.sum())

    @cached_property
    def hash(self) -> str:
        digest = hashlib.sha256()
        for shard in self.shards:
            of_headers = "headers " if shard.headers_only else ""
            line = f"{shard.name}\0{shard.num_samples}\0{shard.num_bytes}\0{of_headers}{shard.crc32}\n"
            digest.update(line.encode())
        return digest.hexdigest()

    def to_json(self) -> str:
        base = self.url.rsplit("/", 1)[0] + "/"
        shards = [
            {
                "url": _relative(shard.url, base),
                "index": shard.index_url.removeprefix(base),
                "bytes": shard.num_bytes,
                "samples": shard.num_samples,
                "headers_crc32" if shard.headers_only else "crc32": shard.crc32,
            }
            | ({"kind": shard.kind} if shard.kind != "tar" else {})
            for shard in self.shards
        ]
        written = FORMAT_OF_HEADERS if any(shard.headers_only for shard in self.shards) else FORMAT
        values = {"format": written, "hash": self.hash, "samples": self.num_samples, "classes": list(self.classes)}
        lines = ",\n".join("  " + json.dumps(shard) for shard in shards)
        head = json.dumps(values | {"details": self.details}, indent=1).removesuffix("\n}")
        return f'{head},\n "shards": [\n{lines}\n ]\n}}\n'


def load_manifest(location: str, config: StorageConfig) -> Manifest:
    """The manifest of a directory that `shards write` filled, of a manifest file, of a brace pattern, or of images
    that stay where they are (`folder:DIR`, `idx:IMAGES`).

    A pattern's manifest lies next to its shards (`dist-ssl shards index` writes it) and may list more of them.
    Raises UserError where there is none, or where it lacks shards.
    """
    if not location:
        raise UserError("data.shards is empty: expected a directory, a manifest or a brace pattern of shards")
    if (place := manifest_folder(location)) is not None:
        if not os.path.exists(url := storage.join(place, MANIFEST)):
            raise UserError(f"{location}: not indexed yet; run `dist-ssl shards index {_to_index(location)}`")
        return read_manifest(url, config)
    storage.check_url(location)
    if location.endswith(".json"):
        return read_manifest(location, config)
    if "{" not in location and not location.endswith(".tar"):
        url = storage.join(location, MANIFEST)
        if not storage.exists(url, config):
            beside = storage.join(location, "train", MANIFEST)
            hint = (
                f"did you mean {storage.join(location, 'train')}?"
                if storage.exists(beside, config)
                else "make it with `dist-ssl shards write` or `dist-ssl shards index`"
            )
            raise UserError(f"{storage.redact(location)}: no {MANIFEST} there; {hint}")
        return read_manifest(url, config)
    urls = [absolute(url) for url in expand(location)]
    manifest = read_manifest(storage.join(common_directory(urls), MANIFEST), config)
    listed = {url: number for number, url in enumerate(manifest.columns.urls())}
    if urls == list(listed):
        return manifest
    missing = [url for url in urls if url not in listed]
    if missing:
        raise UserError(
            f"{manifest.url} does not list {missing[0]} and {len(missing) - 1} more of {len(urls)}; "
            f"run `dist-ssl shards index '{location}'`"
        )
    shards = [manifest.shards[listed[url]] for url in urls]
    return Manifest(manifest.url, shards, manifest.classes, manifest.details)


def manifest_folder(location: str) -> str | None:
    """Where the manifest of `folder:DIR` or `idx:IMAGES[:LABELS]` lies; None for what are shards.

    `folder:DIR/train` is the folder of that name, and where there is none the training part of what is in DIR.
    """
    kind, _, rest = location.partition(":")
    if kind == "idx" and rest:
        return os.path.abspath(rest.split(":")[0]) + IN_PLACE
    if kind != "folder" or not rest:
        return None
    folder, part = os.path.split(os.path.abspath(rest))
    if part in ("train", "test") and not os.path.isdir(os.path.join(folder, part)):
        return os.path.join(folder, IN_PLACE, part)
    return os.path.join(folder, part, IN_PLACE)


def _to_index(location: str) -> str:
    """What `shards index` makes `folder:DIR` or `idx:IMAGES` of, for a shell."""
    folder, part = os.path.split(location)
    if part in ("train", "test") and not os.path.isdir(location.removeprefix("folder:")):
        return f"{shlex.quote(folder)} --test-fraction 0.1"
    return shlex.quote(location)


def absolute_location(location: str) -> str:
    """What `load_manifest` takes, with local paths made absolute."""
    kind, _, rest = location.partition(":")
    if manifest_folder(location) is not None:
        return ":".join([kind, *map(os.path.abspath, rest.split(":") if kind == "idx" else [rest])])
    return location if "://" in location else os.path.abspath(location)


def common_directory(urls: Sequence[str]) -> str:
    """The deepest directory that holds all URLs."""
    first, *others = [url.split("/")[:-1] for url in urls]
    depth = len(first)
    for other in others:
        while other[:depth] != first[:depth]:
            depth -= 1
    return "/".join(first[:depth])


def read_manifest(url: str, config: StorageConfig) -> Manifest:
    """The manifest in a file. Raises UserError where there is none, or what is there is none."""
    url = absolute(url)
    try:
        values = json.loads(storage.read_bytes(url, config))
        if values["format"] not in (FORMAT, FORMAT_OF_HEADERS):
            raise UserError(f"{url}: expected {FORMAT!r} or {FORMAT_OF_HEADERS!r}, got {values['format']!r}")
        resolve = _resolver(url.rsplit("/", 1)[0])
        shards = Shards.of(
            Shard(
                resolve(str(one["url"])),
                resolve(str(one["index"])),
                int(one["bytes"]),
                int(one["samples"]),
                int(one["headers_crc32" if "headers_crc32" in one else "crc32"]),
                _kind(one),
                "headers_crc32" in one,
            )
            for one in values["shards"]
        )
        manifest = Manifest(url, shards, tuple(map(str, values.get("classes", ()))), dict(values.get("details", {})))
    except FileNotFoundError:
        raise UserError(f"{url}: no such manifest; run `dist-ssl shards index` on the shards") from None
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{url}: not a manifest of shards: {type(error).__name__}: {error}") from None
    if manifest.hash != values.get("hash"):
        raise UserError(
            f"{url}: its shards do not add up to its hash; it was edited or damaged: index the shards again"
        )
    return manifest


def _resolver(base: str) -> Callable[[str], str]:
    """`_resolve` for many URLs of few folders, each of which is looked at once."""
    folders: dict[str, str] = {}

    def resolve(url: str) -> str:
        folder, slash, name = url.rpartition("/")
        if not _PLAIN_NAME.fullmatch(name):
            return _resolve(base, url)
        if (folder := folder + slash) not in folders:
            folders[folder] = _resolve(base, f"{folder}_").removesuffix("_")
        return folders[folder] + name

    return resolve


def _resolve(base: str, url: str) -> str:
    """A shard's URL in a manifest, relative ones to the manifest. A stranger's manifest may not name other schemes."""
    storage.check_url(url)
    return url if "://" in url or url.startswith("/") else absolute(f"{base}/{url}")


def _relative(url: str, base: str) -> str:
    """To the manifest's folder: one that lies inside of the folder it lists moves with it."""
    return os.path.relpath(url, base) if base.startswith(f"{url}/") else url.removeprefix(base)


def _kind(values: dict[str, Any]) -> Kind:
    kind: Any = values.get("kind", "tar")
    if kind not in KINDS:
        raise ValueError(f"expected a kind of shard of {', '.join(KINDS)}, got {kind!r}")
    return kind


def read_member_index(shard: Shard, config: StorageConfig) -> MemberIndex:
    """The member index of a shard. Raises UserError where it is damaged or of other bytes than the manifest lists."""
    try:
        data = storage.read_bytes(shard.index_url, config)
    except FileNotFoundError:
        raise UserError(f"{shard.index_url}: no such member index; run `dist-ssl shards index` again") from None
    return member_index(shard, data)


def member_index(shard: Shard, data: bytes | memoryview) -> MemberIndex:
    """As `read_member_index`, of what was read; its arrays are views of that."""
    index = MemberIndex.from_bytes(data, shard.index_url)
    found = (index.shard_bytes, index.shard_crc32, len(index))
    if index.headers_only != shard.headers_only or found != (shard.num_bytes, shard.crc32, shard.num_samples):
        raise UserError(
            f"{shard.index_url}: is of another shard than the manifest lists: (bytes, crc32, samples) {found}, "
            f"expected {(shard.num_bytes, shard.crc32, shard.num_samples)}"
        )
    return index
