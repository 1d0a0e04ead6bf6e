"""Indexing images where they lie (`in_place`): every file is read once, nothing is copied.

Samples are permuted before they are listed, as before shards are written, so that the parts of a class-sorted folder
are mixed. An interrupted index goes on; the manifest is written last.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from isal import isal_zlib

from dist_ssl import storage
from dist_ssl.config import DataConfig, StorageConfig, UserError
from dist_ssl.data import idx
from dist_ssl.data.decode import BadSample, check_header
from dist_ssl.data.manifest import MANIFEST, Kind, Manifest, MemberIndex, Shard, absolute, manifest_folder
from dist_ssl.data.parallel import in_threads
from dist_ssl.data.progress import track
from dist_ssl.data.shards import permuted_parts
from dist_ssl.data.sources import FolderSource, IdxSource, open_source

PART_SAMPLES = 1000  # about what a shard of 64 MB holds

log = logging.getLogger(__name__)

_Row = tuple[str, int, int]  # key, label, and the place: a folder's file has none


def index_in_place(
    location: str,
    config: StorageConfig,
    *,
    output: str | None = None,
    test_fraction: float = 0.0,
    seed: int = 0,
    rebuild: bool = False,
    data: DataConfig | None = None,
    num_workers: int | None = None,
    progress: bool = False,
) -> list[Manifest]:
    """Index the images of `folder:DIR` or `idx:IMAGES[:LABELS]`, and write the manifest to DIR/.dist_ssl or `output`.

    With `test_fraction` there are two, `train` and `test` below that, which share no image. A part whose index is there
    and of the same files and sizes is skipped, unless `rebuild`. What has no image's header is left out and named.
    Raises UserError, also where the place can't be written to.
    """
    source = open_source(location)
    assert isinstance(source, FolderSource | IdxSource)
    place = absolute(output).rstrip("/") if output else manifest_folder(f"{_kind(source)}:{_url(source)}")
    assert place is not None
    _check_writable(place, location)
    _, parts = permuted_parts(source, place, seed, test_fraction, num_workers)
    details = {"source": location, "seed": seed, "test_fraction": test_fraction, "files": source.fingerprint}
    manifests = []
    for folder, samples in parts.items():
        cuts = np.array_split(samples, -(-len(samples) // PART_SAMPLES))
        jobs = [(f"{folder}/{i:06d}.idx", rows.tolist()) for i, rows in enumerate(cuts)]
        index = partial(_index_part, source, config, (data or DataConfig()).max_pixels, rebuild)
        with closing(in_threads(index, jobs, num_workers)) as found:
            shards, bad = zip(*track(found, len(jobs), f"indexing {location}", progress), strict=True)
        told = [one for of_part in bad for one in of_part]
        manifest = Manifest(storage.join(folder, MANIFEST), shards, source.classes, details)
        if manifest.num_samples == 0:
            raise UserError(f"{location}: none of {len(samples)} files is an image: {told[0]}")
        if told:
            log.warning("%s: %d of %d files left out, such as %s", location, len(told), len(samples), told[0])
        storage.write_bytes(manifest.url, manifest.to_json().encode(), config)
        manifests.append(manifest)
    return manifests


def _index_part(
    source: FolderSource | IdxSource,
    config: StorageConfig,
    max_pixels: int,
    rebuild: bool,
    job: tuple[str, Sequence[int]],
) -> tuple[Shard, list[str]]:
    """The part, indexed where it isn't yet, and what was left out of it."""
    index_url, samples = job
    rows, kind, url = _rows(source, samples), _kind(source), _url(source)
    if not rebuild:
        with suppress(FileNotFoundError, UserError):
            index = MemberIndex.from_bytes(storage.read_bytes(index_url, config), index_url)
            if _same(index, rows, source):
                return index.shard(url, index_url, kind), []
    kept, sizes, crcs, bad = [], [], [], []
    for row, data in zip(rows, _contents(source, rows), strict=True):
        try:
            if kind == "folder":
                check_header(data, max_pixels)
        except BadSample as error:
            bad.append(f"{row[0]} ({error})")
            continue
        kept.append(row)
        sizes.append(len(data))
        crcs.append(isal_zlib.crc32(data))
    none = np.zeros(len(kept), np.uint64)
    index = MemberIndex(
        sum(sizes), 0, [row[0] for row in kept], np.array([row[2] for row in kept], np.uint64),
        np.array(sizes, np.uint64), np.array(crcs, np.uint32), np.array([row[1] for row in kept], np.int64), none, none,
    )  # fmt: skip
    # Without the checksum at its end: that of bytes and their own checksum is the same for all.
    index = replace(index, shard_crc32=isal_zlib.crc32(index.to_bytes()[:-4]))
    storage.write_bytes(index_url, index.to_bytes(), config)
    return index.shard(url, index_url, kind), bad


def _kind(source: FolderSource | IdxSource) -> Kind:
    return "folder" if isinstance(source, FolderSource) else "idx"


def _url(source: FolderSource | IdxSource) -> str:
    return os.path.abspath(source.root if isinstance(source, FolderSource) else source.images)


def _rows(source: FolderSource | IdxSource, samples: Sequence[int]) -> list[_Row]:
    if isinstance(source, FolderSource):
        labels = source.labels if source.classes else None
        return [
            (os.path.relpath(source.paths[i], source.root), labels[i] if labels is not None else -1, 0) for i in samples
        ]
    classes = idx.read(source.labels, 1) if source.labels is not None else None
    bytes_each = int(np.prod(idx.read(source.images, 3).shape[1:]))
    return [(f"{i:08d}", int(classes[i]) if classes is not None else -1, i * bytes_each) for i in samples]


def _contents(source: FolderSource | IdxSource, rows: Sequence[_Row]) -> Iterator[bytes]:
    if isinstance(source, IdxSource):
        pixels = idx.read(source.images, 3)
        for _, _, start in rows:
            yield pixels.reshape(-1)[start : start + pixels[0].size].tobytes()
        return
    for key, _, _ in rows:
        try:
            yield (source.root / key).read_bytes()
        except FileNotFoundError:
            raise UserError(f"{source.root / key}: went away while its folder was indexed; run it again") from None


def _same(index: MemberIndex, rows: Sequence[_Row], source: FolderSource | IdxSource) -> bool:
    """Whether an index lists these files, and they still have its sizes; what an IDX file holds is read each time."""
    if isinstance(source, IdxSource) or list(index.keys) != [row[0] for row in rows]:
        return False
    sizes = [os.stat(source.root / key).st_size for key, _, _ in rows]
    return sizes == index.sizes.tolist() and index.labels.tolist() == [row[1] for row in rows]


def _check_writable(place: str, location: str) -> None:
    with suppress(OSError):
        Path(place).mkdir(parents=True, exist_ok=True)
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(
            f"{place}: can't be written to, where the index of {location} would go; name another folder by "
            "`dist-ssl shards index ... --output FOLDER`, and train on it by data.shards = FOLDER"
        )
