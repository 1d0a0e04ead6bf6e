"""Reading over HTTPS and from the Hub, by real requests: ranges, faults, refusals, and what may be told to whom."""

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
from dist_ssl.data.shards import write_shards
from dist_ssl.data.sources import open_source
from dist_ssl.storage import large_reads
from dist_ssl.storage.large_reads import read_file
from tests import terminal
from tests.proxy import FaultyProxy, faulty_proxy
from tests.web import TOKEN, WebServer, certificate, web_server

DATA = os.urandom(3_000_000)
QUICK = StorageConfig(retry_seconds=20, timeout_seconds=10)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebServer]:
    """A web server and a Hub of one directory, which holds shards of shapes, and a file `big`."""
    root = tmp_path_factory.mktemp("web")
    source = open_source("shapes:60:32")
    for folder in ("org/shapes/train", "gated/shapes/train"):
        write_shards(source, str(root / folder), StorageConfig(), shard_mb=0.1, num_workers=0)
    for place in ("big", "org/shapes/big file", "norange", "forbidden", "plain"):
        if place in ("norange", "forbidden", "plain"):
            (root / place).mkdir()
        (root / place / "big" if (root / place).is_dir() else root / place).write_bytes(DATA)
    (root / "empty").touch()
    with web_server(root) as started, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{started.port}")
        patch.setenv("HF_HOME", str(root / "no login here"))
        patch.delenv("HF_TOKEN", raising=False)
        yield started


@pytest.fixture(scope="module")
def https(server: WebServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyProxy]:
    folder = tmp_path_factory.mktemp("tls")
    with faulty_proxy(server.port, tls=certificate(folder)) as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", str(folder / "cert.pem"))
        yield proxy


def read(url: str, num_bytes: int) -> bytes:
    data = bytearray(num_bytes)

    def take(offset: int, piece: bytes) -> None:
        data[offset : offset + len(piece)] = piece

    assert read_file(url, QUICK, num_bytes, take) == zlib.crc32(data)
    return bytes(data)


def test_files_of_a_web_server_and_of_the_hub(https: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_reads, "RANGE_BYTES", 1_000_000)
    for root, name in ((https.endpoint_url, "big"), ("hf://datasets/org/shapes", "big file")):
        url = f"{root}/{name}"
        assert storage.size(url, QUICK) == len(DATA)
        assert storage.read_bytes(url, QUICK) == read(url, len(DATA)) == DATA
        assert storage.read_bytes(url, QUICK, 5, 7_000) == DATA[5:7_000]
        assert storage.read_bytes(url, QUICK, 2_999_000) == DATA[2_999_000:]
        assert storage.exists(url, QUICK)
        assert not storage.exists(f"{root}/none", QUICK)
        for call in (storage.read_bytes, storage.size):
            with pytest.raises(FileNotFoundError, match="none"):
                call(f"{root}/none", QUICK)
        for start in (2_999_999, 3_000_000):
            with pytest.raises(storage.StorageError, match="expected at least 5000000 bytes, the file holds 3000000"):
                storage.read_bytes(url, QUICK, start, 5_000_000)
        with pytest.raises(storage.StorageError, match="the file holds 3000000: it is not the one"):
            read(url, len(DATA) + 1)
        for write in (storage.write_bytes, storage.write_file):
            with pytest.raises(UserError, match="is only read from; name a folder or a bucket"):
                write(
                    url if write is storage.write_bytes else "big", b"" if write is storage.write_bytes else url, QUICK
                )
        with pytest.raises(UserError, match="is only read from"):
            storage.remove(url, QUICK)
    assert storage.size(f"{https.endpoint_url}/empty", QUICK) == 0


