"""Google Cloud Storage by gcsfs: its paths, listings and uploads, with requests that are tried once and time out.

Credentials are Google's application default ones; `storage.anonymous` sends none, and none go to an emulator, which
STORAGE_EMULATOR_HOST names. The requests are the JSON API's; buckets of other interfaces (zonal ones) are not read.
"""

from __future__ import annotations

import errno
import json as json_
import os
from http import HTTPStatus
from typing import Any

import aiohttp
from gcsfs.core import GCSFileSystem
from google.auth.exceptions import DefaultCredentialsError

from dist_ssl.config import UserError

_LOG_IN = "log in by `gcloud auth application-default login`"
_MAY_PASS = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS)


class GoogleFileSystem(GCSFileSystem):
    """Objects of Google's buckets. A path is BUCKET/OBJECT."""

    def __init__(self, timeout_seconds: float, anonymous: bool, **options: Any):
        try:
            super().__init__(
                token="anon" if anonymous or os.environ.get("STORAGE_EMULATOR_HOST") else "google_default",
                requests_timeout=aiohttp.ClientTimeout(sock_connect=timeout_seconds, sock_read=timeout_seconds),
                use_listings_cache=False,
                **options,
            )
        except DefaultCredentialsError as error:
            told = str(error).splitlines()[0].split(". ")[0]
            raise UserError(f"gs://: {told}; {_LOG_IN}, or set GOOGLE_APPLICATION_CREDENTIALS") from None

    async def open_range(self, path: str, start: int, stop: int) -> aiohttp.ClientResponse:
        """The answer to a request for bytes [start, stop); its body is yet to be read, and it to be closed."""
        await self._set_session()
        response: aiohttp.ClientResponse = await self.session.get(
            self.url(path),
            params=self._get_params({}),
            headers=self._get_headers({"Range": f"bytes={start}-{stop - 1}"}),
            timeout=self.requests_timeout,
        )
        await _check(response, path)
        return response

    async def _request(
        self, method: str, path: str, *args: str, headers: Any = None, json: Any = None, data: Any = None, **params: Any
    ) -> tuple[int, Any, Any, bytes]:
        """Every other request of gcsfs, which would try it six times and take a refusal for a fault."""
        await self._set_session()
        if hasattr(data, "seek"):
            data.seek(0)
        for of_readers in ("cache_type", "cache_source"):
            params.pop(of_readers, None)
        async with self.session.request(
            method,
            self._format_path(path, args),
            params=self._get_params(params),
            json=json,
            headers=self._get_headers(headers),
            data=data,
            timeout=self.requests_timeout,
        ) as response:
            await _check(response, "/".join(args) or path)
            return response.status, response.headers, response.request_info, await response.read()


async def _check(response: aiohttp.ClientResponse, path: str) -> None:
    """Raise what an answer other than success means, and close it."""
    if (status := response.status) < 400:
        return
    said = await response.read()
    response.close()
    try:
        said = json_.loads(said)["error"]["message"].encode()
    except (ValueError, KeyError, TypeError, AttributeError):
        said = (response.reason or "").encode()
    told = f"the store answered {status} {said.decode().splitlines()[0] if said else ''}".rstrip()
    if status == HTTPStatus.NOT_FOUND:
        raise FileNotFoundError(told)
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        raise PermissionError(f"{told}; {_LOG_IN}")
    if status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
        raise OSError(errno.EINVAL, "the range lies beyond the end")
    if status < 500 and status not in _MAY_PASS:
        raise UserError(f"gs://{path}: {told}")
    raise OSError(told)
