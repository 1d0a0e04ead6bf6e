"""Features of a whole split, read once through frozen encoders into memory-mapped files, by any number of ranks.

A folder holds one `<layer>.npy` a layer, one a column (COLUMNS), `meta.json` (what they are features of) and
`done.bin` (a byte a block of rows, set once that block's rows are on disk). An interrupted extraction goes on with the
blocks that are missing, whatever the number of ranks was; another encoder, split or size starts afresh.

Legend: n images of the split, D a layer's width.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Generator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dist_ssl import distributed
from dist_ssl.augment import normalize
from dist_ssl.config import AugmentConfig, Config, UserError
from dist_ssl.data.manifest import Manifest, load_manifest
from dist_ssl.data.progress import Progress
from dist_ssl.data.stream import EvaluationBatch, evaluation_batches
from dist_ssl.evaluation.frozen import Readable

log = logging.getLogger(__name__)

BLOCK_ROWS = 1024
COLUMNS = ("labels", "sample_ids", "replaced")
PIXELS = "pixels"  # the layer that is no layer: the images as they are, of numbers from 0 to 255


@dataclass(frozen=True)
class Split:
    """The images that probes are fitted or scored on, and how they are prepared: resize, centre crop, normalise."""

    name: str  # "train" or "test"
    manifest: Manifest
    config: Config
    device: torch.device

    @property
    def image_size(self) -> int:
        return self.config.evaluated_size

    @property
    def augment(self) -> AugmentConfig:
        return self.config.augment

    def batches(self, start: int = 0, stop: int | None = None) -> Generator[EvaluationBatch]:
        """Batches of uint8 images of rows [start, stop) in manifest order."""
        evaluation = self.config.evaluation
        stop = self.manifest.num_samples if stop is None else stop
        # Starting a worker costs seconds: not for a handful of batches.
        num_workers = min(evaluation.num_workers, (stop - start) // (4 * evaluation.batch_size_per_rank))
        with evaluation_batches(
            self.manifest,
            self.config.storage,
            image_size=self.image_size,
            resize_ratio=evaluation.resize_ratio,
            start=start,
            stop=stop,
            batch_size=evaluation.batch_size_per_rank,
            num_workers=num_workers,
            data=self.config.data,
        ) as batches:
            yield from batches

    def pixels(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, S, S) -> normalised fp32 on the device."""
        return normalize(images.to(self.device, non_blocking=True), self.augment)


def open_split(name: str, config: Config, device: torch.device) -> Split:
    """The split named by evaluation.train_shards or evaluation.test_shards; UserError where it is not set."""
    url = config.evaluation.train_shards if name == "train" else config.evaluation.test_shards
    if not url:
        raise UserError(
            f"evaluation.{name}_shards is not set: name labelled shards with --{name}-shards URL or in the config"
        )
    return Split(name, load_manifest(url, config.storage), config, device)


def in_batches_of(images: int, config: Config, num_workers: int) -> Config:
    """A run's config for its stream in other batches, which need not divide into what a training divides its into."""
    changed: dict[str, Any] = {
        "train": {"global_batch_size": images},
        "objective": {"chunks": 1},
        "data": {"num_workers": num_workers},
    }
    return config.model_copy(
        update={section: getattr(config, section).model_copy(update=values) for section, values in changed.items()}
    )


@dataclass(frozen=True)
class Features:
    """Memory-mapped layers {name: (n, D) float32; pixels: uint8}, labels (n,) and sample_ids (n,) of a split.

    `replaced` (n,): 1 where another image of its shard stands for one that could not be decoded, else 0.
    """

    layers: dict[str, np.ndarray]
    labels: np.ndarray
    sample_ids: np.ndarray
    replaced: np.ndarray


