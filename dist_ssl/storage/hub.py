"""Reading from the Hugging Face Hub: hf://datasets/ORG/NAME[@REVISION]/FILE, and models, without `datasets/`.

The Hub's own file system lists and knows sizes, from its listings, which cost a request a thousand files. Bytes come
from the URL by which the Hub serves a file, as from any web server: streamed, resumed and retried by the same rules.
The token is that of HF_TOKEN or of the Hub's own login; `storage.anonymous` sends none. HF_ENDPOINT names another Hub.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import unquote

import aiohttp
import yarl
from huggingface_hub import HfFileSystem, constants, get_token, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError

from dist_ssl.config import UserError
from dist_ssl.storage.web import WebFileSystem

_PATH = re.compile(r"(?:(datasets|spaces)/)?([^/@]+/[^/@]+)(?:@(refs/(?:convert|pr)/[^/]+|[^/]+))?/(.+)")


class HubFileSystem(WebFileSystem):
    """Files of the Hub's repositories, to be read only. A path is the URL without its scheme."""

    protocol = "hf"
    refused_hint = (
        "where a repository is gated, accept its terms on its page; log in by `hf auth login`, or set HF_TOKEN"
    )

    def __init__(self, timeout_seconds: float, anonymous: bool, **options: Any):
        super().__init__(timeout_seconds, **options)
        self._anonymous = anonymous
        self._endpoint = os.environ.get("HF_ENDPOINT", constants.ENDPOINT).rstrip("/")
        self._listings = HfFileSystem(
            endpoint=self._endpoint, token=False if anonymous else None, skip_instance_cache=True
        )

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.removeprefix("hf://").rstrip("/")

    def locate(self, path: str) -> yarl.URL:
        if (match := _PATH.fullmatch(path)) is None:
            raise UserError(
                f"hf://{path}: expected hf://datasets/ORG/NAME/FILE or hf://datasets/ORG/NAME@REVISION/FILE"
            )
        kind, repository, revision, name = match.groups()
        url = hf_hub_url(
            repository, name, repo_type=kind and kind.removesuffix("s"), revision=revision and unquote(revision),
            endpoint=self._endpoint,
        )  # fmt: skip
        return yarl.URL(url, encoded=True)

    async def _authorized(self, request: aiohttp.ClientRequest, handler: Any) -> aiohttp.ClientResponse:
        # To the Hub alone: it redirects to signed URLs of others.
        token = None if self._anonymous else get_token()
        if token and request.url.origin() == yarl.URL(self._endpoint).origin():
            request.headers["Authorization"] = f"Bearer {token}"
        return await super()._authorized(request, handler)

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        with self._asking(path):
            return dict(self._listings.info(path))

    def exists(self, path: str, **_: Any) -> bool:
        try:
            self.info(path)
        except FileNotFoundError:
            return False
        return True

    def find(self, path: str, *_: Any, **__: Any) -> list[str]:
        return self._listed(path, self._listings.find)

    def glob(self, path: str, *_: Any, **__: Any) -> list[str]:
        return self._listed(path, self._listings.glob)

    def _listed(self, path: str, listing: Callable[[str], Any]) -> list[str]:
        try:
            with self._asking(path):
                return list(listing(path))
        except FileNotFoundError as error:  # the repository: of a folder that isn't there nothing is listed
            raise UserError(f"hf://{path}: {error}") from None

    @contextlib.contextmanager
    def _asking(self, path: str) -> Iterator[None]:
        """The errors of the Hub's library as those of any web server."""
        try:
            yield
        except HfHubHTTPError as error:
            self._refuse(f"hf://{path}", error.response.status_code, error.response.reason_phrase)
        except ValueError as error:  # of a name that no repository can have
            raise UserError(f"hf://{path}: {str(error).splitlines()[0]}") from None
