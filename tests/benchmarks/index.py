"""What a manifest of many shards costs a node: bytes, seconds, memory of a rank and of each of its workers.

    python -m tests.benchmarks.index [--shards 100000] [--workers 12]

Seconds are of the processor, of the reading process; memory is that which Python's allocator saw.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

from dist_ssl.config import StorageConfig
from dist_ssl.data.manifest import Manifest, Shard, load_manifest


def even_manifest(folder: Path, count: int) -> Manifest:
    """Of `count` shards of a bucket whose index is in a folder; written there."""
    shards = [
        Shard(f"s3://bucket/images/train-{i:06d}.tar", f"{folder}/train-{i:06d}.tar.idx", 137_000_000 + i, 1250, i)
        for i in range(count)
    ]
    manifest = Manifest(f"{folder}/manifest.json", shards)
    (folder / "manifest.json").write_text(manifest.to_json())
    return manifest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=12)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        even_manifest(folder, options.shards)
        began = time.process_time()
        load_manifest(name, StorageConfig())
        seconds = time.process_time() - began
        tracemalloc.start()
        manifest = load_manifest(name, StorageConfig())
        gc.collect()
        held, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        context = multiprocessing.get_context("forkserver")
        receiver, sender = context.Pipe(duplex=False)
        told = []
        for _ in range(options.workers):
            process = context.Process(target=_tell, args=(manifest, sender))
            process.start()
            told.append(receiver.recv())
            process.join()
        counts = {
            "shards": options.shards,
            "manifest_bytes": (folder / "manifest.json").stat().st_size,
            "load_cpu_seconds": round(seconds, 2),
            "load_peak_mb": round(peak / 1e6, 1),
            "held_mb": round(held / 1e6, 1),
            "workers": options.workers,
            "mapped_by_a_worker_mb": round(max(mapped for mapped, _ in told) / 1e6, 1),
            "copied_by_a_worker_mb": round(max(copied for _, copied in told) / 1e6, 1),
        }
        print(json.dumps(counts))


def _tell(manifest: Manifest, sender: Any) -> None:
    """Bytes that this process maps of the shards' memory, and those of them that are copies, once all were read."""
    for _ in manifest.shards:
        pass
    sizes, inside = {"Size:": 0, "Anonymous:": 0}, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, second = line.split()[:2]
        if not first.endswith(":"):
            inside = "memfd:shards" in line
        elif inside and first in sizes:
            sizes[first] += 1024 * int(second)
    sender.send(tuple(sizes.values()))


if __name__ == "__main__":
    main()
