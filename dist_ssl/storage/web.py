"""Reading from web servers over HTTPS, as a file system of fsspec's that tells a busy server from a missing file.

fsspec's own takes every answer but success for a missing file where it asks for a size, and retries a refusal for
good as if it were a fault. Credentials of a server are those of ~/.netrc; a proxy is that of the environment.
"""

from __future__ import annotations

import errno
import ssl
from http import HTTPStatus
from typing import Any, NoReturn

import aiohttp
import yarl
from fsspec.implementations.http import HTTPFileSystem

from dist_ssl.config import UserError

_MAY_PASS = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS)


class WebFileSystem(HTTPFileSystem):
    """Files of web servers, to be read only, whole or in ranges. A path is the whole URL."""

    refused_hint = "credentials are those of ~/.netrc"

    def __init__(self, timeout_seconds: float, **options: Any):
        super().__init__(get_client=self._open_session, **options)
        self._timeout_seconds = timeout_seconds

    async def _open_session(self, **_: Any) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            # Made now: aiohttp's own is as old as its import, and SSL_CERT_FILE may have been set since.
            connector=aiohttp.TCPConnector(ssl=ssl.create_default_context()),
            timeout=aiohttp.ClientTimeout(sock_connect=self._timeout_seconds, sock_read=self._timeout_seconds),
            headers={"Accept-Encoding": "identity"},  # ranges and sizes are of the file itself
            trust_env=True,
            requote_redirect_url=False,  # a signed URL holds as it is spelled
            middlewares=(self._authorized,),
        )

    async def _authorized(self, request: aiohttp.ClientRequest, handler: Any) -> aiohttp.ClientResponse:
        """What sends each request, those of redirects too."""
        response: aiohttp.ClientResponse = await handler(request)
        return response

    def locate(self, path: str) -> yarl.URL:
        """The URL by which a path is read."""
        return yarl.URL(path)

    async def open_range(self, path: str, start: int = 0, stop: int | None = None) -> aiohttp.ClientResponse:
        """The answer to a request for bytes [start, stop); its body is yet to be read, and it to be closed.

        Raises FileNotFoundError, PermissionError and UserError for what no second attempt mends; OSError for the rest.
        """
        response = await self._ask(path, start, stop)
        whole = response.status == HTTPStatus.OK and start == 0 and stop in (None, response.content_length)
        if response.status == HTTPStatus.PARTIAL_CONTENT or whole:
            return response
        response.close()
        if response.status == HTTPStatus.OK:
            raise UserError(
                f"{path}: the server takes no Range, by which large files are read; copy its files to a disk or bucket"
            )
        if response.status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise OSError(errno.EINVAL, "the range lies beyond the end")
        self._refuse(path, response.status, response.reason or "")

    async def _ask(self, path: str, start: int, stop: int | None) -> aiohttp.ClientResponse:
        session = await self.set_session()
        url = self.locate(path)
        ranged = {"Range": f"bytes={start}-{'' if stop is None else stop - 1}"} if start or stop is not None else {}
        try:
            response: aiohttp.ClientResponse = await session.get(url, headers=ranged)
        except aiohttp.ClientConnectorCertificateError as error:
            raise UserError(f"{path}: its certificate is not trusted here: {error.certificate_error}") from None
        if response.url.scheme != url.scheme == "https":
            response.close()
            raise PermissionError(f"leads to {response.url.scheme}://{response.url.host}, which is not encrypted")
        return response

    def _refuse(self, path: str, status: int, reason: str) -> NoReturn:
        """Raise what an answer other than success means."""
        told = f"the server answered {status} {reason}".rstrip()
        if status in (HTTPStatus.NOT_FOUND, HTTPStatus.GONE):
            raise FileNotFoundError(told)
        if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            raise PermissionError(f"{told}; {self.refused_hint}")
        if status < 500 and status not in _MAY_PASS:
            raise UserError(f"{path}: {told}")
        raise OSError(told)

    async def _cat_file(self, url: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        async with await self.open_range(url, start or 0, end) as response:
            return await response.read()

    async def _info(self, url: str, **_: Any) -> dict[str, Any]:
        async with await self._ask(url, 0, 1) as response:  # many that serve ranges refuse HEAD
            total = response.headers.get("Content-Range", "").rpartition("/")[2]
            if response.status == HTTPStatus.OK:
                total = response.headers.get("Content-Length", "")
            elif response.status not in (HTTPStatus.PARTIAL_CONTENT, HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE):
                self._refuse(url, response.status, response.reason or "")
        if not total.isdigit():
            raise UserError(f"{url}: the server does not tell the size of its files; copy them to a disk or bucket")
        return {"name": url, "size": int(total), "type": "file"}

    async def _exists(self, path: str, **_: Any) -> bool:
        try:
            await self._info(path)
        except FileNotFoundError:
            return False
        return True

    def find(self, path: str, *_: Any, **__: Any) -> list[str]:
        self._cannot_be_listed(path)

    def glob(self, path: str, *_: Any, **__: Any) -> list[str]:
        self._cannot_be_listed(path)

    def _cannot_be_listed(self, path: str) -> NoReturn:
        raise UserError(
            f"{path}: what a web server holds can't be listed; name its files by braces: "
            "https://host/train-{0000..1023}.tar or https://host/{a,b}.tar"
        )
