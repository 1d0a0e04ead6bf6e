"""Files and object stores through fsspec: retried reads, atomic writes, listings."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import random
import secrets
import time
from collections.abc import Callable, Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from dist_ssl.config import StorageConfig, UserError
from dist_ssl.storage.systems import filesystem
from dist_ssl.storage.urls import check_url, check_writable, is_local, redact

log = logging.getLogger(__name__)

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.1, 8.0
QUIET_SECONDS = 10.0  # of an outage, before and between the lines that tell of it
SLOWEST_BYTES_PER_SECOND = 2**20  # an upload that is slower than this counts as a fault

# What clients raise for a set-up that no second attempt mends: botocore, Google's, the Hub's, Azure's.
_MISTAKES = (
    "NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "ParamValidationError",
    "DefaultCredentialsError", "OfflineModeIsEnabled", "ClientAuthenticationError", "CredentialUnavailableError",
)  # fmt: skip
# Whose other errors may pass. By name, so that a run on local files imports no network library.
_NETWORK = ("aiohttp", "botocore", "aiobotocore", "azure", "gcsfs", "google", "httpx", "httpx2", "huggingface_hub")

_told = -1e9  # when an outage was last told of

Result = TypeVar("Result")


class StorageError(OSError):
    """A read or write that failed for good. The message names the URL, the attempts and the last cause."""


def retry(url: str, config: StorageConfig, operation: Callable[[], Result]) -> Result:
    """What `operation` returns, tried again with exponential back-off and full jitter for `storage.retry_seconds`.

    Raises StorageError when the budget is spent; FileNotFoundError and PermissionError at once. An operation that
    made progress may be tried for ever longer only by being called anew: the budget is that of one request.
    """
    started, attempts, pauses = time.monotonic(), 0, longest_pauses()
    while True:
        attempts += 1
        try:
            return operation()
        except StorageError:
            raise
        except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError) as error:
            raise type(error)(f"{redact(url)}: {_line(error)}") from None
        except Exception as error:
            _refuse(url, error)
            if not _is_transient(error):
                raise
            spent, pause = time.monotonic() - started, next(pauses)
            if spent + pause > config.retry_seconds or is_local(url):
                raise StorageError(
                    f"{redact(url)}: gave up after {attempts} attempts in {spent:.0f} s "
                    f"(storage.retry_seconds = {config.retry_seconds:g}); "
                    f"last cause: {type(error).__name__}: {_line(error)}"
                ) from None
            _tell_of_an_outage(url, spent, config, error)
        time.sleep(random.uniform(0, pause))


def longest_pauses() -> Iterator[float]:
    """Seconds, at most, before each next attempt; the pause is drawn between 0 and that, so that clients spread."""
    pause = FIRST_PAUSE_SECONDS
    while True:
        yield pause
        pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


def _refuse(url: str, error: Exception) -> None:
    """Raise what no second attempt mends: a set-up that is not one, or what Azure's client says of an answer."""
    told = f"{redact(url)}: {_line(error)}"
    status = getattr(error, "status_code", None) if type(error).__module__.startswith("azure.") else None
    if status == HTTPStatus.NOT_FOUND:
        raise FileNotFoundError(told) from None
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        raise PermissionError(told) from None
    mends = status is None or status >= 500 or status in (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS)
    if not mends or type(error).__name__ in _MISTAKES:
        raise UserError(told) from None


def _line(error: Exception) -> str:
    """The first line of an error, which tells what; clients append documents."""
    return redact((str(error).splitlines() or [""])[0])


def _tell_of_an_outage(url: str, seconds: float, config: StorageConfig, error: Exception) -> None:
    """A line a process now and then while requests are tried again, so that a run that waits says for what."""
    global _told
    if seconds > QUIET_SECONDS and time.monotonic() - _told > QUIET_SECONDS:
        _told = time.monotonic()
        log.warning(
            "%s: tried again for %.0f s, at most for %g: %s: %s",
            redact(url), seconds, config.retry_seconds, type(error).__name__, _line(error),
        )  # fmt: skip


def _is_transient(error: Exception) -> bool:
    return isinstance(error, OSError | EOFError) or type(error).__module__.split(".")[0] in _NETWORK


