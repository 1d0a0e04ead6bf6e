"""Indexing and verifying shards, those that somebody else wrote included: parallel, resumable, split over machines.

Of a shard only its tar headers are read, by small ranges, and its labels; with checksums every byte is, once. A member
index is written as soon as its shard was read, so that an interrupted `shards index` goes on; the manifest comes last.
"""

from __future__ import annotations

import io
import logging
import mmap
import os
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO, cast

import numpy as np
from isal import isal_zlib

from dist_ssl import storage
from dist_ssl.config import StorageConfig, UserError
from dist_ssl.data import parts
from dist_ssl.data.decode import BadSample, decode
from dist_ssl.data.in_place import damaged
from dist_ssl.data.manifest import (
    MANIFEST,
    Manifest,
    MemberIndex,
    Shard,
    common_directory,
    load_manifest,
    read_member_index,
)
from dist_ssl.data.parallel import in_processes, in_threads
from dist_ssl.data.patterns import absolute, matching
from dist_ssl.data.progress import track
from dist_ssl.data.tar import index_tar
from dist_ssl.storage.large_reads import read_file, writer
from dist_ssl.storage.windows import open_windows

SHARDS_A_TURN = 64  # that a process indexes before it reports
WINDOW_THREADS = 32  # which mostly wait for answers of a few kilobytes

Job = tuple[str, str]  # URLs of a shard and of its index
Indexed = tuple[Shard, list[str]]  # and the keys of samples without an image

log = logging.getLogger(__name__)


class _Scratch(ExitStack):
    """Temporary files to copy shards into, used again: filling one anew costs less than the pages of a fresh one."""

    def __init__(self) -> None:
        super().__init__()
        self._free: list[BinaryIO] = []

    @contextmanager
    def file(self) -> Iterator[BinaryIO]:
        try:
            file = self._free.pop()
        except IndexError:
            file = self.enter_context(tempfile.TemporaryFile())  # noqa: SIM115, it is the stack that closes it
        try:
            yield file
        finally:
            self._free.append(file)


@dataclass(frozen=True)
class Damage:
    """Something of a shard that is not what the manifest says; `key` is the sample where one can be named."""

    shard: str
    key: str | None
    reason: str

    def __str__(self) -> str:
        return f"{self.shard}: {self.key}: {self.reason}" if self.key else f"{self.shard}: {self.reason}"


def index_shards(
    location: str,
    config: StorageConfig,
    *,
    output: str | None = None,
    json_label: str | None = None,
    checksums: bool = False,
    rebuild: bool = False,
    num_workers: int | None = None,
    num_processes: int = 1,
    part: tuple[int, int] | None = None,
    progress: bool = False,
) -> Manifest:
    """Index the shards of a pattern (braces, `*`, `?`), or of a directory, and write the manifest there or in `output`.

    Labels come from .cls members, or from the field `json_label` of the .json. With `checksums` every byte is read,
    else only headers. A shard whose index is there and of its size, and has what is asked for, is skipped, unless
    `rebuild`. Each of `num_processes` has `num_workers` threads. Of `part` (k, n) only its shards are indexed, and
    what is written is the part's manifest, for `parts.merge`. Raises UserError naming the first shard that is no
    whole tar.
    """
    if storage.check_url(output or location) in storage.READ_ONLY:
        raise UserError(f"{location}: can only be read; name a folder or bucket for its index by --output FOLDER")
    urls = matching(location, ".tar", config, f" (images: folder:{location})")
    folder = absolute(output).rstrip("/") if output else common_directory(urls)
    names = [url.rsplit("/", 1)[-1] for url in urls]
    if len(set(names)) < len(names):  # of several directories: number them
        names = [f"{i:06d}-{name}" for i, name in enumerate(names)]
    jobs = [(url, storage.join(folder, f"{name}.idx")) for url, name in zip(urls, names, strict=True)]
    jobs = [jobs[i] for i in parts.span(part or (1, 1), len(jobs))]
    if urls[0].startswith("memory:"):
        num_processes = 1  # another one has another memory
    if num_workers is None and not checksums:
        num_workers = WINDOW_THREADS
    index_one = partial(_index_one, config, json_label, checksums, rebuild)
    shards, without_image = [], 0
    with closing(_indexed(index_one, jobs, num_workers, num_processes)) as found:
        for shard, missing in track(found, len(jobs), "indexing", progress):
            shards.append(shard)
            without_image += len(missing)
            if missing:
                log.warning(
                    "%s: %d samples have no image and are left out, such as %s", shard.url, len(missing), missing[0]
                )
    url, details = storage.join(folder, MANIFEST), {"source": location, "without_image": without_image}
    details |= {"json_label": json_label} if json_label is not None else {}
    if part is not None:
        options = {"checksums": checksums, "json_label": json_label}
        url, details = parts.url_of(folder, part), details | parts.details_of(part, urls, options)
    manifest = Manifest(url, tuple(shards), (), details)
    parts.write(manifest, config)
    return manifest


