"""Opening the fsspec file system of a URL: one a process and configuration, with the credentials of the environment.

The file systems of object stores are not fork-safe: call `filesystem` in the process that uses it.
"""

from __future__ import annotations

import logging
import os
import threading
from typing import Any
from urllib.parse import urlsplit

from dist_ssl.config import StorageConfig, UserError, require
from dist_ssl.storage.urls import SECRETS, check_url, local_path, redact

PACKAGES = {"gs": "gcsfs", "az": "adlfs", "hf": "huggingface_hub"}  # what is not installed with this one
# What these read from the environment: another value is another file system.
_READ = (*SECRETS, "AWS_PROFILE", "AZURE_STORAGE_ACCOUNT_NAME", "HF_ENDPOINT", "STORAGE_EMULATOR_HOST")

_systems: dict[tuple[Any, ...], Any] = {}
_opening = threading.Lock()


def filesystem(url: str, config: StorageConfig) -> tuple[Any, str]:
    """The fsspec file system of a URL and the path in it. Raises UserError for a scheme that isn't allowed."""
    import fsspec  # not above: commands that only look for a file on the disk need it as little

    scheme = check_url(url)
    if (local := local_path(url)) is not None:
        return fsspec.filesystem("file"), local
    # fsspec keeps an instance for each thread, with connections of its own; one a process serves all threads.
    identity = (os.getpid(), scheme, config, *map(os.environ.get, _READ))
    with _opening:
        if identity not in _systems:
            _systems[identity] = _opened(scheme, config)
        system = _systems[identity]
    return system, system._strip_protocol(url)


def _opened(scheme: str, config: StorageConfig) -> Any:
    import fsspec

    if scheme in PACKAGES:
        require(PACKAGES[scheme], f"{scheme}://")
    for library in ("azure", "gcsfs"):  # which tell each request, and what they are
        logging.getLogger(library).setLevel(logging.WARNING)
    match scheme:
        case "s3":
            return _s3(config)
        case "gs":
            from dist_ssl.storage.google import GoogleFileSystem

            return GoogleFileSystem(config.timeout_seconds, config.anonymous, skip_instance_cache=True)
        case "az":
            from dist_ssl.storage.azure import AzureFileSystem

            return AzureFileSystem(config.timeout_seconds, config.anonymous, skip_instance_cache=True)
        case "https":
            from dist_ssl.storage.web import WebFileSystem

            return WebFileSystem(config.timeout_seconds, skip_instance_cache=True)
        case "hf":
            from dist_ssl.storage.hub import HubFileSystem

            return HubFileSystem(config.timeout_seconds, config.anonymous, skip_instance_cache=True)
    return fsspec.filesystem(scheme, skip_instance_cache=True, use_listings_cache=False)


def _s3(config: StorageConfig) -> Any:
    if config.endpoint_url:
        endpoint = urlsplit(config.endpoint_url)
        if endpoint.scheme not in ("http", "https") or endpoint.username or endpoint.password or endpoint.query:
            raise UserError(
                "storage.endpoint_url: expected http(s)://host:port, without user, password or query, "
                f"got {redact(config.endpoint_url)!r}"
            )
    import fsspec

    system = fsspec.filesystem(
        "s3",
        skip_instance_cache=True,
        anon=config.anonymous,
        endpoint_url=config.endpoint_url,
        profile=config.profile,
        session=_s3_session(config.profile),
        use_listings_cache=False,
        config_kwargs={
            "connect_timeout": config.timeout_seconds,
            "read_timeout": config.timeout_seconds,
            "retries": {"total_max_attempts": 1},  # ours have jitter and a budget
            # botocore holds a multipart object to its last part's checksum on some servers; ours are end to end.
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
        },
    )
    system.retries = 1
    return system


def _s3_session(profile: str | None) -> Any:
    """botocore's session, which awaits no `100 Continue` before a body: aiohttp waits for it without a time-out, and
    some stores never send it.
    """
    from aiobotocore.session import AioSession
    from botocore.handlers import add_expect_header

    session = AioSession(profile=profile)
    session.unregister("before-call.s3", add_expect_header)
    return session
