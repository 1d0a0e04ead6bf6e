"""Writing shards: samples permuted globally, into WebDataset tars with a member index each and a manifest, atomically.

Class-sorted sources would ruin the negatives of a batch, so the permutation comes before the shards. What a shard
holds follows from (source, seed), so any process can write any shard, and an interrupted write goes on: a shard whose
index is there is whole, since the index is written after it. The manifest is written last.
"""

from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray

from dist_ssl import storage
from dist_ssl.config import StorageConfig, UserError
from dist_ssl.data.decode import BadSample, check_header, decode
from dist_ssl.data.index import MANIFEST, Manifest, MemberIndex, Shard
from dist_ssl.data.processes import in_processes
from dist_ssl.data.progress import track
from dist_ssl.data.random import key_of, permutation
from dist_ssl.data.sources import Source, SourceSample
from dist_ssl.data.tar import index_tar

PROGRESS = "writing.json"
SAMPLES_SIZED = 256  # how many samples tell the mean size of one
MAX_PIXELS = 2**28  # above what a training run allows (data.max_pixels), which may be raised later
NUM_TOLD = 10  # how many of the files that are left out are named


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Job:
    """One shard to write."""

    url: str
    indices: Sequence[int]


def write_shards(
    source: Source,
    destination: str,
    config: StorageConfig,
    *,
    seed: int = 0,
    test_fraction: float = 0.0,
    shard_mb: float = 64.0,
    resize: int | None = None,
    num_workers: int | None = None,
    progress: bool = False,
) -> list[Manifest]:
    """Write shards of all samples of `source` under the URL `destination`, and return the manifest.

    With `test_fraction`, two sets, DEST/train and DEST/test, which share no image (equal bytes count as one image).
    `resize` scales the shorter side to that many pixels; else the bytes of images stay as they are. A file that is no
    image by its header (with `resize`: that can't be decoded) is left out, and a warning names the first of them.
    Raises UserError where the destination holds other shards.
    """
    storage.check_url(destination)
    if not 0 <= test_fraction < 1:
        raise UserError(f"--test-fraction: expected 0 <= F < 1, got {test_fraction}")
    order = permutation(key_of("write", seed), len(source), 0)
    workers = num_workers if num_workers is not None else len(os.sched_getaffinity(0))
    if destination.startswith("memory:"):
        workers = 0  # another process's memory is not this one's
    parts = {destination: order}
    if test_fraction:
        test = _test_samples(source, order, test_fraction, workers)
        parts = {
            storage.join(destination, "train"): order[~np.isin(order, test)],
            storage.join(destination, "test"): order[np.isin(order, test)],
        }
    first = source.read(order[:SAMPLES_SIZED].tolist())
    good = [sample for sample in (_prepared(one, resize) for one in first) if not isinstance(sample, BadSample)]
    mean_bytes = sum(len(sample.image) + 2048 for sample in good) / max(len(good), 1) or 2048
    samples_per_shard = max(1, round(shard_mb * 2**20 / mean_bytes))
    details = {"source": source.name, "seed": seed, "resize": resize, "samples_per_shard": samples_per_shard}
    details |= {"test_fraction": test_fraction, "files": source.fingerprint}
    manifests = []
    for url, indices in parts.items():
        jobs = _jobs(url, indices, samples_per_shard)
        _claim(url, details, config)
        write = partial(_write_one, source, config, resize)
        shards, bad = zip(
            *track(in_processes(write, jobs, workers), len(jobs), f"writing {url}", progress), strict=True
        )
        manifest = Manifest(_manifest_url(url), shards, source.classes, details)
        _tell(manifest, len(indices), [line for of_shard in bad for line in of_shard])
        storage.write_bytes(manifest.url, manifest.to_json().encode(), config)
        storage.remove(storage.join(url, PROGRESS), config)
        manifests.append(manifest)
    return manifests


def _manifest_url(url: str) -> str:
    return storage.join(os.path.abspath(url) if storage.is_local(url) and "://" not in url else url, MANIFEST)


