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
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray

from dist_ssl import storage
from dist_ssl.config import DataConfig, StorageConfig, UserError
from dist_ssl.data.decode import BadSample, check_header, decode
from dist_ssl.data.manifest import MANIFEST, Manifest, MemberIndex, Shard
from dist_ssl.data.parallel import in_processes
from dist_ssl.data.progress import track
from dist_ssl.data.quarantine import GRACE_SAMPLES, NUM_TOLD
from dist_ssl.data.random import key_of, permutation
from dist_ssl.data.sources import Source, SourceSample
from dist_ssl.data.tar import index_tar

PROGRESS = "writing.json"
SINCE_DECODING = ("decoded", "max_pixels")  # what older manifests do not tell
SAMPLES_SIZED = 256  # how many samples tell the mean size of one
LEFT_OUT = ".left-out.jsonl"  # beside a shard, where files were left out of it

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Job:
    """One shard to write."""

    url: str
    indices: Sequence[int]


@dataclass(frozen=True)
class _Checks:
    """What is done to an image before it is written."""

    max_pixels: int
    decode: bool
    resize: int | None


def write_shards(
    source: Source,
    destination: str,
    config: StorageConfig,
    *,
    seed: int = 0,
    test_fraction: float = 0.0,
    shard_mb: float = 64.0,
    resize: int | None = None,
    decode_images: bool = True,
    data: DataConfig | None = None,
    num_workers: int | None = None,
    progress: bool = False,
) -> list[Manifest]:
    """Write shards of all samples of `source` under the URL `destination`, and return the manifest.

    With `test_fraction`, two sets, DEST/train and DEST/test, which share no image (equal bytes count as one image).
    `resize` scales the shorter side to that many pixels; else the bytes of images stay as they are. Each image is
    decoded once, under the limits of `data`, as training does; without `decode_images` only its header is read. What
    is bad is left out, listed beside its shard, and a warning names the first. Raises UserError where more than
    `data.max_bad_fraction` of the files (of 1000 at least) are bad, and where the destination holds other shards.
    """
    data = data or DataConfig()
    checks = _Checks(data.max_pixels, decode_images, resize)
    storage.check_url(destination)
    # Another process's memory is not this one's.
    workers = 0 if destination.startswith("memory:") else num_workers
    order, parts = permuted_parts(source, destination, seed, test_fraction, workers)
    first = source.read(order[:SAMPLES_SIZED].tolist())
    sized = (_prepared(one, replace(checks, decode=False)) for one in first)
    good = [sample for sample in sized if not isinstance(sample, BadSample)]
    mean_bytes = sum(len(sample.image) + 2048 for sample in good) / max(len(good), 1) or 2048
    samples_per_shard = max(1, round(shard_mb * 2**20 / mean_bytes))
    details = {"source": source.name, "seed": seed, "resize": resize, "samples_per_shard": samples_per_shard}
    details |= {"test_fraction": test_fraction, "files": source.fingerprint}
    details |= {"decoded": checks.decode, "max_pixels": checks.max_pixels}
    manifests = []
    for url, indices in parts.items():
        jobs = _jobs(url, indices, samples_per_shard)
        _claim(url, details, config)
        write = partial(_write_one, source, config, checks)
        shards, bad = zip(
            *track(in_processes(write, jobs, workers), len(jobs), f"writing {url}", progress), strict=True
        )
        manifest = Manifest(_manifest_url(url), shards, source.classes, details)
        _tell(manifest, len(indices), [line for of_shard in bad for line in of_shard], data.max_bad_fraction)
        storage.write_bytes(manifest.url, manifest.to_json().encode(), config)
        storage.remove(storage.join(url, PROGRESS), config)
        manifests.append(manifest)
    return manifests


def permuted_parts(
    source: Source, destination: str, seed: int, test_fraction: float, num_workers: int | None
) -> tuple[NDArray[np.int64], dict[str, NDArray[np.int64]]]:
    """The samples of a source in the order of their permutation: all, and those of each part by its URL.

    With `test_fraction` the parts are DEST/train and DEST/test, which share no image. Raises UserError.
    """
    if not 0 <= test_fraction < 1:
        raise UserError(f"--test-fraction: expected 0 <= F < 1, got {test_fraction}")
    order = permutation(key_of("write", seed), len(source), 0)
    if not test_fraction:
        return order, {destination: order}
    test = np.isin(order, _test_samples(source, order, test_fraction, num_workers))
    return order, {storage.join(destination, "train"): order[~test], storage.join(destination, "test"): order[test]}


def _manifest_url(url: str) -> str:
    return storage.join(os.path.abspath(url) if storage.is_local(url) and "://" not in url else url, MANIFEST)


