"""What ranks get out of the stream: a ledger of keys and of pixels' digests."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from dist_ssl import config as configuration
from dist_ssl.augment import augment
from dist_ssl.config import Config
from dist_ssl.data.cache import ShardCache
from dist_ssl.data.manifest import Manifest, load_manifest
from dist_ssl.data.stream import training_batches
from tests.s3 import S3Server

SAMPLES, BATCH = 300, 47


def config_of(storage: dict[str, Any] | None = None, **data: Any) -> Config:
    values: dict[str, Any] = {
        "run": {"seed": 3},
        "storage": storage or {},
        "data": {"streams": 4, "block_shards": 2, "num_workers": 0} | data,
        "augment": {"crop_size": 24},
        "train": {"global_batch_size": BATCH, "epochs": 2},
    }
    return configuration.validate(values, "test")


Ledger = dict[int, tuple[str, str, str]]  # position -> key, digest of the uint8 views, digest of the pixels


def consume(
    config: Config, manifest: Manifest, cursor: int = 0, steps: int = 6, world_size: int = 1, pixels: bool = True
) -> Ledger:
    """Run the ranks one after another, and write down what they got."""
    ledger: Ledger = {}
    for rank in range(world_size):
        with training_batches(
            config, manifest, cursor=cursor, first_step=0, num_steps=steps, rank=rank, world_size=world_size
        ) as batches:
            for batch in batches:
                made = (
                    [augment(*of_size, config.augment) for of_size in batch.of_each_size()] if pixels else batch.crops
                )
                for row, position in enumerate(batch.positions.tolist()):
                    assert position not in ledger
                    crops, views = (
                        hashlib.sha256(b"".join(size[row].numpy().tobytes() for size in sizes)).hexdigest()
                        for sizes in (batch.crops, made or batch.crops)
                    )
                    ledger[position] = (batch.keys[row], crops, views)
    return ledger


def part(ledger: Ledger, start: int, stop: int) -> Ledger:
    return {position: line for position, line in ledger.items() if start <= position < stop}


def cached(server: S3Server, folder: Path, **data: Any) -> tuple[Config, Manifest, ShardCache]:
    config = config_of({"endpoint_url": server.endpoint_url, "retry_seconds": 5}, cache_dir=str(folder), **data)
    return config, load_manifest("s3://bucket/shapes", config.storage), ShardCache(config.data, config.storage)