def extract(
    split: Split, readables: list[Readable], digests: list[str], folder: Path, pixels: bool = False
) -> Features:
    """Reads all layers of all `readables` for every image of the split, once, into `folder`.

    `digests` names what is read, so that a folder of another encoder's features is not taken for this one's. At most
    a batch of features is in memory. `pixels`: the images too. Collective; an error on one rank is raised on all.
    Raises UserError where more than data.max_bad_fraction of the images are bad, however many starts read them.
    """
    meta = {
        "digests": digests,
        "split": split.manifest.hash,
        "rows": split.manifest.num_samples,
        "image_size": split.image_size,
        "resize_ratio": split.config.evaluation.resize_ratio,
        "normalize": [list(split.augment.mean), list(split.augment.std)],
        "block_rows": BLOCK_ROWS,
        "dims": layer_dims(split, readables) | ({PIXELS: 3 * split.image_size**2} if pixels else {}),
    }
    if (label := split.manifest.details.get("json_label")) is not None:
        meta["json_label"] = label  # no part of the manifest's hash
    error = None
    if distributed.rank() == 0:
        try:
            _prepare(folder, meta)
        except Exception as failure:
            error = failure
    distributed.raise_together(error)
    todo = np.flatnonzero(np.fromfile(folder / "done.bin", dtype=np.uint8) == 0)
    todo = np.array(distributed.broadcast_object(todo.tolist()), dtype=np.int64)
    mine = np.array_split(todo, distributed.world_size())[distributed.rank()]
    try:
        for start, stop in _runs(mine, split.manifest.num_samples):
            _fill(split, readables, folder, start, stop)
    except Exception as failure:
        error = failure
    distributed.raise_together(error)
    features = open_features(folder)
    _check_replaced(split, int(features.replaced.sum()))
    return features


def open_features(folder: Path) -> Features:
    """The memory-mapped features of a folder that `extract` filled; ValueError where blocks are missing."""
    if not (np.fromfile(folder / "done.bin", dtype=np.uint8) == 1).all():
        raise ValueError(f"{folder}: the extraction was interrupted; run it again to go on")
    dims = json.loads((folder / "meta.json").read_text())["dims"]
    return Features(
        {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in dims},
        *(np.load(folder / f"{name}.npy") for name in COLUMNS),
    )


def _check_replaced(split: Split, bad: int) -> None:
    rows, limit = split.manifest.num_samples, split.config.data.max_bad_fraction
    if bad > limit * rows:
        raise UserError(
            f"evaluation.{split.name}_shards: {bad} of {rows} images are bad, more than data.max_bad_fraction = "
            f"{limit:g} of them; leave them out, as `dist-ssl shards write` does, or raise it"
        )
    if bad and distributed.rank() == 0:
        log.warning("%s images: %d of %d are bad; for each another of its shard counts twice", split.name, bad, rows)


def in_one_channel(*parts: Features) -> list[Features]:
    """The same with a third of the pixels where every image is grey: three equal channels say nothing more."""
    channels = [part.layers[PIXELS].reshape(len(part.labels), 3, -1) for part in parts if PIXELS in part.layers]
    for images in channels:
        for start in range(0, len(images), BLOCK_ROWS):
            block = images[start : start + BLOCK_ROWS]
            if (block[:, 1:] != block[:, :1]).any():
                return list(parts)
    return [
        replace(part, layers=part.layers | {PIXELS: grey[:, 0]}) for part, grey in zip(parts, channels, strict=False)
    ] or list(parts)


@torch.inference_mode()
def layer_dims(split: Split, readables: list[Readable]) -> dict[str, int]:
    """Width of every layer that the readables give for images of the split."""
    images = torch.zeros(2, 3, split.image_size, split.image_size, device=split.device)
    return {name: output.shape[1] for readable in readables for name, output in readable.read(images).items()}


