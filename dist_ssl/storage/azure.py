"""Azure Blob Storage by adlfs: without its client's own retries, which are blind to our budget.

The account and its credentials are those of the AZURE_STORAGE_* variables, else what azure.identity finds; an
emulator, or a cloud of another name, is named by AZURE_STORAGE_CONNECTION_STRING.
"""

from __future__ import annotations

import errno
import re
from http import HTTPStatus
from typing import Any

from adlfs import AzureBlobFileSystem
from azure.core.exceptions import HttpResponseError

from dist_ssl.config import UserError


class AzureFileSystem(AzureBlobFileSystem):
    """Blobs of the account of the environment. A path is CONTAINER/BLOB."""

    def __init__(self, timeout_seconds: float, anonymous: bool, **options: Any):
        self._timeout_seconds = timeout_seconds
        super().__init__(
            anon=anonymous or None,
            connection_timeout=timeout_seconds,
            read_timeout=timeout_seconds,
            use_listings_cache=False,
            **options,
        )

    def do_connect(self) -> None:
        if self.anon:
            self.account_key = self.sas_token = None
            if given := vars(self).get("connection_string"):
                self.connection_string = re.sub(r"(AccountKey|SharedAccessSignature)=[^;]*;?", "", given)
        try:
            super().do_connect()
        except ValueError as error:
            told = str(error.__cause__ or error).splitlines()[0].rstrip("!.")
            raise UserError(
                f"az://: {told}; set AZURE_STORAGE_ACCOUNT_NAME and its key, or AZURE_STORAGE_CONNECTION_STRING"
            ) from None
        config = self.service_client._config
        config.retry_policy.total_retries = 0
        config.transport.connection_config.timeout = self._timeout_seconds
        config.transport.connection_config.read_timeout = self._timeout_seconds

    async def _cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        try:
            return bytes(await super()._cat_file(path, start, end, **options))
        except HttpResponseError as error:
            if error.status_code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                raise OSError(errno.EINVAL, "the range lies beyond the end") from None
            raise
