"""What a URL may be, and what of it may be told.

A URL decides what code reads it, so schemes are an allow-list: fsspec and others know schemes that start shells.
Credentials come from the environment, files or roles; a URL or endpoint that carries them is refused, because URLs
end up in configs, logs and reports.
"""

from __future__ import annotations

import os
import re
from urllib.parse import urlsplit

from dist_ssl.config import UserError

SCHEMES = ("file", "s3", "gs", "az", "hf", "https", "memory")
READ_ONLY = ("hf", "https")

# Variables whose values never reach a message, whatever a library puts into its errors.
SECRETS = (
    "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID", "GOOGLE_API_KEY", "HF_TOKEN",
    "AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_SAS_TOKEN",
    "AZURE_STORAGE_CLIENT_SECRET",
)  # fmt: skip


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
            "give them by the store's environment variables, files or roles, and name many files by * or {0000..1023}, "
            "since a ? begins a query string"
        )
    return match[1].lower()


def redact(text: str) -> str:
    """The text without user names, passwords and query strings of URLs, and without known secrets' values."""
    text = re.sub(r"(\w+://)[^/\s'\"@]*@", r"\1", text)
    text = re.sub(r"(\w+://[^\s'\"?]*)\?[^\s'\"]*", r"\1", text)
    for name in SECRETS:
        value = os.environ.get(name)
        if value and len(value) >= 8:
            text = text.replace(value, "***")
    return text


def check_writable(url: str) -> None:
    """Raises UserError for what can only be read."""
    if (scheme := check_url(url)) in READ_ONLY:
        raise UserError(f"{redact(url)}: {scheme}:// is only read from; name a folder or a bucket to write to")


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
