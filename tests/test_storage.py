"""Storage on real files and a real S3 server: schemes, secrets, atomic writes, retries."""

from __future__ import annotations

import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_ssl import storage
from dist_ssl.config import StorageConfig, UserError
from dist_ssl.storage import files
from tests.proxy import faulty_proxy
from tests.s3 import S3Server, s3_server

LOCAL = StorageConfig()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    directory = tmp_path_factory.mktemp("s3")
    (directory / "bucket").mkdir()
    with s3_server(directory) as started, pytest.MonkeyPatch.context() as patch:
        for name, value in started.environment.items():
            patch.setenv(name, value)
        yield started


@pytest.mark.parametrize(
    "url",
    [
        "pipe:cat /etc/passwd", "PIPE:ls", "| ls", "http://host/x.tar", "ftp://host/x", "ssh://host/x", "gopher://x/y",
        "simplecache::s3://bucket/x", "zip://x.json::file:///tmp/x.zip", "github://a:b@c/d", "local:///x", "data:,x",
        "", "file+pipe://x", "reference://x", "hdfs://h/x", "arrow_hdfs://x", "jupyter://x",
    ],
)  # fmt: skip
def test_other_schemes_are_refused(url: str, tmp_path: Path) -> None:
    for call in (
        lambda: storage.check_url(url),
        lambda: storage.read_bytes(url, LOCAL),
        lambda: storage.write_bytes(url, b"", LOCAL),
        lambda: storage.list_files(url, LOCAL),
        lambda: storage.filesystem(url, LOCAL),
    ):
        with pytest.raises(UserError, match=r"file, s3, gs, az, hf, https, memory|empty"):
            call()


def test_allowed_schemes() -> None:
    assert storage.check_url("/a/b") == storage.check_url("a/b") == storage.check_url("file:///a") == "file"
    assert storage.check_url("s3://bucket/a") == "s3"
    assert storage.check_url("https://host/a.tar") == "https"
    assert storage.check_url("hf://datasets/org/name@main/a.tar") == "hf"


@pytest.mark.parametrize(
    "url",
    [
        "https://user:hunter2pw@host/x",
        "s3://key:hunter2pw@bucket/x",
        "https://h/x?sig=hunter2pw",
        "hf://hunter2pw@datasets/org/name/x",
        "az://box:hunter2pw@account/x",
    ],
)
def test_credentials_in_urls_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(UserError) as caught:
        storage.check_url(url)
    assert "hunter2pw" not in str(caught.value)
    assert "name many files by * or {0000..1023}, since a ? begins a query string" in str(caught.value)
    with pytest.raises(UserError) as caught:
        storage.filesystem("s3://bucket/x", StorageConfig(endpoint_url=url))
    assert "hunter2pw" not in str(caught.value)


def test_known_secrets_are_taken_out_of_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "abcdefghijklmnop")
    assert "abcdefghijklmnop" not in storage.redact("botocore says abcdefghijklmnop, and https://me:pw@h/x?y=z")
    assert storage.redact("https://me:pw@h/x?y=z") == "https://h/x"


def test_local_files(tmp_path: Path) -> None:
    url = str(tmp_path / "a" / "b.bin")
    storage.write_bytes(url, b"0123456789", LOCAL)
    assert storage.read_bytes(url, LOCAL) == b"0123456789"
    assert storage.read_bytes(url, LOCAL, 2, 5) == b"234"
    assert storage.read_bytes(f"file://{url}", LOCAL, 8) == b"89"
    assert storage.size(url, LOCAL) == 10
    storage.write_file(url, storage.join(str(tmp_path), "copy"), LOCAL)
    assert storage.list_files(str(tmp_path), LOCAL) == [url, str(tmp_path / "copy")]
    assert os.stat(url).st_mode & 0o044 == 0o044 & ~_umask()
    with pytest.raises(storage.StorageError, match=r"expected at least 20 bytes, the file holds 10"):
        storage.read_bytes(url, LOCAL, 8, 20)
    storage.remove(url, LOCAL)
    storage.remove(url, LOCAL)
    assert not storage.exists(url, LOCAL)
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(url, LOCAL)