def _jobs(url: str, indices: NDArray[np.int64], samples_per_shard: int) -> list[_Job]:
    count = -(-len(indices) // samples_per_shard)
    base = _manifest_url(url).removesuffix("/" + MANIFEST)
    return [_Job(f"{base}/{i:06d}.tar", part.tolist()) for i, part in enumerate(np.array_split(indices, count))]


def _test_samples(source: Source, order: NDArray[np.int64], fraction: float, workers: int) -> NDArray[np.int64]:
    """The first samples of the permutation, and every copy of one of them."""
    count = min(max(round(fraction * len(order)), 1), len(order) - 1)
    if count < 1:
        raise UserError(f"--test-fraction: expected at least 2 samples, got {len(order)}")
    parts = [part.tolist() for part in np.array_split(order, -(-len(order) // 1024))]
    digests = [digest for part in in_processes(source.digests, parts, workers) for digest in part]
    held_out = set(digests[:count])
    test = order[[digest in held_out for digest in digests]]
    if len(test) == len(order):
        raise UserError("--test-fraction: every image is a copy of a test image; nothing is left to train on")
    return test


def _claim(url: str, details: dict[str, Any], config: StorageConfig) -> None:
    """Say in the destination what is being written, so that only the same write goes on there."""
    for name in (PROGRESS, MANIFEST):
        try:
            found = json.loads(storage.read_bytes(storage.join(url, name), config))
        except FileNotFoundError:
            continue
        found = found if name == PROGRESS else found["details"]
        if found != details and found | {"files": ""} == details | {"files": ""}:
            raise UserError(
                f"{url}: its shards were written when {details['source']} held other files; put those "
                "back to go on, or choose another destination"
            )
        if found != details:
            raise UserError(f"{url}: holds shards of {found}, asked for {details}; choose another destination")
        return
    storage.write_bytes(storage.join(url, PROGRESS), json.dumps(details).encode(), config)


def _tell(manifest: Manifest, num_samples: int, bad: list[str]) -> None:
    """Warn of what was left out; `bad` lacks what an interrupted write before this one had told."""
    left_out = num_samples - manifest.num_samples
    if left_out == num_samples:
        raise UserError(f"{manifest.url}: none of {num_samples} files is an image: {'; '.join(bad[:NUM_TOLD])}")
    if left_out:
        named = "; ".join(bad[:NUM_TOLD]) or "named when their shards were written"
        named += " ..." if len(bad) > NUM_TOLD else ""
        log.warning("%s: %d of %d files are left out, being no images: %s", manifest.url, left_out, num_samples, named)


def _write_one(source: Source, config: StorageConfig, resize: int | None, job: _Job) -> tuple[Shard, list[str]]:
    """The shard, written where it isn't there yet, and the files that were left out of it, with reasons."""
    index_url = job.url + ".idx"
    try:
        index = MemberIndex.from_bytes(storage.read_bytes(index_url, config), index_url)
        if storage.size(job.url, config) == index.shard_bytes:
            return Shard(job.url, index_url, index.shard_bytes, len(index), index.shard_crc32), []
    except (FileNotFoundError, UserError):
        pass
    good, bad = [], []
    for sample in source.read(job.indices):
        prepared = _prepared(sample, resize)
        if isinstance(prepared, BadSample):
            bad.append(f"{sample.path or sample.key} ({prepared})")
        else:
            good.append(prepared)
    data = tar_bytes(good)
    crc32 = isal_zlib.crc32(data)
    index, _ = index_tar(io.BytesIO(data), job.url, len(data), crc32)
    storage.write_bytes(job.url, data, config)
    storage.write_bytes(index_url, index.to_bytes(), config)
    return Shard(job.url, index_url, len(data), len(index), crc32), bad


def tar_bytes(samples: Iterable[SourceSample]) -> bytes:
    """A WebDataset tar; the same bytes for the same samples."""
    from webdataset.writer import TarWriter

    buffer = io.BytesIO()
    with TarWriter(buffer, mtime=0, encoder=False) as writer:
        for sample in samples:
            members: dict[str, Any] = {"__key__": sample.key, sample.extension: sample.image}
            if sample.label is not None:
                members["cls"] = str(sample.label).encode()
            if sample.factors is not None:
                members["json"] = sample.factors
            writer.write(members)
    return buffer.getvalue()


def _prepared(sample: SourceSample, resize: int | None) -> SourceSample | BadSample:
    """The sample as it is written; why it can't be."""
    try:
        if resize is None:
            check_header(sample.image, MAX_PIXELS)
            return sample
        image = decode(sample.image, MAX_PIXELS)
    except BadSample as bad:
        return bad
    scale = resize / min(image.size)
    if scale >= 1:
        return sample
    buffer = io.BytesIO()
    image.resize((round(image.width * scale), round(image.height * scale)), 1).save(buffer, "JPEG", quality=92)
    return SourceSample(sample.key, buffer.getvalue(), "jpg", sample.label, sample.factors)
