"""Files and object stores through fsspec: allowed schemes, retried reads, atomic writes.

A URL decides what code reads it, so schemes are an allow-list: fsspec and others know schemes that start shells.
Credentials come from the environment, files or roles; a URL or endpoint that carries them is refused, because URLs
end up in configs, logs and reports. s3fs is not fork-safe: call `filesystem` in the process that uses it.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import random
import re
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import fsspec
import fsspec.asyn

from dist_ssl.config import StorageConfig, UserError

log = logging.getLogger(__name__)

SCHEMES = ("file", "s3", "gs", "https", "memory")
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.1, 8.0
QUIET_SECONDS = 10.0  # of an outage, before and between the lines that tell of it
SLOWEST_BYTES_PER_SECOND = 2**20  # an upload that is slower than this counts as a fault

# Variables whose values never reach a message, whatever a library puts into its errors.
_SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID", "GOOGLE_API_KEY")

# What botocore raises for a set-up that no second attempt mends.
_MISTAKES = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "ParamValidationError")

_systems: dict[tuple[Any, ...], Any] = {}
_opening = threading.Lock()
_told = -1e9  # when an outage was last told of

Result = TypeVar("Result")


class StorageError(OSError):
    """A read or write that failed for good. The message names the URL, the attempts and the last cause."""


def check_url(url: str) -> str:
    """The scheme of a URL, "file" for a plain path. Raises UserError for one that is not allowed."""
    match = re.match(r"([^/:]+):", url)  # wider than a URL's scheme: a file a:b is written ./a:b
    if "::" in url or (match and match[1].lower() not in SCHEMES) or url.startswith("|"):
        raise UserError(f"{redact(url)}: expected a plain path or a URL of the schemes {', '.join(SCHEMES)}")
    if not url:
        raise UserError("expected a path or URL, got an empty one")
    if match is None:
        return "file"
    parts = urlsplit(url)
    if match[1].lower() != "file" and (parts.username or parts.password or parts.query):
        raise UserError(
            f"{redact(url)}: credentials and query strings don't belong in a URL, which is logged and saved; "
            "give them by the store's environment variables, files or roles"
        )
    return match[1].lower()


def redact(text: str) -> str:
    """The text without user names, passwords and query strings of URLs, and without known secrets' values."""
    text = re.sub(r"(\w+://)[^/\s'\"@]*@", r"\1", text)
    text = re.sub(r"(\w+://[^\s'\"?]*)\?[^\s'\"]*", r"\1", text)
    for name in _SECRETS:
        value = os.environ.get(name)
        if value and len(value) >= 8:
            text = text.replace(value, "***")
    return text


def filesystem(url: str, config: StorageConfig) -> tuple[Any, str]:
    """The fsspec file system of a URL and the path in it. Raises UserError for a scheme that isn't allowed."""
    scheme = check_url(url)
    if (local := local_path(url)) is not None:
        return fsspec.filesystem("file"), local
    options: dict[str, Any] = {}
    if scheme == "s3":
        if config.endpoint_url:
            endpoint = urlsplit(config.endpoint_url)
            if endpoint.scheme not in ("http", "https") or endpoint.username or endpoint.password or endpoint.query:
                raise UserError(
                    "storage.endpoint_url: expected http(s)://host:port, without user, password or query, "
                    f"got {redact(config.endpoint_url)!r}"
                )
        options = {
            "anon": config.anonymous,
            "endpoint_url": config.endpoint_url,
            "profile": config.profile,
            "use_listings_cache": False,
            "config_kwargs": {
                "connect_timeout": config.timeout_seconds,
                "read_timeout": config.timeout_seconds,
                "retries": {"total_max_attempts": 1},  # ours have jitter and a budget
                # botocore holds a multipart object to its last part's checksum on some servers; ours are end to end.
                "request_checksum_calculation": "when_required",
                "response_checksum_validation": "when_required",
            },
        }
    elif scheme == "gs" and config.anonymous:
        options = {"token": "anon"}
    # fsspec keeps an instance for each thread, with connections of its own; one a process serves all threads.
    identity = (os.getpid(), scheme, config, *(os.environ.get(name) for name in (*_SECRETS, "AWS_PROFILE")))
    with _opening:
        if identity not in _systems:
            _systems[identity] = _open_system(scheme, options)
        system = _systems[identity]
    return system, system._strip_protocol(url)


def _open_system(scheme: str, options: dict[str, Any]) -> Any:
    try:
        if scheme == "s3":
            options["session"] = _s3_session(options["profile"])
        system = fsspec.filesystem(scheme, skip_instance_cache=True, **options)
    except ImportError as error:
        raise UserError(f"{scheme}://: {error}; install the package it names") from None
    if scheme == "s3":
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


def is_local(url: str) -> bool:
    return check_url(url) == "file"


