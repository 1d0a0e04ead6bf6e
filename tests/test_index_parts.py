"""Indexes of headers alone, split over jobs: what they read, how they join, and what they still tell of a shard."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from dist_ssl.config import DataConfig, StorageConfig, UserError
from dist_ssl.data.commands import app
from dist_ssl.data.decode import BadSample
from dist_ssl.data.indexing import compared, index_shards, verify_shards
from dist_ssl.data.manifest import FORMAT, load_manifest, read_member_index
from dist_ssl.data.parts import merge, parse
from dist_ssl.data.reader import Reader
from dist_ssl.storage.windows import WINDOW_BYTES
from tests.proxy import faulty_proxy
from tests.s3 import S3Server, s3_server
from tests.test_index import LOCAL, images, make_tar

LARGE = 60_000  # bytes of an image, which is much beside its header


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    root = tmp_path_factory.mktemp("store")
    (root / "bucket").mkdir()
    for i in range(5):
        make_tar(root / "bucket" / f"train-{i:04d}.tar", images(3 + i, "folder/", LARGE))
    before = dict(os.environ)
    with s3_server(root, listing_seconds=0.2) as found:
        os.environ.update(found.environment)
        yield found
    for name in found.environment:
        os.environ.pop(name, None)
    os.environ.update(before)


def test_an_index_of_headers_reads_no_image_and_says_the_same(server: S3Server, tmp_path: Path) -> None:
    whole = index_shards("s3://bucket", config_of(server), output=str(tmp_path / "whole"), checksums=True)
    with faulty_proxy(server.port) as proxy:
        asked = StorageConfig(endpoint_url=proxy.endpoint_url)
        manifest = index_shards("s3://bucket", asked, output=str(tmp_path / "headers"), num_workers=2)
        read, num_images = proxy.body_bytes, manifest.num_samples
    assert proxy.requests < 5 * 4 + 1.5 * num_images, "a sample's label and the next header come in one window"
    assert read < (num_images + 2 * 5) * WINDOW_BYTES + 20_000
    assert read < sum(shard.num_bytes for shard in manifest.shards) / 8
    assert manifest.hash != whole.hash, "the member table stands for the bytes"
    for mine, theirs in zip(manifest.shards, whole.shards, strict=True):
        one, other = (read_member_index(shard, LOCAL) for shard in (mine, theirs))
        assert list(one.keys) == list(other.keys)
        for name in ("offsets", "sizes", "labels", "json_offsets", "json_sizes"):
            assert np.array_equal(getattr(one, name), getattr(other, name))
        read_now = [Reader(found, config_of(server), cache_of(tmp_path)) for found in (manifest, whole)]
    for at in [(0, 1), (4, 6)]:
        shard, member = np.array([at[0]]), np.array([at[1]])
        assert read_now[0].images(shard, member) == read_now[1].images(shard, member)
    assert verify_shards(str(tmp_path / "headers"), config_of(server), num_workers=0) == []
    for reader in read_now:
        reader.close()


def config_of(server: S3Server) -> StorageConfig:
    return StorageConfig(endpoint_url=server.endpoint_url)


def cache_of(tmp_path: Path) -> DataConfig:
    return DataConfig(cache_dir=str(tmp_path / "cache"))


def folder_of(tmp_path: Path, count: int = 7) -> Path:
    folder = tmp_path / "set"
    folder.mkdir()
    for i in range(count):
        make_tar(folder / f"{i:04d}.tar", images(3 + i))
    return folder


@pytest.mark.parametrize("checksums", [False, True])
def test_parts_join_to_what_one_command_writes(tmp_path: Path, checksums: bool) -> None:
    folder, out = folder_of(tmp_path), str(tmp_path / "out")
    once = index_shards(str(folder), LOCAL, output=out, checksums=checksums, num_workers=0)
    one_file = Path(once.url).read_bytes()
    Path(once.url).unlink()
    for k in (3, 1, 4, 2):
        part = index_shards(str(folder), LOCAL, output=out, checksums=checksums, num_workers=0, part=(k, 4))
        assert not Path(once.url).exists()
        assert load_manifest(part.url, LOCAL).counts.tolist() == part.counts.tolist()
    assert merge(out, LOCAL) == once
    assert Path(once.url).read_bytes() == one_file
    assert list(Path(out).glob("*part*")) == []


@pytest.mark.slow
def test_processes_index_what_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(tmp_path)
    monkeypatch.setattr("dist_ssl.data.indexing.SHARDS_A_TURN", 2)
    several = index_shards(str(folder), LOCAL, output=str(tmp_path / "a"), num_workers=2, num_processes=2)
    assert several.hash == index_shards(str(folder), LOCAL, output=str(tmp_path / "b"), num_workers=0).hash


def test_parts_that_do_not_add_up_are_refused_in_one_line(tmp_path: Path) -> None:
    folder, out = folder_of(tmp_path), tmp_path / "out"

    def index(*options: str) -> None:
        done = CliRunner().invoke(app, ["index", str(folder), "--output", str(out), "--workers", "0", *options])
        assert done.exit_code == 0, done.exception

    def refused() -> str:
        with pytest.raises(UserError) as told:
            merge(str(out), LOCAL)
        assert "\n" not in str(told.value)
        assert not (out / "manifest.json").exists()
        return str(told.value)

    out.mkdir()
    assert "no parts there" in refused()
    index("--part", "1/4")
    index("--part", "4/4")
    assert "of 4 parts 2, 3 are missing; run `dist-ssl shards index` with --part 2/4" in refused()
    index("--part", "2/2")
    assert "are parts of different indexes (parts 4 and 2)" in refused()
    (out / "manifest.part-00002-of-00002.json").unlink()
    index("--part", "2/4")
    index("--part", "3/4", "--checksums")
    assert "(checksums False and True)" in refused()
    make_tar(folder / "9999.tar", images(2))
    index("--part", "3/4")
    assert "parts of different indexes (shards 7 and 8" in refused()
    (folder / "9999.tar").unlink()
    index("--part", "3/4")
    (out / "manifest.part-00002-of-00004.json").rename(out / "manifest.part-00009-of-00004.json")
    (out / "manifest.part-00002-of-00004.json").write_bytes((out / "manifest.part-00009-of-00004.json").read_bytes())
    assert "its parts overlap, or leave a gap" in refused()
    (out / "manifest.part-00009-of-00004.json").unlink()
    damaged = out / "manifest.part-00002-of-00004.json"
    damaged.write_text(damaged.read_text().replace('"samples": 4', '"samples": 5'))
    assert "do not add up to its hash" in refused()
    for wrong in ("5/4", "0/4", "1", "a/b", "1/0"):
        with pytest.raises(UserError, match=r"--part: expected K/N with 1 <= K <= N"):
            parse(wrong)


def test_a_shard_that_was_replaced_is_told_by_its_headers(server: S3Server, tmp_path: Path) -> None:
    """Another image, name or size is; bytes of an image alone are told with --checksums only, as the page says."""
    folder = folder_of(tmp_path, 2)
    manifest = index_shards(str(folder), LOCAL, num_workers=0)
    path, index = folder / "0001.tar", read_member_index(manifest.shards[1], LOCAL)
    good = path.read_bytes()
    header = int(index.offsets[2]) - 512
    for at, told in ((header + 140, [("00002", index.difference)]), (header + 600, [])):
        data = bytearray(good)
        data[at] ^= 1
        path.write_bytes(data)
        assert [(one.key, one.reason) for one in verify_shards(str(folder), LOCAL, num_workers=0)][:1] == told
        reader = Reader(manifest, LOCAL, DataConfig())
        (found,) = reader.images(np.array([1]), np.array([2]))
        assert isinstance(found, BadSample) == bool(told)
        reader.close()
    # Of a remote one nothing is trained on whose table is another.
    bucket, config = server.directory / "other", config_of(server)
    bucket.mkdir()
    (bucket / "a.tar").write_bytes(good)
    server.forget()
    remote = index_shards("s3://other", config, output=str(tmp_path / "index"), num_workers=0)
    swapped = bytearray(good)
    swapped[header : header + 8], swapped[:8] = good[:8], good[header : header + 8]
    (bucket / "a.tar").write_bytes(swapped)
    server.forget()
    reader = Reader(remote, config, cache_of(tmp_path))
    with pytest.raises(UserError, match=r"a.tar: its headers are not those that were indexed"):
        reader._opened_cache().fetch(remote.shards[0])
    reader.close()


def test_an_index_that_has_checksums_is_kept_and_one_without_is_made_anew(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, 2)
    headers = index_shards(str(folder), LOCAL, num_workers=0)
    whole = index_shards(str(folder), LOCAL, checksums=True, num_workers=0)
    assert [shard.headers_only for shard in (*headers.shards, *whole.shards)] == [True, True, False, False]
    assert compared(headers, False).startswith("headers are those that were indexed: of 2 of 2 shards")
    assert compared(whole, True).startswith("whole: every byte of 2 shards")
    assert index_shards(str(folder), LOCAL, num_workers=0) == whole, "it knows more than was asked for"
    assert f'"format": "{FORMAT}"' in Path(whole.url).read_text(), "which older versions read"