def _jobs(url: str, indices: NDArray[np.int64], samples_per_shard: int) -> list[_Job]:
    count = -(-len(indices) // samples_per_shard)
    base = _manifest_url(url).removesuffix("/" + MANIFEST)
    return [_Job(f"{base}/{i:06d}.tar", part.tolist()) for i, part in enumerate(np.array_split(indices, count))]


def _test_samples(source: Source, order: NDArray[np.int64], fraction: float, workers: int | None) -> NDArray[np.int64]:
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
            found = found if name == PROGRESS else found["details"]
            found = {key: details[key] for key in SINCE_DECODING} | found
            differences = [key for key in details if details[key] != found.get(key)]
        except FileNotFoundError:
            continue
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{url}: its {name} is damaged; remove it, or choose another destination") from None
        if differences == ["files"]:
            raise UserError(
                f"{url}: its shards were written when {details['source']} held other files; put those "
                "back to go on, or choose another destination"
            )
        if differences:
            # What follows from another source or size is not told beside it.
            told = [key for key in differences if key not in ("files", "samples_per_shard")] or differences
            asked = ", ".join(f"{key} {details[key]} instead of {found.get(key)}" for key in told)
            raise UserError(
                f"{url}: holds shards of {found.get('source')} already; asked for {asked}: choose another destination, "
                "or empty it"
            )
        return
    storage.write_bytes(storage.join(url, PROGRESS), json.dumps(details).encode(), config)


def _tell(manifest: Manifest, num_samples: int, bad: Sequence[dict[str, str]], max_bad_fraction: float) -> None:
    """Warn of what was left out; refuse to call it a data set where that was too much, or all."""
    left_out = num_samples - manifest.num_samples
    if not left_out:
        return
    # Shards that another version wrote list nothing.
    named = "; ".join(f"{one['file']} ({one['reason']})" for one in bad[:NUM_TOLD])
    named = named or "named when their shards were written"
    named += f"; all are listed in *{LEFT_OUT} beside the shards" if len(bad) > NUM_TOLD else ""
    if left_out == num_samples:
        raise UserError(f"{manifest.url}: none of {num_samples} files is a good image: {named}")
    if left_out > max_bad_fraction * max(num_samples, GRACE_SAMPLES):
        raise UserError(
            f"{manifest.url}: {left_out} of {num_samples} files are bad, more than data.max_bad_fraction = "
            f"{max_bad_fraction:g} of them (of {GRACE_SAMPLES} at least): {named}. To write the others all the same, "
            "run the command again with --set data.max_bad_fraction=1; it goes on from here"
        )
    log.warning("%s: %d of %d files left out as bad: %s", manifest.url, left_out, num_samples, named)


def _write_one(source: Source, config: StorageConfig, checks: _Checks, job: _Job) -> tuple[Shard, list[dict[str, str]]]:
    """The shard, written where it isn't there yet, and the files that were left out of it, with reasons."""
    index_url, left_out_url = job.url + ".idx", job.url.removesuffix(".tar") + LEFT_OUT
    try:
        index = MemberIndex.from_bytes(storage.read_bytes(index_url, config), index_url)
        if storage.size(job.url, config) == index.shard_bytes:
            bad = []
            if len(index) < len(job.indices) and storage.exists(left_out_url, config):
                bad = [json.loads(line) for line in storage.read_bytes(left_out_url, config).splitlines()]
            return index.shard(job.url, index_url), bad
    except (FileNotFoundError, UserError):
        pass
    good, bad = [], []
    for sample in source.read(job.indices):
        prepared = _prepared(sample, checks)
        if isinstance(prepared, BadSample):
            bad.append({"file": sample.path or sample.key, "reason": str(prepared)})
        else:
            good.append(prepared)
    data = tar_bytes(good)
    crc32 = isal_zlib.crc32(data)
    index, _ = index_tar(io.BytesIO(data), job.url, len(data), crc32)
    storage.write_bytes(job.url, data, config)
    if bad:
        storage.write_bytes(left_out_url, "".join(json.dumps(one) + "\n" for one in bad).encode(), config)
    storage.write_bytes(index_url, index.to_bytes(), config)
    return index.shard(job.url, index_url), bad


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


def _prepared(sample: SourceSample, checks: _Checks) -> SourceSample | BadSample:
    """The sample as it is written; why it can't be."""
    try:
        # What has no path was encoded here a moment ago.
        if checks.resize is None and not (checks.decode and sample.path):
            check_header(sample.image, checks.max_pixels)
            return sample
        image = decode(sample.image, checks.max_pixels)
    except BadSample as bad:
        return bad
    if checks.resize is None or checks.resize >= min(image.size):
        return sample
    scale = checks.resize / min(image.size)
    buffer = io.BytesIO()
    image.resize((round(image.width * scale), round(image.height * scale)), 1).save(buffer, "JPEG", quality=92)
    return SourceSample(sample.key, buffer.getvalue(), "jpg", sample.label, sample.factors)
