"""az:// and gs:// by real requests to emulators: files, patterns, faults, refusals, and what is told of them."""

from __future__ import annotations

import os
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_ssl import storage
from dist_ssl.config import StorageConfig, UserError
from dist_ssl.data.indexing import index_shards
from dist_ssl.data.manifest import load_manifest
from dist_ssl.storage import large_reads
from dist_ssl.storage.large_reads import read_file
from tests import terminal
from tests.clouds import CLOUDS, Cloud
from tests.proxy import faulty_proxy

DATA = os.urandom(2_999_999) + b"."  # the emulator of gs takes a line break at the end for its protocol's
# Of aiohttp, about the clients of both.
pytestmark = pytest.mark.filterwarnings("ignore:Sending a large body directly:ResourceWarning")
QUICK = StorageConfig(retry_seconds=20, timeout_seconds=10)


@pytest.fixture(scope="module", params=["az", "gs"])
def cloud(request: pytest.FixtureRequest) -> Iterator[Cloud]:
    with CLOUDS[request.param]() as started, pytest.MonkeyPatch.context() as patch:
        for name, value in started.environment_at(started.port).items():
            patch.setenv(name, value)
        yield started


def read(url: str, num_bytes: int, config: StorageConfig = QUICK) -> bytes:
    data = bytearray(num_bytes)

    def take(offset: int, piece: bytes) -> None:
        data[offset : offset + len(piece)] = piece

    assert read_file(url, config, num_bytes, take) == zlib.crc32(data)
    return bytes(data)


def test_files_of_a_cloud(cloud: Cloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_reads, "RANGE_BYTES", 1_000_000)
    root = f"{cloud.scheme}://bucket/files"
    (tmp_path / "x").write_bytes(DATA)
    storage.write_bytes(f"{root}/a", DATA, QUICK)
    storage.write_file(tmp_path / "x", f"{root}/b c", QUICK)
    storage.write_bytes(f"{root}/empty", b"", QUICK)
    for name in ("a", "b c"):
        url = f"{root}/{name}"
        assert storage.size(url, QUICK) == len(DATA)
        assert storage.read_bytes(url, QUICK) == read(url, len(DATA)) == DATA
        assert storage.read_bytes(url, QUICK, 5, 7_000) == DATA[5:7_000]
        assert storage.read_bytes(url, QUICK, 2_999_000) == DATA[2_999_000:]
        for start in (2_999_999, 3_000_000, 4_000_000):
            with pytest.raises(storage.StorageError, match="expected at least 5000000 bytes, the file holds 3000000"):
                storage.read_bytes(url, QUICK, start, 5_000_000)
        with pytest.raises(storage.StorageError, match="the file holds 3000000: it is not the one"):
            read(url, len(DATA) + 1)
    assert storage.read_bytes(f"{root}/empty", QUICK) == b""
    urls = [f"{root}/a", f"{root}/b c", f"{root}/empty"]
    assert storage.list_files(root, QUICK) == storage.glob(f"{root}/*", QUICK) == urls
    assert storage.glob(f"{root}/[ab]*", QUICK) == urls[:2]
    assert storage.list_files(f"{root}/none", QUICK) == []
    storage.write_bytes(f"{root}/a", b"other", QUICK)
    assert storage.read_bytes(f"{root}/a", QUICK) == b"other"
    storage.remove(f"{root}/a", QUICK)
    storage.remove(f"{root}/a", QUICK)
    assert not storage.exists(f"{root}/a", QUICK)
    storage.remove(root, QUICK, recursive=True)
    assert storage.list_files(root, QUICK) == []


def test_what_a_cloud_refuses_is_told_at_once_and_in_one_line(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    started = time.monotonic()
    for bucket in ("bucket", "nobucket"):
        url = f"{cloud.scheme}://{bucket}/none"
        assert not storage.exists(url, QUICK)
        for call in (storage.read_bytes, storage.size):
            with pytest.raises(FileNotFoundError, match=url) as missing:
                call(url, QUICK)
            assert "\n" not in str(missing.value)
    with pytest.raises(FileNotFoundError, match="://nobucket/none") as missing:
        storage.write_bytes(url, b"x", QUICK)
    assert "\n" not in str(missing.value)
    hint = "AZURE_STORAGE_CONNECTION_STRING" if cloud.scheme == "az" else "credentials were not found; log in by"
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "")
    monkeypatch.setenv("CLOUDSDK_CONFIG", "/nonexistent")
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    for name in cloud.environment_at(cloud.port):
        monkeypatch.delenv(name)
    for call in (storage.read_bytes, storage.filesystem):
        with pytest.raises(UserError, match=hint) as refused:
            call(f"{cloud.scheme}://bucket/x", QUICK)
        assert "\n" not in str(refused.value)
    assert time.monotonic() - started < 15