def read_bytes(url: str, config: StorageConfig, start: int = 0, stop: int | None = None) -> bytes:
    """Bytes [start, stop) of a file, in one request. Retried; a body that is cut short counts as a fault.

    Raises StorageError at once where the file is too short for that.
    """

    def once() -> bytes:
        system, path = filesystem(url, config)
        try:
            data = system.cat_file(path, start=start or None, end=stop)
        except OSError as error:
            if error.errno == errno.EINVAL and stop is not None:  # what s3fs makes of a range beyond the end
                check_length(url, system, path, stop)
            raise
        if stop is not None and len(data) != stop - start:
            check_length(url, system, path, stop)
            raise EOFError(f"expected bytes {start} to {stop}, got {len(data)} bytes")
        return bytes(data)

    if stop is not None and stop <= start:
        return b""
    return retry(url, config, once)


def check_length(url: str, system: Any, path: str, stop: int) -> None:
    """Raise StorageError where a file is too short for bytes up to `stop`: then asking again mends nothing."""
    if (found := int(system.info(path)["size"])) < stop:
        raise StorageError(
            f"{redact(url)}: expected at least {stop} bytes, the file holds {found}: it is not the one that "
            "was indexed or written; run `dist-ssl shards verify` on shards"
        )


def write_bytes(url: str, data: bytes | memoryview, config: StorageConfig) -> None:
    """Write a whole file, atomically: under another name, fsync, rename (local), or one put (store). Retried."""
    check_writable(url)
    system, path = filesystem(url, config)
    if not is_local(url):
        retry(url, config, lambda: _upload(system, "pipe_file", len(data), config, path, bytes(data)))
        return
    with _replacing(Path(path)) as file:
        file.write(data)


def write_file(local_path: str | Path, url: str, config: StorageConfig) -> None:
    """Copy a local file to `url`, atomically, as `write_bytes` does. Retried."""
    check_writable(url)
    system, path = filesystem(url, config)
    if not is_local(url):
        num_bytes = os.path.getsize(local_path)
        retry(url, config, lambda: _upload(system, "put_file", num_bytes, config, str(local_path), path))
        return
    with open(local_path, "rb") as source, _replacing(Path(path)) as file:
        while block := source.read(2**22):
            file.write(block)


def _upload(system: Any, method: str, num_bytes: int, config: StorageConfig, *arguments: Any) -> None:
    """One upload, given up after a time that grows with its size; aiohttp's time-out begins when the body is sent."""
    if not system.async_impl:
        getattr(system, method)(*arguments)
        return
    import fsspec.asyn

    seconds = 2 * config.timeout_seconds + num_bytes / SLOWEST_BYTES_PER_SECOND
    try:
        fsspec.asyn.sync(system.loop, getattr(system, f"_{method}"), *arguments, timeout=seconds)
    except TimeoutError:
        raise TimeoutError(f"{num_bytes} bytes were not taken in within {seconds:.0f} s") from None


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to be written, which is durable and at `path` in the end, or nowhere."""
    made = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with open(temporary, "xb") as file:  # not tempfile's, whose files are their owner's alone
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    # The entry of the file, and those of the directories that were made for it.
    for parent in (path.parent, *(folder.parent for folder in made)):
        directory = os.open(parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def exists(url: str, config: StorageConfig) -> bool:
    system, path = filesystem(url, config)
    return bool(retry(url, config, lambda: system.exists(path)))


def size(url: str, config: StorageConfig) -> int:
    """Bytes of a file. Raises FileNotFoundError."""
    system, path = filesystem(url, config)
    return int(retry(url, config, lambda: system.info(path))["size"])


def find(url: str, config: StorageConfig) -> list[str]:
    """Paths, in `filesystem`'s spelling, of all files under a directory; empty where there is none."""
    system, path = filesystem(url, config)
    try:
        return list(retry(url, config, lambda: system.find(path)))
    except FileNotFoundError:
        return []


def list_files(url: str, config: StorageConfig) -> list[str]:
    """URLs of all files under a directory, sorted; empty where there is none."""
    return _urls(url, find(url, config))


def glob(pattern: str, config: StorageConfig) -> list[str]:
    """URLs of what `*`, `?`, `[...]` match, `**` over directories, sorted; empty where nothing does."""
    system, path = filesystem(pattern, config)
    return _urls(pattern, retry(pattern, config, lambda: system.glob(path)))


def _urls(like: str, paths: list[str]) -> list[str]:
    """Paths in `filesystem`'s spelling as URLs of the scheme of `like`."""
    scheme = check_url(like)
    if scheme == "file":
        return sorted(paths)
    return sorted(path if "://" in path else f"{scheme}://{path.lstrip('/')}" for path in paths)


def remove(url: str, config: StorageConfig, recursive: bool = False) -> None:
    """Remove a file, or with `recursive` a directory; no error where there is none."""
    check_writable(url)
    system, path = filesystem(url, config)
    with contextlib.suppress(FileNotFoundError):
        retry(url, config, lambda: system.rm(path, recursive=recursive))
