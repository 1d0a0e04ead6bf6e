"""Samples that can't be decoded: replaced by rule, written down, and too many of them an error."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

import pytest
import torch.distributed as dist
from PIL import Image

from dist_ssl.config import StorageConfig, UserError
from dist_ssl.data.indexing import index_shards
from dist_ssl.data.manifest import load_manifest
from dist_ssl.data.quarantine import Quarantine, bad_samples
from dist_ssl.data.stream import training_batches
from dist_ssl.distributed import rank
from tests.pool import ranks
from tests.stream.consumed import config_of


def hostile_png() -> bytes:
    from tests.test_decode import png_header

    return png_header(50_000, 50_000)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards, some of whose members are hostile; their good images are all of one colour a key."""
    folder = tmp_path_factory.mktemp("hostile")
    bad = {
        5: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", 6: b"", 12: hostile_png(),
        13: b"cos\nsystem\n(S'touch /tmp/owned'\ntR.", 16: gzip.compress(bytes(10**8), 1),
    }  # fmt: skip
    for shard in range(2):
        with tarfile.open(folder / f"{shard:06d}.tar", "w") as tar:
            for i in range(20):
                buffer = io.BytesIO()
                Image.new("RGB", (40, 40), (10 * i, shard * 200, 0)).save(buffer, "PNG")
                data = bad.get(i, buffer.getvalue()) if shard == 0 else buffer.getvalue()
                for name, content in ((f"{i:03d}.jpg", data), (f"{i:03d}.cls", str(i).encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    index_shards(str(folder), StorageConfig(), num_workers=0)
    return folder


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_bad_samples_are_replaced_by_rule(hostile: Path, workers: int) -> None:
    config, listed = config_of(num_workers=workers), load_manifest(str(hostile), StorageConfig())
    bad = {
        "000000/005": "000000/007",
        "000000/006": "000000/007",
        "000000/012": "000000/014",
        "000000/013": "000000/014",
        "000000/016": "000000/017",
    }
    seen: dict[str, str] = {}
    with training_batches(config, listed, cursor=0, first_step=0, num_steps=1, rank=0, world_size=1) as batches:
        batch = next(batches)
    for row, key in enumerate(batch.keys):
        shard, name = (batch.replaced_by.get(row) or key).split("/")
        assert (key in bad) == (row in batch.replaced_by)
        if row in batch.replaced_by:
            seen[key] = batch.replaced_by[row]
        assert batch.crops[0][row, :, 0].unique().tolist() == [10 * int(name)]
        assert batch.crops[0][row, :, 1].unique().tolist() == [200 * int(shard)]
        assert batch.labels[row] == int(name)
        assert listed.num_samples > batch.sample_ids[row] == int(key.split("/")[1]) + 20 * int(shard)
    assert {key: by for key, by in seen.items() if key in bad} == {key: bad[key] for key in seen}
    assert set(seen) == set(bad)
    reasons = {entry["key"]: entry["reason"] for entry in batch.quarantined}
    assert set(reasons) == set(bad)
    assert reasons["000000/006"] == "empty"
    assert reasons["000000/005"].startswith("not a JPEG, PNG, WEBP, TIFF")
    assert batch.quarantined[0]["shard"].endswith("000000.tar")
    assert not Path("/tmp/owned").exists()


ENTRIES = [{"shard": "s", "key": f"s/{i}", "reason": "empty"} for i in range(12)]


def test_quarantine_writes_each_once_and_stops_above_the_limit(tmp_path: Path) -> None:
    data = config_of(max_bad_fraction=0.01).data
    quarantine = Quarantine(tmp_path, data, 10_000)
    quarantine.record(500, ENTRIES[:4])
    quarantine.record(500, ENTRIES[:4])
    again = Quarantine(tmp_path, data, 10_000)  # a resumed run
    again.record(100, ENTRIES[2:6])
    lines = [json.loads(line)["key"] for line in (tmp_path / "quarantine-rank0.jsonl").read_text().splitlines()]
    assert lines == [f"s/{i}" for i in range(6)]
    expected = (
        r"11 of the 200 samples that rank 0 took since it started were bad, more than data.max_bad_fraction = 0.01 of "
        r"them \(of 1000 at least\): s/2 \(empty\), .*quarantine-rank\*.jsonl, and `dist-ssl shards verify --decode`"
    )
    with pytest.raises(UserError, match=expected):
        again.record(100, ENTRIES[5:12])


def test_a_torn_line_and_an_older_runs_file_are_read(tmp_path: Path) -> None:
    lines = [json.dumps(entry) + "\n" for entry in ENTRIES]
    (tmp_path / "quarantine.jsonl").write_text(lines[0] + lines[1])
    (tmp_path / "quarantine-rank0.jsonl").write_text(lines[2] + lines[3][:20])  # killed while it wrote
    assert sorted(entry["key"] for entry in bad_samples(tmp_path)) == ["s/0", "s/1", "s/2"]
    quarantine = Quarantine(tmp_path, config_of().data, 10_000)
    quarantine.record(500, ENTRIES[:5])
    assert (tmp_path / "quarantine.jsonl").read_text() == lines[0] + lines[1], "what is known is not written again"
    assert sorted(entry["key"] for entry in bad_samples(tmp_path)) == ["s/0", "s/1", "s/2", "s/3", "s/4"]


def quarantine_of_rank(run_dir: Path) -> None:
    mine = ENTRIES[rank() : rank() + 3]  # some are met by both
    quarantine = Quarantine(run_dir, config_of().data, 10_000)
    dist.barrier()
    quarantine.record(500, mine)


def test_each_rank_writes_a_file_of_its_own(tmp_path: Path) -> None:
    ranks(2).run(quarantine_of_rank, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"quarantine-rank0.jsonl", "quarantine-rank1.jsonl"}
    assert sorted(entry["key"] for entry in bad_samples(tmp_path)) == ["s/0", "s/1", "s/2", "s/3"], "each sample once"


def test_a_shard_of_nothing_but_bad_samples_is_an_error(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in range(3):
            info = tarfile.TarInfo(f"{i}.jpg")
            info.size = 3
            tar.addfile(info, io.BytesIO(b"bad"))
    index_shards(str(tmp_path), StorageConfig(), num_workers=0)
    listed = load_manifest(str(tmp_path), StorageConfig())
    with (
        pytest.raises(UserError, match=r"a.tar: none of its 3 samples can be decoded"),
        training_batches(config_of(), listed, cursor=0, first_step=0, num_steps=1, rank=0, world_size=1) as batches,
    ):
        next(batches)