def verify_shards(
    location: str | Manifest,
    config: StorageConfig,
    *,
    max_pixels: int | None = None,
    num_workers: int | None = None,
    progress: bool = False,
) -> list[Damage]:
    """Read every shard of a manifest and hold it against bytes, counts and checksums. Empty where all is well.

    With `max_pixels` every image is decoded too, in processes, under that limit: what training would replace is told.
    """
    jobs = list((load_manifest(location, config) if isinstance(location, str) else location).shards)
    with _Scratch() as scratch:
        if max_pixels is None:
            found = in_threads(partial(_verify_one, config, scratch, None), jobs, num_workers)
        else:
            found = in_processes(partial(_verify_decoding, config, max_pixels), jobs, num_workers)
        with closing(found):
            return [damage for one in track(found, len(jobs), "verifying", progress) for damage in one]


def compared(manifest: Manifest, decoded: bool) -> str:
    """What `verify_shards` held against the manifest when it found nothing, in words."""
    of_headers = sum(shard.headers_only for shard in manifest.shards)
    told = "every image was decoded" if decoded else "no image was decoded"
    if of_headers == 0:
        return f"whole: every byte of {len(manifest.shards)} shards was compared, {told}"
    return (
        f"headers are those that were indexed: of {of_headers} of {len(manifest.shards)} shards names, sizes and "
        "places were compared, not the images' bytes, which their index does not know (shards index --checksums); "
        f"{told}"
    )


def _indexed(
    index_one: Callable[[_Scratch, Job], Indexed], jobs: Sequence[Job], num_workers: int | None, num_processes: int
) -> Generator[Indexed]:
    if num_processes < 2:
        with _Scratch() as scratch, closing(in_threads(partial(index_one, scratch), jobs, num_workers)) as found:
            yield from found
        return
    turns = [jobs[i : i + SHARDS_A_TURN] for i in range(0, len(jobs), SHARDS_A_TURN)]
    with closing(in_processes(partial(_index_turn, index_one, num_workers), turns, num_processes)) as done:
        for of_turn in done:
            yield from of_turn


def _index_turn(
    index_one: Callable[[_Scratch, Job], Indexed], num_workers: int | None, jobs: Sequence[Job]
) -> list[Indexed]:
    return list(_indexed(index_one, jobs, num_workers, 1))


def _index_one(
    config: StorageConfig, json_label: str | None, checksums: bool, rebuild: bool, scratch: _Scratch, job: Job
) -> Indexed:
    url, index_url = job
    try:
        num_bytes = storage.size(url, config)
    except FileNotFoundError as error:
        raise UserError(f"no such shard: {error}") from None
    if not rebuild:
        with suppress(FileNotFoundError, UserError):
            index = MemberIndex.from_bytes(storage.read_bytes(index_url, config), index_url)
            asked_anew = json_label is not None and bool((index.labels < 0).all())
            asked_anew |= checksums and index.headers_only
            if index.shard_bytes == num_bytes and not asked_anew:
                return index.shard(url, index_url), []
    with _opened(url, num_bytes, config, scratch if checksums else None) as (file, crc32):
        index, missing = index_tar(file, url, num_bytes, crc32, json_label)
    storage.write_bytes(index_url, index.to_bytes(), config)
    return index.shard(url, index_url), missing


def _verify_decoding(config: StorageConfig, max_pixels: int, shard: Shard) -> list[Damage]:
    with _Scratch() as scratch:
        return _verify_one(config, scratch, max_pixels, shard)


