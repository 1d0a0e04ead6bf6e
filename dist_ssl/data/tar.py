"""Reading a tar's member table, of shards that anybody made: ustar, pax, GNU long names.

Headers of ordinary files are read here, in a third of `tarfile`'s time; it parses all others, and whatever is odd.
Nothing is ever extracted, so a name is only a name. What `tarfile` takes for a silent end (a cut at a member boundary,
a damaged header) is an error here.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import BinaryIO, NamedTuple

import numpy as np
from isal import isal_zlib

from dist_ssl.config import UserError
from dist_ssl.data.decode import ENDINGS
from dist_ssl.data.manifest import MemberIndex

MAX_HEADER_BYTES = 2**20  # a pax header or long name that claims more is hostile
MAX_JSON_BYTES = 2**20
MAX_LABEL_BYTES = 32
MAX_LABEL = 2**31 - 1
_BLOCK = 512
_NUMBERS = re.compile(rb"([0-7]{1,11})[ \0]+ *([0-7]{1,7})[ \0]*")  # a header's size and checksum, in octal digits


class _Headers:
    """A file as tarfile sees it: seeks are free, reads are of headers only and bounded."""

    def __init__(self, file: BinaryIO, name: str):
        self._file, self._name = file, name
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise UserError(f"{self._name}: a header of {size} bytes; expected at most {MAX_HEADER_BYTES}")
        return self._file.read(size)


class _Member(NamedTuple):
    name: str
    size: int
    offset_data: int


@dataclass
class _Sample:
    key: str
    image: tuple[int, int] | None = None
    crc32: int = 0
    json: tuple[int, int] = (0, 0)
    label: bytes | None = None  # of its .cls
    json_label: int | UserError = -1


def index_tar(
    file: BinaryIO, name: str, num_bytes: int, crc32: int | None, json_label: str | None = None
) -> tuple[MemberIndex, list[str]]:
    """The member index of an open, seekable tar, and the keys of samples without an image, which are left out.

    `crc32` is that of the whole file; None for an index of headers only, for which no image is read.

    Members group by key as WebDataset groups them: the name up to the first dot of its last part. The label is that
    of a .cls member, or the field `json_label` of the .json. Raises UserError for a tar that is cut, damaged, empty,
    or names members by absolute or climbing paths.
    """
    samples: list[_Sample] = []
    seen: set[str] = set()
    for member in _members(file, name, num_bytes):
        key, extension = split_name(member.name, name)
        if not extension:
            continue
        if not samples or samples[-1].key != key:
            if key in seen:
                raise UserError(f"{name}: the members of {key!r} do not stand together; sort the tar by name")
            seen.add(key)
            samples.append(_Sample(key))
        # What is wanted of a member is read at once: by ranges, it comes with its header.
        place = (member.offset_data, member.size)
        sample = samples[-1]
        if extension in ENDINGS and sample.image is None:
            sample.image = place
            file.seek(place[0] - _BLOCK if crc32 is None else place[0])
            sample.crc32 = isal_zlib.crc32(file.read(_BLOCK if crc32 is None else place[1]))
        elif extension == "json":
            sample.json = place
            if json_label and 0 < place[1] <= MAX_JSON_BYTES:
                file.seek(place[0])
                sample.json_label = _json_label(file.read(place[1]), json_label, f"{name}: {key}")
        elif extension == "cls":
            sample.label = None
            if place[1] <= MAX_LABEL_BYTES:
                file.seek(place[0])
                sample.label = file.read(place[1])
    whole = [sample for sample in samples if sample.image]
    crcs, labels = [sample.crc32 for sample in whole], [_label(sample, name) for sample in whole]
    images = np.array([sample.image for sample in whole], dtype=np.uint64).reshape(-1, 2)
    jsons = np.array([sample.json for sample in whole], dtype=np.uint64).reshape(-1, 2)
    index = MemberIndex(
        num_bytes, crc32 or 0, [sample.key for sample in whole], images[:, 0], images[:, 1], np.array(crcs, np.uint32),
        np.array(labels, np.int64), jsons[:, 0], jsons[:, 1], crc32 is None,
    )  # fmt: skip
    index = replace(index, shard_crc32=index.table_crc32) if crc32 is None else index
    return index, [sample.key for sample in samples if not sample.image]


def split_name(member: str, shard: str) -> tuple[str, str]:
    """(key, extension in lower case) of a member's name, as WebDataset splits it.

    Raises UserError for a name that is absolute or climbs out of the archive.
    """
    if member.startswith("/") or ".." in member.split("/") or "\0" in member:
        raise UserError(f"{shard}: refused the member {member!r}: names may not be absolute or hold '..'")
    match = re.fullmatch(r"((?:.*/|)[^.]+)[.]([^/]*)", member)
    return (match[1], match[2].lower()) if match else (member, "")


def _members(file: BinaryIO, name: str, num_bytes: int) -> Iterator[_Member]:
    """The regular files of a tar, in order; the caller may move about in it meanwhile."""
    if num_bytes == 0:
        raise UserError(f"{name}: an empty file, expected a tar")
    last = ""  # of any kind
    try:
        file.seek(0)
        with tarfile.open(fileobj=_Headers(file, name), mode="r:") as archive:  # type: ignore[call-overload]
            member, archive.firstmember = archive.firstmember, None
            end = archive.offset
            while member is not None:
                last = member.name
                if member.isreg():
                    yield _Member(member.name, member.size, member.offset_data)
                while end < num_bytes:
                    file.seek(end)
                    # Once there was a global pax header, only tarfile knows what it changes.
                    found = _ordinary(file.read(_BLOCK), end) if not archive.pax_headers else None
                    if found is None:
                        break
                    yield found
                    last, end = found.name, found.offset_data + -(-found.size // _BLOCK) * _BLOCK
                archive.offset = end
                member = archive.next()
                end = archive.offset
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{name}: not a whole tar: {error}") from None
    file.seek(end)
    closing = file.read(_BLOCK)
    if len(closing) < _BLOCK:
        raise UserError(f"{name}: cut after {num_bytes} bytes, after the member {last!r}: no end mark")
    if closing.strip(b"\0"):
        raise UserError(f"{name}: damaged header at byte {end}, after the member {last!r}")


def _ordinary(header: bytes, place: int) -> _Member | None:
    """The member of a regular file's ustar header that lies at `place`; None for any other, and for one that is odd."""
    if len(header) < _BLOCK or header[257:262] != b"ustar" or header[156:157] not in (b"0", b"\0"):
        return None
    numbers = _NUMBERS.fullmatch(header[124:136] + header[148:156])
    if numbers is None or int(numbers[2], 8) != sum(header) - sum(header[148:156]) + 8 * ord(" "):
        return None
    name, prefix = (
        field.partition(b"\0")[0].decode("utf-8", "surrogateescape") for field in (header[:100], header[345:500])
    )
    if name.endswith("/"):  # a directory, in old tars
        return None
    return _Member(f"{prefix}/{name}" if prefix else name, int(numbers[1], 8), place + _BLOCK)


def _label(sample: _Sample, shard: str) -> int:
    label = sample.json_label
    if sample.label is not None:
        try:
            label = int(sample.label)
        except ValueError:
            label = UserError(f"{shard}: {sample.key}: its label is no whole number")
    if isinstance(label, UserError):
        raise label
    if not -1 <= label <= MAX_LABEL:
        raise UserError(f"{shard}: {sample.key}: expected a label from 0 to {MAX_LABEL}, got {label}")
    return label


def _json_label(data: bytes, field: str, name: str) -> int | UserError:
    """The label in a .json, or what is wrong with it, which counts where its sample is kept and has no .cls."""
    try:
        return int(json.loads(data)[field])
    except KeyError:
        return UserError(f"{name}: its .json has no field {field!r}")
    except (ValueError, TypeError, RecursionError):
        return UserError(f"{name}: its label is no whole number")
