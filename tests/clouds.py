"""Azure Blob Storage and Google Cloud Storage on loopback, by emulators: Azurite (npm) and gcp-storage-emulator.

    with CLOUDS["az"]() as cloud:
        os.environ.update(cloud.environment_at(cloud.port))  # or at the port of a proxy in front of it

Each holds one bucket (or container), called `bucket`.
"""

from __future__ import annotations

import contextlib
import http.server
import os
import secrets
import socket
import subprocess
import threading
import time
from base64 import b64encode
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.pool import free_port

AZURITE = "3.37.0"


class Cloud:
    """An emulator on a port of loopback."""

    def __init__(self, scheme: str, port: int, key: str = ""):
        self.scheme, self.port, self.key = scheme, port, key

    def environment_at(self, port: int) -> dict[str, str]:
        """What a client needs."""
        if self.scheme == "gs":
            return {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}"}
        return {
            "AZURE_STORAGE_CONNECTION_STRING": f"DefaultEndpointsProtocol=http;AccountName=box;AccountKey={self.key};"
            f"BlobEndpoint=http://127.0.0.1:{port}/box;"
        }


def azurite() -> Path:
    """What tests/system.sh installs. Skips the test where it is not there."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    binary = cache / f"dist_ssl-tests/azurite-{AZURITE}/node_modules/.bin/azurite-blob"
    if not binary.exists():
        pytest.skip("Azurite is not installed: bash tests/run.sh --system installs it where there is npm")
    return binary


@contextlib.contextmanager
def azure() -> Iterator[Cloud]:
    from azure.storage.blob import BlobServiceClient

    cloud = Cloud("az", free_port(), b64encode(secrets.token_bytes(32)).decode())
    process = subprocess.Popen(
        [
            str(azurite()), "--blobPort", str(cloud.port), "--inMemoryPersistence", "--silent", "--disableTelemetry",
            "--skipApiVersionCheck",
        ],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"AZURITE_ACCOUNTS": f"box:{cloud.key}"},
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", cloud.port), timeout=1):
                break
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("azurite does not listen")
            time.sleep(0.05)
        string = cloud.environment_at(cloud.port)["AZURE_STORAGE_CONNECTION_STRING"]
        with BlobServiceClient.from_connection_string(string) as client:
            client.create_container("bucket")
        yield cloud
    finally:
        process.kill()
        process.wait()


class _Server(http.server.HTTPServer):
    """One request at a time: the emulator's memory is shared."""

    def handle_error(self, *_: object) -> None:
        """gcsfs hangs up on what it no longer needs."""


@contextlib.contextmanager
def google() -> Iterator[Cloud]:
    from gcp_storage_emulator.handlers.buckets import create_bucket
    from gcp_storage_emulator.server import RequestHandler
    from gcp_storage_emulator.storage import Storage

    storage = Storage(use_memory_fs=True)
    create_bucket("bucket", storage)
    with _Server(("127.0.0.1", 0), partial(RequestHandler, storage)) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield Cloud("gs", server.server_port)
        finally:
            server.shutdown()


CLOUDS = {"az": azure, "gs": google}
