"""Images read where they are against the same in shards: python -m tests.benchmarks.folder [--folder DISK]

The bytes of every image, in the plan's order, read and summed by one process: from memory, and forgotten, which means
that the kernel is asked to drop the files' pages before each round, so that the disk is read.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from functools import partial
from pathlib import Path

from dist_ssl.config import StorageConfig
from dist_ssl.data.in_place_index import index_in_place
from dist_ssl.data.manifest import load_manifest
from dist_ssl.data.plan import Plan
from dist_ssl.data.reader import Reader
from tests.benchmarks.input import best, photo_shards, show, stream_config


def folder(disk: str | None, n: int = 2048) -> None:
    with tempfile.TemporaryDirectory(dir=disk) as place:
        root = Path(place)
        shards = photo_shards(root, n, 8)
        images = f"folder:{root / 'images'}"
        index_in_place(images, StorageConfig())
        config = stream_config(64, data={"streams": 16})

        def read(location: str, kept: bool) -> None:
            manifest = load_manifest(location, config.storage)
            made = Plan(manifest.counts, 0, manifest.hash, config.data.streams, config.data.block_shards)
            _, shards, members = made.locate(made.batch(0, made.num_samples))
            reader = Reader(manifest, config.storage, config.data)
            for start in range(0, len(shards), 64):
                reader.images(shards[start : start + 64], members[start : start + 64])
            reader.close()
            if not kept:
                forget(root)

        for kept in (True, False):
            if not kept:
                forget(root)
            contestants = {
                "files of a folder, where they are": partial(read, images, kept),
                "tar shards of 8 MB": partial(read, shards, kept),
            }
            rates = best(contestants, n, time.perf_counter)
            show(
                f"{n} JPEGs read and summed by one process, {'from memory' if kept else 'forgotten'}", rates, "images/s"
            )
            in_folder, in_shards = rates.values()
            print(f"  folder / shards: {in_folder / in_shards:.2f}x")


def forget(root: Path) -> None:
    """Ask the kernel to drop what it holds of these files in memory."""
    for path in root.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fdatasync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="Where to write 350 MB; the system's temporary folder by default.")
    folder(parser.parse_args().folder)