def _prepare(folder: Path, meta: dict[str, Any]) -> None:
    marker = folder / "meta.json"
    if marker.exists() and json.loads(marker.read_text()) == meta and (folder / "done.bin").exists():
        if not (folder / "replaced.npy").exists():  # of an older version, which did not count
            np.save(folder / "replaced.npy", np.zeros(meta["rows"], np.int64))
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rows = meta["rows"]
    for name, dim in meta["dims"].items():
        dtype = np.uint8 if name == PIXELS else np.float32
        np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=dtype, shape=(rows, dim))
    for name in COLUMNS:
        np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=np.int64, shape=(rows,))
    (folder / "done.bin").write_bytes(bytes(-(-rows // BLOCK_ROWS)))
    marker.write_text(json.dumps(meta))  # last: a folder without it is not resumed


def _runs(blocks: np.ndarray, num_rows: int) -> list[tuple[int, int]]:
    """Row ranges of block numbers, neighbours merged: one pass of the data workers each."""
    if len(blocks) == 0:
        return []
    breaks = np.flatnonzero(np.diff(blocks) != 1) + 1
    edges = [0, *breaks.tolist(), len(blocks)]
    return [
        (int(blocks[a]) * BLOCK_ROWS, min((int(blocks[b - 1]) + 1) * BLOCK_ROWS, num_rows)) for a, b in pairwise(edges)
    ]


def _fill(split: Split, readables: list[Readable], folder: Path, start: int, stop: int) -> None:
    writers: dict[str, RowWriter] = {}
    done = os.open(folder / "done.bin", os.O_WRONLY)
    batches = split.batches(start, stop)
    row, marked, told = start, start // BLOCK_ROWS, False
    try:
        with Progress(f"features of the {split.name} images", stop - start, distributed.rank() == 0) as progress:
            for batch in batches:
                with torch.inference_mode():
                    pixels = split.pixels(batch.images)
                    outputs = {k: v.float().cpu().numpy() for r in readables for k, v in r.read(pixels).items()}
                replaced = np.isin(np.arange(len(batch.labels)), batch.replaced)
                columns = (batch.labels.numpy(), batch.sample_ids.numpy(), replaced.astype(np.int64))
                outputs |= dict(zip(COLUMNS, columns, strict=True))
                for one in batch.quarantined[:1] if not told else ():
                    told = True
                    log.warning("bad, and maybe not alone: %s: %s: %s", one["shard"], one["key"], one["reason"])
                if (folder / f"{PIXELS}.npy").exists():
                    outputs[PIXELS] = batch.images.flatten(1).numpy()
                for name, values in outputs.items():
                    if name not in writers:
                        writers[name] = RowWriter(folder / f"{name}.npy")
                    writers[name].write(row, values)
                row += len(batch.labels)
                complete = row // BLOCK_ROWS if row < stop else -(-row // BLOCK_ROWS)
                if complete > marked:
                    for writer in writers.values():
                        os.fsync(writer.file)  # rows before the mark that says they are there
                    os.pwrite(done, b"\1" * (complete - marked), marked)
                    marked = complete
                progress.advance(len(batch.labels))
        if row != stop:
            raise ValueError(f"{split.name} images: expected rows {start} to {stop}, the stream ended at {row}")
    finally:
        os.close(done)
        for writer in writers.values():
            writer.close()
        batches.close()


class RowWriter:
    """Writes rows into a .npy at their place. Not through a memory map: on shared file systems two ranks' maps of
    one page overwrite each other."""

    def __init__(self, path: Path) -> None:
        mapped = np.load(path, mmap_mode="r")
        self.offset, self.shape, self.dtype = mapped.offset, mapped.shape, mapped.dtype
        self.row_bytes = mapped.dtype.itemsize * int(np.prod(mapped.shape[1:]))
        self.file = os.open(path, os.O_WRONLY)

    def write(self, row: int, values: np.ndarray) -> None:
        data = np.ascontiguousarray(values, dtype=self.dtype)
        if data.shape[1:] != self.shape[1:] or row + len(data) > self.shape[0]:
            raise ValueError(f"expected rows of {self.shape}, got {data.shape} at row {row}")
        view, position = memoryview(data.data).cast("B"), self.offset + row * self.row_bytes
        while len(view):
            written = os.pwrite(self.file, view, position)
            view, position = view[written:], position + written

    def close(self) -> None:
        os.close(self.file)