@pytest.mark.slow
def test_faults_of_a_web_server_are_retried_and_bodies_resumed(
    server: WebServer, https: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(large_reads, "RANGE_BYTES", 500_000)
    url = f"{https.endpoint_url}/big"
    https.refused, https.cut, before = 0.3, 0.4, https.faults
    try:
        assert read(url, len(DATA)) == DATA
        for start in range(0, 30_000, 10_000):
            assert storage.read_bytes(url, QUICK, start, start + 9_000) == DATA[start : start + 9_000]
            assert storage.size(url, QUICK) == len(DATA)
            assert storage.exists(url, QUICK)  # a busy server's file is not missing
            assert not storage.exists(f"{https.endpoint_url}/none", QUICK)
        assert https.faults >= before + 6
        https.refused = 1.0
        with pytest.raises(storage.StorageError, match=r"/big: gave up after \d+ attempts in .*last cause"):
            storage.size(url, StorageConfig(retry_seconds=1))
    finally:
        https.refused = https.cut = 0.0


def test_what_no_second_attempt_mends_is_told_at_once(
    server: WebServer, https: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, root = time.monotonic(), https.endpoint_url
    for call in (lambda url: storage.read_bytes(url, QUICK), lambda url: storage.size(url, QUICK)):
        with pytest.raises(PermissionError, match="the server answered 403 Forbidden; credentials are those of"):
            call(f"{root}/forbidden/big")
        with pytest.raises(PermissionError, match="leads to http://localhost, which is not encrypted"):
            call(f"{root}/plain/big")
    with pytest.raises(UserError, match="/norange/big: the server takes no Range"):
        storage.read_bytes(f"{root}/norange/big", QUICK, 5, 9)
    assert storage.read_bytes(f"{root}/norange/big", QUICK) == DATA
    for pattern in ("*.tar", "train"):
        with pytest.raises(UserError, match=r"can't be listed; name its files by braces: https://host/train-\{0000"):
            index_shards(f"{root}/{pattern}", QUICK, output="out")
    monkeypatch.setenv("SSL_CERT_FILE", "/dev/null")
    with pytest.raises(UserError, match="its certificate is not trusted here: "):
        storage.read_bytes(f"{root}/big", StorageConfig(retry_seconds=21))  # another configuration, another session
    assert time.monotonic() - started < 15


def test_a_token_goes_to_the_hub_alone(server: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    url = "hf://datasets/gated/shapes/train/000000.tar"
    with pytest.raises(PermissionError, match="403 Forbidden; where a repository is gated, accept its terms") as told:
        storage.read_bytes(url, QUICK)
    assert "\n" not in str(told.value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    server.seen.clear()
    data = storage.read_bytes(url, QUICK)
    assert data == (server.directory / "gated/shapes/train/000000.tar").read_bytes()
    asked = dict(server.seen)
    assert asked["/datasets/gated/shapes/resolve/main/train/000000.tar"] == f"Bearer {TOKEN}"
    assert asked["/gated/shapes/train/000000.tar?Signature=a%2Fb"] is None  # signed as the Hub spelled it
    with pytest.raises(PermissionError):
        storage.read_bytes(url, QUICK.model_copy(update={"anonymous": True}))
    assert TOKEN not in storage.redact(f"a library says {TOKEN}")


@pytest.mark.parametrize("pattern", ["/{000000..000001}.tar", "/{000000,000001}.tar", "/*.tar", "/00000[01].ta?", ""])
def test_an_index_of_a_pattern_is_that_of_the_files(
    server: WebServer, https: FaultyProxy, tmp_path: Path, pattern: str
) -> None:
    here = load_manifest(str(server.directory / "org/shapes/train"), QUICK)
    assert len(here.shards) == 2
    roots = [
        "hf://datasets/org/shapes/train",
        "hf://datasets/org/shapes@main/train",
        str(server.directory / "org/shapes/train"),
    ]
    roots += [f"{https.endpoint_url}/org/shapes/train"] if "{" in pattern else []
    for i, root in enumerate(roots):
        there = index_shards(root + pattern, QUICK, output=str(tmp_path / str(i)), checksums=True, num_workers=0)
        assert there.hash == here.hash
        assert [shard.url.split("/")[-1] for shard in there.shards] == ["000000.tar", "000001.tar"]
        assert all(shard.url.startswith(f"{root}/") for shard in there.shards)


def test_an_interrupted_index_goes_on(server: WebServer, tmp_path: Path) -> None:
    def index() -> str:
        return index_shards("hf://datasets/org/shapes/train/*.tar", QUICK, output=str(tmp_path), num_workers=0).hash

    first = index()
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "000001.tar.idx").unlink()
    server.seen.clear()
    assert index() == first
    assert {path.split("?")[0][-10:] for path, _ in server.seen if "/resolve/" in path} == {"000001.tar"}


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("hf://datasets/org/none/train/000000.tar", r"no such shard: hf://datasets/org/none.*repository not found"),
        ("hf://datasets/org/none/train", "repository not found"),
        ("hf://datasets/org/shapes/train/000009.tar", "no such shard: hf://datasets/org/shapes/train/000009.tar"),
        ("hf://datasets/org/shapes/none", "no .tar there; expected a directory of them"),
        ("hf://datasets/org/shapes/train/x*.tar", "nothing there is called so"),
        (
            "hf://datasets/gated/shapes/train",
            "403 Forbidden; where a repository is gated, accept its terms on its page",
        ),
        ("hf://shapes/000000.tar", "hf://shapes/000000.tar: "),
    ],
)
def test_what_the_hub_does_not_give_is_one_line(
    server: WebServer, tmp_path: Path, location: str, expected: str
) -> None:
    with pytest.raises((UserError, FileNotFoundError, PermissionError), match=expected) as told:
        index_shards(location, QUICK, output=str(tmp_path), num_workers=0)
    assert "\n" not in str(told.value)
    assert list(tmp_path.iterdir()) == []


def test_an_index_of_what_can_only_be_read_goes_elsewhere() -> None:
    """By the command, before anything is read: its line and its exit code."""
    done = terminal.run([sys.executable, "-m", "dist_ssl.cli", "shards", "index", "hf://datasets/org/none/train"])
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: hf://datasets/org/none/train: can only be read; name a folder or bucket for its")