def _verify_one(config: StorageConfig, scratch: _Scratch, max_pixels: int | None, shard: Shard) -> list[Damage]:
    try:
        index = read_member_index(shard, config)
        if shard.kind != "tar":
            return [Damage(shard.url, *found) for found in damaged(shard, index, max_pixels, config)]
        num_bytes = storage.size(shard.url, config)
        with _opened(shard.url, num_bytes, config, None if index.headers_only else scratch) as (file, crc32):
            if index.headers_only and num_bytes == shard.num_bytes:
                crc32 = _table_crc32(file, shard)
            changed = (num_bytes, crc32) != (shard.num_bytes, shard.crc32)
            damages = _damaged_members(file, shard, index, num_bytes) if changed else []
            undecodable = _undecodable_members(file, shard, index, max_pixels, damages) if max_pixels else []
    except FileNotFoundError:
        return [Damage(shard.url, None, "is missing")]
    except UserError as error:
        return [Damage(shard.url, None, str(error))]
    if num_bytes != shard.num_bytes:
        damages.insert(0, Damage(shard.url, None, f"holds {num_bytes} bytes, expected {shard.num_bytes}"))
    elif changed and not damages:
        whole = "headers are those that were indexed: others" if shard.headers_only else "images are whole: a header"
        damages.append(Damage(shard.url, None, f"its checksum differs, its {whole} or label is not"))
    return damages + undecodable


def _table_crc32(file: BinaryIO, shard: Shard) -> int | None:
    with suppress(UserError):
        return index_tar(file, shard.url, shard.num_bytes, None)[0].shard_crc32
    return None


def _damaged_members(file: BinaryIO, shard: Shard, index: MemberIndex, num_bytes: int) -> list[Damage]:
    damages = []
    for i in range(len(index)):
        start, stop = index.checked(i)
        if int(index.offsets[i]) + int(index.sizes[i]) > num_bytes:
            damages.append(Damage(shard.url, index.keys[i], "lies past the end of the file"))
            continue
        file.seek(start)
        if isal_zlib.crc32(file.read(stop - start)) != int(index.crcs[i]):
            damages.append(Damage(shard.url, index.keys[i], index.difference))
    return damages


def _undecodable_members(
    file: BinaryIO, shard: Shard, index: MemberIndex, max_pixels: int, damaged: list[Damage]
) -> list[Damage]:
    """What can't be decoded though its bytes are those that were indexed."""
    found, told = [], {damage.key for damage in damaged}
    for i, key in enumerate(index.keys):
        if key in told:
            continue
        file.seek(int(index.offsets[i]))
        try:
            decode(file.read(int(index.sizes[i])), max_pixels)
        except BadSample as bad:
            found.append(Damage(shard.url, key, str(bad)))
    return found


@contextmanager
def _opened(
    url: str, num_bytes: int, config: StorageConfig, scratch: _Scratch | None
) -> Iterator[tuple[BinaryIO, int | None]]:
    """A shard as a seekable file, and its crc32; a remote one is copied into `scratch` first.

    Without a place to copy to, a file of which little is read, where it lies, and None.
    """
    if scratch is None:
        with open_windows(url, num_bytes, config) as windows:
            yield windows, None
        return
    crc32 = 0
    if storage.is_local(url):
        with open(storage.filesystem(url, config)[1], "rb") as file:
            while block := file.read(2**22):
                crc32 = isal_zlib.crc32(block, crc32)
            yield file, crc32
        return
    with scratch.file() as copy:
        if num_bytes == 0:  # which can't be mapped
            yield io.BytesIO(), crc32
            return
        try:
            os.posix_fallocate(copy.fileno(), 0, num_bytes)
        except OSError as error:
            raise UserError(
                f"{tempfile.gettempdir()}: {error.strerror}, for a copy of a shard of {num_bytes / 1e6:.0f} MB; "
                "free some, name another disk by TMPDIR, or lower --workers"
            ) from None
        total = read_file(url, config, num_bytes, writer(copy))
        assert total is not None
        # Mapped, a seek and a read of one header do not read a buffer around it.
        with mmap.mmap(copy.fileno(), num_bytes, access=mmap.ACCESS_READ) as mapped:
            yield cast(BinaryIO, mapped), total


def summary(manifest: Manifest) -> str:
    counts = manifest.counts
    told = f"{manifest.url}: {manifest.num_samples} samples in {len(counts)} shards"
    return f"{told} of {int(np.min(counts))} to {int(np.max(counts))}" if len(counts) else told
