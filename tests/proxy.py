"""A TCP proxy in front of an HTTP server that misbehaves on purpose: refuses, resets, cuts bodies short, is slow."""

from __future__ import annotations

import contextlib
import random
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any


class FaultyProxy:
    """Serves one HTTP request a connection (it adds `Connection: close`), and draws what becomes of it.

    `refused`: part of requests answered 503 or reset; `cut`: part of answers whose body breaks off in the middle;
    `latency_seconds`: before each. `requests`, `faults` and `body_bytes`, those of answers, count. Draws are seeded;
    which request meets which depends on timing. With `tls` it speaks HTTPS, to a server that does not.
    """

    def __init__(
        self,
        port: int,
        refused: float = 0.0,
        cut: float = 0.0,
        latency_seconds: float = 0.0,
        seed: int = 0,
        tls: ssl.SSLContext | None = None,
    ):
        self._tls = tls
        self._upstream, self.refused, self.cut, self.latency_seconds = port, refused, cut, latency_seconds
        self._random, self._lock = random.Random(seed), threading.Lock()
        self.requests = self.faults = self.body_bytes = 0
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self._listener.getsockname()[1]
        self.endpoint_url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, plain: socket.socket) -> None:
        with contextlib.suppress(OSError), self._tls.wrap_socket(plain, True) if self._tls else plain as client:
            client.settimeout(60)
            request = _read_request(client)
            if not request:
                return
            with self._lock:
                self.requests += 1
                kind, cut_at = self._random.random(), self._random.random()
                self.faults += kind < self.refused + self.cut
            time.sleep(self.latency_seconds)
            if kind < self.refused / 2:
                client.sendall(b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                return
            if kind < self.refused:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close sends a reset
                return
            with socket.create_connection(("127.0.0.1", self._upstream), timeout=60) as server:
                server.sendall(request)
                head, body = _read_head(server)
                length = _content_length(head)
                left = int(length * cut_at) if kind < self.refused + self.cut and length else None
                client.sendall(head)
                while body:
                    body = body if left is None else body[:left]
                    client.sendall(body)
                    with self._lock:
                        self.body_bytes += len(body)
                    left = None if left is None else left - len(body)
                    if left == 0:
                        return
                    body = server.recv(2**18)


def _read_request(client: socket.socket) -> bytes:
    head, body = _read_head(client)
    lines = [line for line in head.split(b"\r\n") if line and not line.lower().startswith(b"connection:")]
    length = _content_length(head)
    while len(body) < length:
        more = client.recv(2**18)
        if not more:
            return b""
        body += more
    return b"\r\n".join([*lines, b"Connection: close", b"", b""]) + body if lines else b""


def _read_head(source: socket.socket) -> tuple[bytes, bytes]:
    data = b""
    while b"\r\n\r\n" not in data:
        more = source.recv(2**18)
        if not more:
            return b"", b""
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    if b"100-continue" in head.lower():
        source.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        head = b"\r\n".join(line for line in head.split(b"\r\n") if not line.lower().startswith(b"expect:"))
    if not body:
        body = source.recv(2**18) if _content_length(head) or b"\r\ntransfer-encoding:" in head.lower() else b""
    return head + b"\r\n\r\n", body


def _content_length(head: bytes) -> int:
    for line in head.split(b"\r\n"):
        if line.lower().startswith(b"content-length:"):
            return int(line.split(b":")[1])
    return 0


@contextlib.contextmanager
def faulty_proxy(port: int, **faults: Any) -> Iterator[FaultyProxy]:
    proxy = FaultyProxy(port, **faults)
    try:
        yield proxy
    finally:
        proxy.close()
