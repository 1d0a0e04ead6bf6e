"""A root URL and the settings by which it is reached, bound once."""

from __future__ import annotations

from dataclasses import dataclass

from dist_ssl.config import StorageConfig
from dist_ssl.storage import files, systems, urls


@dataclass(frozen=True)
class Store:
    """A directory, or a prefix of an object store. Names are relative to its root; "" is the root itself.

    It holds no connection, so it may be sent to other processes. Methods are retried, and raise, as the functions of
    `storage` that they call.
    """

    root: str
    config: StorageConfig

    def at(self, name: str) -> Store:
        """The store of what lies under a name."""
        return Store(self.url(name), self.config)

    def url(self, name: str) -> str:
        return urls.join(self.root, name) if name else self.root

    def local_path(self, name: str = "") -> str | None:
        """The path of a file on this machine's file system, None in an object store."""
        return urls.local_path(self.url(name))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        return files.read_bytes(self.url(name), self.config, start, stop)

    def write(self, name: str, data: bytes | memoryview) -> None:
        files.write_bytes(self.url(name), data, self.config)

    def size(self, name: str) -> int:
        return files.size(self.url(name), self.config)

    def names(self) -> list[str]:
        """Those of all files under the root, sorted; empty where there is none."""
        _, path = systems.filesystem(self.root, self.config)
        start = len(path.rstrip("/")) + 1
        return sorted(name[start:] for name in files.find(self.root, self.config))

    def remove(self, name: str, recursive: bool = False) -> None:
        files.remove(self.url(name), self.config, recursive)