def local_path(url: str) -> str | None:
    """The absolute path that a URL of this machine's file system means; None for an object store's."""
    if not is_local(url):
        return None
    path = url.removeprefix("file:")
    return os.path.abspath("/" + path.lstrip("/") if path.startswith("//") else path)


def join(url: str, *parts: str) -> str:
    """`url` with path parts appended."""
    return "/".join([url.rstrip("/"), *(part.strip("/") for part in parts)])


def retry(url: str, config: StorageConfig, operation: Callable[[], Result]) -> Result:
    """What `operation` returns, tried again with exponential back-off and full jitter for `storage.retry_seconds`.

    Raises StorageError when the budget is spent; FileNotFoundError and PermissionError at once. An operation that
    made progress may be tried for ever longer only by being called anew: the budget is that of one request.
    """
    started, attempts, pause = time.monotonic(), 0, FIRST_PAUSE_SECONDS
    while True:
        attempts += 1
        try:
            return operation()
        except StorageError:
            raise
        except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError) as error:
            raise type(error)(f"{redact(url)}: {redact(str(error))}") from None
        except Exception as error:
            if type(error).__name__ in _MISTAKES:
                raise UserError(f"{redact(url)}: {redact(str(error))}") from None
            if not _is_transient(error):
                raise
            spent = time.monotonic() - started
            if spent + pause > config.retry_seconds or is_local(url):
                raise StorageError(
                    f"{redact(url)}: gave up after {attempts} attempts in {spent:.0f} s "
                    f"(storage.retry_seconds = {config.retry_seconds:g}); "
                    f"last cause: {type(error).__name__}: {redact(str(error))}"
                ) from None
            _tell_of_an_outage(url, spent, config, error)
        time.sleep(random.uniform(pause / 2, pause))
        pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


def _tell_of_an_outage(url: str, seconds: float, config: StorageConfig, error: Exception) -> None:
    """A line a process now and then while requests are tried again, so that a run that waits says for what."""
    global _told
    if seconds > QUIET_SECONDS and time.monotonic() - _told > QUIET_SECONDS:
        _told = time.monotonic()
        log.warning(
            "%s: tried again for %.0f s, at most for %g: %s: %s",
            redact(url), seconds, config.retry_seconds, type(error).__name__, redact(str(error)),
        )  # fmt: skip


def _is_transient(error: Exception) -> bool:
    # By module, so that a run on local files imports no network library.
    module = type(error).__module__.split(".")[0]
    return isinstance(error, OSError | TimeoutError | EOFError) or module in ("aiohttp", "botocore", "aiobotocore")


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
    system, path = filesystem(url, config)
    if not is_local(url):
        retry(url, config, lambda: _upload(system, "pipe_file", len(data), config, path, bytes(data)))
        return
    with _replacing(Path(path)) as temporary, open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_file(local_path: str | Path, url: str, config: StorageConfig) -> None:
    """Copy a local file to `url`, atomically, as `write_bytes` does. Retried."""
    system, path = filesystem(url, config)
    if not is_local(url):
        num_bytes = os.path.getsize(local_path)
        retry(url, config, lambda: _upload(system, "put_file", num_bytes, config, str(local_path), path))
        return
    with _replacing(Path(path)) as temporary, open(local_path, "rb") as source, open(temporary, "wb") as file:
        while block := source.read(2**22):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())


def _upload(system: Any, method: str, num_bytes: int, config: StorageConfig, *arguments: Any) -> None:
    """One upload, given up after a time that grows with its size; aiohttp's time-out begins when the body is sent."""
    if not system.async_impl:
        getattr(system, method)(*arguments)
        return
    seconds = 2 * config.timeout_seconds + num_bytes / SLOWEST_BYTES_PER_SECOND
    try:
        fsspec.asyn.sync(system.loop, getattr(system, f"_{method}"), *arguments, timeout=seconds)
    except TimeoutError:
        raise TimeoutError(f"{num_bytes} bytes were not taken in within {seconds:.0f} s") from None


@contextlib.contextmanager
def _replacing(path: Path) -> Any:
    made = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    try:
        yield name
        os.chmod(name, 0o666 & ~_umask())  # mkstemp makes 0600: a team could not read the run
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
    # The entry of the file, and those of the directories that were made for it.
    for parent in (path.parent, *(folder.parent for folder in made)):
        directory = os.open(parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


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
    system, _ = filesystem(url, config)
    found = find(url, config)
    return sorted(found if is_local(url) else map(system.unstrip_protocol, found))


def remove(url: str, config: StorageConfig, recursive: bool = False) -> None:
    """Remove a file, or with `recursive` a directory; no error where there is none."""
    system, path = filesystem(url, config)
    with contextlib.suppress(FileNotFoundError):
        retry(url, config, lambda: system.rm(path, recursive=recursive))
