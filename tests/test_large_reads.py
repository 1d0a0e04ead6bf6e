"""Whole files in large ranges, from disk, from a real S3 server, and through a proxy that breaks bodies off."""

from __future__ import annotations

import contextlib
import http.server
import os
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_ssl.config import StorageConfig
from dist_ssl.storage import StorageError, large_reads
from dist_ssl.storage.large_reads import CHUNK_BYTES, RANGE_BYTES, read_file, writer
from tests.proxy import faulty_proxy
from tests.s3 import S3Server, s3_server

DATA = os.urandom(3 * RANGE_BYTES + 12345)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    directory = tmp_path_factory.mktemp("s3")
    (directory / "bucket").mkdir()
    (directory / "bucket" / "big").write_bytes(DATA)
    with s3_server(directory) as started, pytest.MonkeyPatch.context() as patch:
        for name, value in started.environment.items():
            patch.setenv(name, value)
        yield started


def read(url: str, config: StorageConfig, num_bytes: int) -> bytes:
    """The bytes that were handed over, each once; their checksum held against zlib's."""
    data, places = bytearray(num_bytes), set()

    def take(offset: int, piece: bytes) -> None:
        assert offset not in places
        places.add(offset)
        data[offset : offset + len(piece)] = piece

    assert read_file(url, config, num_bytes, take) == zlib.crc32(data)
    return bytes(data)


def test_what_is_handed_over_is_the_file(server: S3Server, tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(DATA)
    config = StorageConfig(endpoint_url=server.endpoint_url)
    for url in (str(tmp_path / "big"), "s3://bucket/big"):
        for num_bytes in (len(DATA), RANGE_BYTES, 1, 0):
            assert read(url, config, num_bytes) == DATA[:num_bytes]


def test_a_body_that_breaks_off_is_resumed_where_it_broke(server: S3Server) -> None:
    with faulty_proxy(server.port, refused=0.1, cut=0.5) as proxy:
        config = StorageConfig(endpoint_url=proxy.endpoint_url, retry_seconds=60)
        assert read("s3://bucket/big", config, len(DATA)) == DATA
        assert proxy.faults >= 3
        # Lost is what lay in a connection's buffers. Asked for again whole, cut ranges of 8 MiB cost half of the file.
        assert proxy.body_bytes < len(DATA) + proxy.faults * 4 * CHUNK_BYTES


def test_a_file_that_is_too_short_is_an_error_at_once(server: S3Server) -> None:
    config = StorageConfig(endpoint_url=server.endpoint_url, retry_seconds=30)
    for missing in (1, 2 * RANGE_BYTES):
        started = time.monotonic()
        with pytest.raises(StorageError, match=rf"the file holds {len(DATA)}: it is not the one"):
            read("s3://bucket/big", config, len(DATA) + missing)
        assert time.monotonic() - started < 10


def test_a_failure_ends_the_other_requests(server: S3Server) -> None:
    """The first range's bytes can't be kept, while the others would be retried for a minute."""
    with faulty_proxy(server.port, refused=0.9) as proxy:
        config = StorageConfig(endpoint_url=proxy.endpoint_url, retry_seconds=60)
        started = time.monotonic()

        def take(offset: int, _: bytes) -> None:
            proxy.refused = 1.0
            raise OSError("no")

        with pytest.raises(StorageError, match="can't be kept on this machine: no"):
            read_file("s3://bucket/big", config, len(DATA), take)
        assert time.monotonic() - started < 30
        requests = proxy.requests
        time.sleep(1)
        assert proxy.requests == requests


def test_a_store_that_refuses_for_good_is_an_error_within_the_budget(server: S3Server) -> None:
    with faulty_proxy(server.port, refused=1.0) as proxy:
        config = StorageConfig(endpoint_url=proxy.endpoint_url, retry_seconds=2)
        started = time.monotonic()
        with pytest.raises(StorageError, match=r"s3://bucket/big: gave up after \d+ attempts in .*last cause"):
            read("s3://bucket/big", config, len(DATA))
        assert time.monotonic() - started < 10


def test_a_server_that_answers_a_range_with_the_whole_file_is_refused() -> None:
    class Whole(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(DATA)))
            self.end_headers()
            with contextlib.suppress(OSError):  # the client hangs up
                self.wfile.write(DATA)

        def do_HEAD(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(DATA)))
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Whole) as whole:
        threading.Thread(target=whole.serve_forever, daemon=True).start()
        config = StorageConfig(endpoint_url=f"http://127.0.0.1:{whole.server_port}", anonymous=True, retry_seconds=1)
        with pytest.raises(StorageError, match="the server takes no Range"):
            read("s3://bucket/big", config, len(DATA))
        whole.shutdown()


def test_what_cannot_be_kept_is_no_fault_of_the_store(server: S3Server) -> None:
    """A local disk that is full: retrying the store for two minutes would not mend it."""
    config = StorageConfig(endpoint_url=server.endpoint_url, retry_seconds=120)
    started = time.monotonic()
    with (
        open("/dev/full", "wb") as full,
        pytest.raises(StorageError, match=r"s3://bucket/big: .* can't be kept .*No space left"),
    ):
        read_file("s3://bucket/big", config, len(DATA), writer(full))
    assert time.monotonic() - started < 10


def test_stop_ends_a_read(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_reads, "RANGE_BYTES", len(DATA) // 100)
    config, taken = StorageConfig(endpoint_url=server.endpoint_url), []

    def take(offset: int, _: bytes) -> None:
        taken.append(offset)

    assert read_file("s3://bucket/big", config, len(DATA), take, stop=lambda: len(taken) > 3) is None
    assert 3 < len(taken) < 50
