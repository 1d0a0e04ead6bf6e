"""`evaluate` on several ranks of which one fails: all end at once, and the cause is said once."""

from __future__ import annotations

import time

import pytest
from safetensors.torch import save_file

from dist_ssl.config import StorageConfig
from dist_ssl.models import build_encoder
from tests import template, terminal
from tests.pool import free_port

RANKS = 2


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_of_one_rank_ends_all_of_them_and_is_said_once(failing, tmp_path):
    """The damaged shard is read by one rank only, while its peer waits in batch norm's all-reduce."""
    from dist_ssl.data.shards import write_shards
    from dist_ssl.data.sources import open_source

    write_shards(
        open_source("shapes:200:24"), str(tmp_path), StorageConfig(), test_fraction=0.2, shard_mb=0.03, num_workers=0
    )
    shards = sorted((tmp_path / "train").glob("*.tar"))
    assert len(shards) >= 4
    damaged = shards[0] if failing == 0 else shards[-1]
    damaged.write_bytes(b"\0" * damaged.stat().st_size)
    save_file(build_encoder("resnet_tiny", 16).state_dict(), tmp_path / "theirs.safetensors")
    command = ["evaluate", "--weights", f"{tmp_path}/theirs.safetensors"]
    command += ["--encoder", "resnet_tiny", "--data", str(tmp_path), "--probes", "knn"]
    for setting in ("image_size=16", "num_workers=0", "batch_size_per_rank=16"):
        command += ["--set", f"evaluation.{setting}"]
    place = {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    place["LOCAL_WORLD_SIZE"] = str(RANKS)
    said = [tmp_path / f"stderr-{rank}" for rank in range(RANKS)]
    processes = [
        template.fork(
            terminal.main,
            tuple(command),
            place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            [tmp_path / f"stdout-{rank}", said[rank]],
        )
        for rank in range(RANKS)
    ]
    try:
        ended, last = [0.0] * RANKS, time.monotonic() + 240  # on a busy machine they start slowly
        while not all(ended):
            for rank, process in enumerate(processes):
                ended[rank] = ended[rank] or (time.monotonic() if process.poll() is not None else 0.0)
            time.sleep(0.1)
            last = min([last, *(end + 20 for end in ended if end)])
            assert time.monotonic() < last, f"they wait for each other: ended {ended}"
    finally:
        for process in processes:
            process.kill()
            process.wait()
    errors = [file.read_text() for file in said]
    codes = [process.returncode for process in processes]
    assert codes[0] == codes[1] != 0
    assert "".join(errors).count("error: ") == 1
    assert "error: " in errors[failing]
    assert damaged.name in errors[failing]
    assert "Connection closed" not in "".join(errors)
