"""A web server with ranges on loopback, and one that answers as the Hugging Face Hub does where it is read from.

    with web_server(directory) as server, faulty_proxy(server.port, tls=certificate(tmp)) as https: ...

The Hub's repositories are the folders ORG/NAME of `directory`, all data sets. Bytes are redirected to another origin,
localhost, under a signature, as the Hub does; `seen` are (path, Authorization) of all requests.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import re
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

TOKEN = "hf_" + "t" * 30  # opens what is in an organisation called gated


def certificate(folder: Path) -> ssl.SSLContext:
    """A server's context with a certificate for loopback that signs itself, which is folder/cert.pem."""
    key, cert = folder / "key.pem", folder / "cert.pem"
    subprocess.run(
        [
            "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
            "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
            "-keyout", str(key), "-out", str(cert),
        ],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    return context


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WebServer

    def do_GET(self) -> None:
        self.server.seen.append((self.path, self.headers.get("Authorization")))
        path = unquote(urlsplit(self.path).path).lstrip("/")
        first, _, rest = path.partition("/")
        if match := re.fullmatch(r"api/datasets/([^/]+/[^/]+)(?:/revision/[^/]+)?", path):
            self._repository(match[1])
        elif match := re.fullmatch(r"api/datasets/([^/]+/[^/]+)/tree/main(?:/(.*))?", path):
            self._tree(match[1], match[2] or "")
        elif match := re.fullmatch(r"datasets/([^/]+)/([^/]+)/resolve/main/(.+)", path):
            self._resolve(*match.groups())
        elif first == "forbidden":
            self._answer(403)
        elif first == "plain":
            self._answer(302, {"Location": f"http://localhost:{self.server.port}/{rest}"})
        else:
            self._file(self.server.directory / path, first != "norange")

    def _repository(self, name: str) -> None:
        if not (self.server.directory / name).is_dir():
            self._answer(401, {"X-Error-Code": "RepoNotFound"})
            return
        self._answer(200, {}, json.dumps({"id": name, "sha": "0" * 40, "siblings": [], "tags": []}).encode())

    def _tree(self, name: str, folder: str) -> None:
        root, recursive = (
            self.server.directory / name,
            "true" in parse_qs(urlsplit(self.path).query.lower()).get("recursive", []),
        )
        if not (root / folder).is_dir():
            self._answer(404, {"X-Error-Code": "EntryNotFound"})
            return
        found = sorted((root / folder).rglob("*") if recursive else (root / folder).iterdir())
        self._answer(200, {}, json.dumps([
            {"type": "file" if one.is_file() else "directory", "path": str(one.relative_to(root)), "oid": "0" * 40,
             "size": one.stat().st_size if one.is_file() else 0}
            for one in found
        ]).encode())  # fmt: skip

    def _resolve(self, organisation: str, name: str, file: str) -> None:
        if organisation == "gated" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(403, {"X-Error-Code": "GatedRepo"})
            return
        place = f"http://localhost:{self.server.port}/{organisation}/{name}/{quote(file)}?Signature=a%2Fb"
        self._answer(302, {"Location": place})

    def _file(self, path: Path, ranges: bool) -> None:
        if not path.is_file():
            self._answer(404)
            return
        size, asked = path.stat().st_size, re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked or not ranges:
            self._answer(200, {}, path.read_bytes())
            return
        start, stop = int(asked[1]), min(int(asked[2] or size), size - 1) + 1
        if start >= size:
            self._answer(416, {"Content-Range": f"bytes */{size}"})
            return
        with open(path, "rb") as file:
            file.seek(start)
            data = file.read(stop - start)
        self._answer(206, {"Content-Range": f"bytes {start}-{stop - 1}/{size}"}, data)

    def _answer(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(OSError):  # a client may hang up
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class WebServer(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, directory: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.directory, self.port = directory, self.server_port
        self.seen: list[tuple[str, str | None]] = []


@contextlib.contextmanager
def web_server(directory: Path) -> Iterator[WebServer]:
    with WebServer(directory) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()
