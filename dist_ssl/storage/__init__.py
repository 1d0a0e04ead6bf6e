"""Files and object stores through fsspec: allowed schemes, retried reads, atomic writes, whole files in ranges.

An opened `Store` is what travels: a root URL and how it is reached, bound once; the functions take both each time.
A URL can make a run fail with a clear error; it can't start a shell or leak credentials into a log.
"""

from dist_ssl.storage.files import (
    StorageError,
    check_length,
    exists,
    glob,
    list_files,
    read_bytes,
    remove,
    retry,
    size,
    write_bytes,
    write_file,
)
from dist_ssl.storage.store import Store
from dist_ssl.storage.systems import filesystem
from dist_ssl.storage.urls import READ_ONLY, SCHEMES, check_url, check_writable, is_local, join, local_path, redact

__all__ = [
    "READ_ONLY",
    "SCHEMES",
    "StorageError",
    "Store",
    "check_length",
    "check_url",
    "check_writable",
    "exists",
    "filesystem",
    "glob",
    "is_local",
    "join",
    "list_files",
    "local_path",
    "read_bytes",
    "redact",
    "remove",
    "retry",
    "size",
    "write_bytes",
    "write_file",
]