def test_a_wrong_key_of_azure_is_no_fault_and_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with CLOUDS["az"]() as cloud:
        storage_key = "A" * 86 + "=="
        string = cloud.environment_at(cloud.port)["AZURE_STORAGE_CONNECTION_STRING"].replace(cloud.key, storage_key)
        monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", string)
        for call in (storage.read_bytes, storage.size, storage.list_files):
            with pytest.raises(PermissionError, match=r"az://bucket/x: .*authenticate") as refused:
                call("az://bucket/x", QUICK)
            assert storage_key not in str(refused.value)
            assert "\n" not in str(refused.value)
        anonymous = storage.filesystem("az://bucket/x", StorageConfig(anonymous=True))[0]
        assert storage_key not in repr(vars(anonymous))


def test_faults_of_a_cloud_are_retried(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_reads, "RANGE_BYTES", 500_000)
    url = f"{cloud.scheme}://bucket/faults"
    storage.write_bytes(url, DATA, QUICK)
    with faulty_proxy(cloud.port) as proxy:
        for name, value in cloud.environment_at(proxy.port).items():
            monkeypatch.setenv(name, value)
        proxy.refused, proxy.cut = 0.3, 0.2
        assert read(url, len(DATA)) == DATA
        for start in range(0, 60_000, 10_000):
            assert storage.read_bytes(url, QUICK, start, start + 9_000) == DATA[start : start + 9_000]
            assert storage.size(url, QUICK) == len(DATA)
            assert not storage.exists(f"{url}-none", QUICK)
        storage.write_bytes(f"{url}-written", DATA, QUICK)
        assert storage.list_files(f"{cloud.scheme}://bucket", QUICK) == [url, f"{url}-written"]
        assert proxy.faults >= 6
        proxy.refused, proxy.cut, before = 1.0, 0.0, proxy.requests
        with pytest.raises(storage.StorageError, match=r"gave up after (\d+) attempts in .*last cause") as told:
            storage.size(url, StorageConfig(retry_seconds=1))
        # Ours alone are the attempts: the clients' own tries would multiply them (gcsfs asks two things, up to thrice).
        attempts = int(str(told.value).partition("after ")[2].split()[0])
        assert attempts <= proxy.requests - before <= 3 * attempts
    assert cloud.key not in str(told.value) or not cloud.key


def test_an_index_of_a_pattern_is_that_of_the_files(cloud: Cloud, small_shards: Path, tmp_path: Path) -> None:
    here = load_manifest(str(small_shards), QUICK)
    root = f"{cloud.scheme}://bucket/shards"
    for shard in here.shards:
        storage.write_file(shard.url, f"{root}/{shard.url.split('/')[-1]}", QUICK)
    last = f"{len(here.shards) - 1:06d}"
    for i, pattern in enumerate((f"/{{000000..{last}}}.tar", "/*.tar", "")):
        there = index_shards(root + pattern, QUICK, output=str(tmp_path / str(i)), num_workers=0, checksums=True)
        assert there.hash == here.hash
        assert all(shard.url.startswith(f"{root}/") for shard in there.shards)
    # Beside the shards, as a bucket that may be written to allows; interrupted, it goes on.
    assert index_shards(root, QUICK, num_workers=0, checksums=True).hash == here.hash
    storage.remove(f"{root}/manifest.json", QUICK)
    assert index_shards(root, QUICK, num_workers=0, checksums=True).hash == here.hash
    assert load_manifest(root, QUICK).hash == here.hash


@pytest.mark.parametrize("location", ["nobucket/train", "nobucket/train/*.tar", "nobucket/{000000..000001}.tar"])
def test_the_command_tells_of_a_bucket_that_is_not_there(cloud: Cloud, tmp_path: Path, location: str) -> None:
    place = f"{cloud.scheme}://{location}"
    index = ["shards", "index", place, "--output", str(tmp_path / "out")]
    done = terminal.run([sys.executable, "-m", "dist_ssl.cli", *index])
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert f"{cloud.scheme}://nobucket/" in line