def test_a_store_is_a_root_with_its_settings(server: S3Server, tmp_path: Path) -> None:
    """Names are relative, whatever the root's spelling; it goes to other processes."""
    config = StorageConfig(endpoint_url=server.endpoint_url, retry_seconds=5)
    for root in (str(tmp_path / "root"), f"file://{tmp_path}/root/", "s3://bucket/root", "memory://root"):
        store = pickle.loads(pickle.dumps(storage.Store(root, config)))
        assert store.names() == []
        store.write("b/c", memoryview(b"0123456789"))
        store.at("a").write("x", b"")
        assert store.names() == ["a/x", "b/c"]
        assert store.at("b").names() == ["c"]
        assert store.read("b/c", 2, 5) == storage.read_bytes(store.url("b/c"), config, 2, 5) == b"234"
        assert store.size("b/c") == 10
        assert store.local_path("b/c") == (str(tmp_path / "root/b/c") if storage.is_local(root) else None)
        store.remove("b/c")
        store.remove("a", recursive=True)
        assert store.names() == []


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_file_is_as_readable_as_the_umask_says_which_nobody_sets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the whole process's: set by one thread for a moment, it is that of another's file."""
    before, calls = os.umask(0o026), []
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "umask", calls.append)
            storage.write_bytes(str(tmp_path / "file"), b"x", LOCAL)
        assert calls == []
        assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


def test_a_kill_in_the_middle_of_a_write_leaves_the_old_file(tmp_path: Path) -> None:
    """A process writes big files over one another without end, and is killed at some moment."""
    url = tmp_path / "file"
    storage.write_bytes(str(url), b"x" * 30_000_000, LOCAL)
    code = (
        "import sys\nfrom dist_ssl import storage\nfrom dist_ssl.config import StorageConfig\n"
        "print('ready', flush=True)\n"
        "for i in range(10**6): storage.write_bytes(sys.argv[1], bytes([i % 256]) * 30_000_000, StorageConfig())"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(url)], stdout=subprocess.PIPE)
    assert process.stdout
    process.stdout.readline()
    for pause in (0.2, 0.03, 0.05):
        time.sleep(pause)
        data = url.read_bytes()
        assert len(data) == 30_000_000
        assert data == data[:1] * 30_000_000
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    data = url.read_bytes()
    assert len(data) == 30_000_000
    assert data == data[:1] * 30_000_000


def test_s3(server: S3Server, tmp_path: Path) -> None:
    config = StorageConfig(endpoint_url=server.endpoint_url, retry_seconds=5)
    data = os.urandom(3_000_000)
    storage.write_bytes("s3://bucket/dir/a", data, config)
    (tmp_path / "x").write_bytes(data)
    storage.write_file(tmp_path / "x", "s3://bucket/dir/b", config)
    assert storage.read_bytes("s3://bucket/dir/b", config) == data
    assert storage.read_bytes("s3://bucket/dir/a", config, 1000, 2_000_000) == data[1000:2_000_000]
    for start in (2_999_999, 3_000_000, 4_000_000):
        with pytest.raises(storage.StorageError, match="expected at least 5000000 bytes, the file holds 3000000"):
            storage.read_bytes("s3://bucket/dir/a", config, start, 5_000_000)
    assert storage.list_files("s3://bucket/dir", config) == ["s3://bucket/dir/a", "s3://bucket/dir/b"]
    assert storage.list_files("s3://bucket/none", config) == []
    assert storage.size("s3://bucket/dir/a", config) == 3_000_000
    storage.remove("s3://bucket/dir/a", config)
    assert not storage.exists("s3://bucket/dir/a", config)
    with pytest.raises(FileNotFoundError, match=r"s3://bucket/dir/a"):
        storage.read_bytes("s3://bucket/dir/a", config)


def test_s3_behind_a_faulty_proxy(server: S3Server) -> None:
    data = os.urandom(5000)
    with faulty_proxy(server.port, refused=0.2, cut=0.2, latency_seconds=0.01) as proxy:
        config = StorageConfig(endpoint_url=proxy.endpoint_url, retry_seconds=60)
        for i in range(6):
            storage.write_bytes(f"s3://bucket/small{i}", data[: 1000 * i], config)
            assert storage.read_bytes(f"s3://bucket/small{i}", config) == data[: 1000 * i]
            assert not storage.exists(f"s3://bucket/none{i}", config)
        assert proxy.faults >= 3


def test_the_budget_ends_retries_with_an_error_that_says_all(server: S3Server) -> None:
    with faulty_proxy(server.port, refused=1.0) as proxy:
        config = StorageConfig(endpoint_url=proxy.endpoint_url, retry_seconds=1.5)
        started = time.monotonic()
        with pytest.raises(storage.StorageError) as caught:
            storage.read_bytes("s3://bucket/big", config, 0, 10)
        assert time.monotonic() - started < 4
    message = str(caught.value)
    attempts = re.match(r"s3://bucket/big: gave up after (\d+) attempts in .*last cause: ", message)
    assert attempts is not None, message
    assert int(attempts[1]) > 1
    for secret in server.environment.values():
        assert secret in ("us-east-1", "true") or secret not in message


def test_an_outage_is_told_of_while_it_lasts(
    server: S3Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(files, "QUIET_SECONDS", 0.05)  # the pauses are drawn: less than half a second in one run of six
    with faulty_proxy(server.port, refused=1.0) as proxy:
        config = StorageConfig(endpoint_url=proxy.endpoint_url, retry_seconds=4)
        with pytest.raises(storage.StorageError):
            storage.read_bytes("s3://bucket/big", config, 0, 10)
    told = [record.getMessage() for record in caplog.records if "tried again for" in record.getMessage()]
    assert 1 <= len(told) <= 8
    assert all(line.startswith("s3://bucket/big: tried again for ") for line in told)


@pytest.mark.slow
def test_a_store_that_goes_silent_is_given_up(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes the connection and never says a word; it takes in small bodies, and of large ones what buffers hold."""
    monkeypatch.setattr(files, "SLOWEST_BYTES_PER_SECOND", 2**26)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        config = StorageConfig(endpoint_url=endpoint, retry_seconds=0.5, timeout_seconds=0.5)
        # On a busy machine the client's own start may take the second that one byte is given.
        for body, cause in (
            (b"x", "(ReadTimeoutError|1 bytes were not taken in within 1 s)"),
            (bytes(2**25), "33554432 bytes were not taken in within 2 s"),
        ):
            (tmp_path / "x").write_bytes(body)
            for write, arguments in (
                (storage.write_bytes, ("s3://bucket/x", body)),
                (storage.write_file, (tmp_path / "x", "s3://bucket/x")),
            ):
                started = time.monotonic()
                with pytest.raises(storage.StorageError, match=f"s3://bucket/x: gave up after 1 attempts.*{cause}"):
                    write(*arguments, config)
                assert time.monotonic() - started < 5


def test_wrong_keys_and_no_keys_fail_at_once(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    config = StorageConfig(endpoint_url=server.endpoint_url)
    started = time.monotonic()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not the secret of this server")
    with pytest.raises((PermissionError, UserError)):
        storage.read_bytes("s3://bucket/x", config)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    with pytest.raises(UserError, match=r"s3://bucket/x: .*credentials"):
        storage.read_bytes("s3://bucket/x", config)
    assert time.monotonic() - started < 10
