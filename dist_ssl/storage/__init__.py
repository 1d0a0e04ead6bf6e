"""Files and object stores through fsspec: allowed schemes, retried reads, atomic writes, whole files in ranges.

A URL can make a run fail with a clear error; it can't start a shell or leak credentials into a log.
"""

from dist_ssl.storage.files import (
    SCHEMES,
    StorageError,
    check_length,
    check_url,
    exists,
    filesystem,
    is_local,
    join,
    list_files,
    read_bytes,
    redact,
    remove,
    retry,
    size,
    write_bytes,
    write_file,
)

__all__ = [
    "SCHEMES",
    "StorageError",
    "check_length",
    "check_url",
    "exists",
    "filesystem",
    "is_local",
    "join",
    "list_files",
    "read_bytes",
    "redact",
    "remove",
    "retry",
    "size",
    "write_bytes",
    "write_file",
]
