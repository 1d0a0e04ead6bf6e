"""Images in Parquet files, as data sets of the Hub hold them: a column of struct{bytes, path} or of bytes, and labels.

Shards take samples in an order that is drawn over all of them; Parquet gives them by row groups, and reading one for an
image costs all of its neighbours. So images are copied once, as they come, into a file under TMPDIR, which is read
from at any place and goes away with the source. One row group at a time is in memory, and of a remote store one file
on the disk.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from isal import isal_zlib

from dist_ssl import storage
from dist_ssl.config import StorageConfig, UserError, require
from dist_ssl.data.patterns import matching
from dist_ssl.data.progress import track
from dist_ssl.storage.large_reads import read_file, writer

log = logging.getLogger(__name__)

ROWS_AT_ONCE = 64
NO_LABEL = -1  # as the Hub has it
_ROW = np.dtype([("offset", "<u8"), ("size", "<u8"), ("label", "<i8"), ("file", "<u4"), ("row", "<u4")])


class ParquetImages:
    """All images of the Parquet files of a pattern or directory, copied to this machine's disk; picklable.

    `column` names that of the images where the schema does not tell. Raises UserError for files without images.
    """

    def __init__(self, spec: str, pattern: str, column: str | None, config: StorageConfig):
        require("pyarrow", spec)
        self.urls = matching(pattern, ".parquet", config)
        self._folder = tempfile.mkdtemp(prefix="dist_ssl-parquet-")
        self._remove = weakref.finalize(self, shutil.rmtree, self._folder, True)
        self.classes: tuple[str, ...] = ()
        checksum = hashlib.sha256()
        try:
            with open(f"{self._folder}/images", "wb") as images, open(f"{self._folder}/rows", "wb") as rows:
                for number, url in enumerate(track(self.urls, len(self.urls), f"copying {spec}", len(self.urls) > 1)):
                    with _local(url, config) as path:
                        self.classes, batches = _open(spec, url, path, column, self.classes if number else None)
                        _copy(batches, images, rows, number, checksum)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(
                f"{spec}: {tempfile.gettempdir()}: {error.strerror}, for a copy of its images; free some, or name "
                "another disk by TMPDIR"
            ) from None
        self.digest = checksum.hexdigest()
        self._rows = self._map()
        if not len(self._rows):
            raise UserError(f"{spec}: its {len(self.urls)} files hold no row")

    def _map(self) -> Any:
        rows = Path(self._folder, "rows")
        return np.memmap(rows, _ROW, "r") if rows.stat().st_size else np.empty(0, _ROW)

    def __len__(self) -> int:
        return len(self._rows)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key not in ("_rows", "_remove")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._rows = self._map()

    def read(self, indices: Sequence[int]) -> Iterator[tuple[bytes, int | None, str]]:
        """The bytes, label and place of each; no bytes where there are none."""
        with open(f"{self._folder}/images", "rb") as images:
            for offset, size, label, file, row in self._rows[list(indices)].tolist():
                images.seek(offset)
                yield images.read(size), None if label == NO_LABEL else label, f"{self.urls[file]}, row {row}"


@contextlib.contextmanager
def _local(url: str, config: StorageConfig) -> Iterator[str]:
    """The path of a file on this machine, of a remote one that of a copy, which is then removed."""
    if (path := storage.local_path(url)) is not None:
        yield path
        return
    with tempfile.NamedTemporaryFile(prefix="dist_ssl-parquet-") as copy:
        read_file(url, config, storage.size(url, config), writer(cast(BinaryIO, copy)))
        yield copy.name


def _open(
    spec: str, url: str, path: str, column: str | None, known: tuple[str, ...] | None
) -> tuple[tuple[str, ...], Iterator[tuple[list[Any], list[Any] | None]]]:
    """The names of the classes, and the images and labels of a file, some rows at a time."""
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except FileNotFoundError:
        raise UserError(f"{spec}: {storage.redact(url)}: no such file") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{spec}: {storage.redact(url)} is no Parquet file: {str(error).splitlines()[0]}") from None
    image, label, classes = _columns(storage.redact(url), file.schema_arrow, column)
    if known is None:
        log.info("%s: images from column %s, labels from %s", spec, image, label or "nowhere")
    elif classes != known:
        raise UserError(f"{spec}: {storage.redact(url)} has other classes than the file before it")
    columns = [image, label] if label else [image]

    def batches() -> Iterator[tuple[list[Any], list[Any] | None]]:
        try:
            for group in range(file.num_row_groups):  # asked for all at once, they would all stay in memory
                for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=columns):
                    images = batch.column(image)
                    if pyarrow.types.is_struct(images.type):
                        images = images.field("bytes")
                    yield images.to_pylist(), batch.column(label).to_pylist() if label else None
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{spec}: {storage.redact(url)} is damaged: {str(error).splitlines()[0]}") from None
        finally:
            file.close()

    return classes, batches()


def _columns(name: str, schema: Any, column: str | None) -> tuple[str, str | None, tuple[str, ...]]:
    """The column of images, that of labels or None, and the classes' names where the schema's metadata tell them."""
    import pyarrow

    features = _features(schema.metadata or {})
    kinds = {key: one.get("_type") for key, one in features.items()}
    held = [field.name for field in schema if _holds_bytes(field.type)]
    told = [key for key in held if kinds.get(key) == "Image"] or held
    if column is not None:
        told = [column] if column in held else []
    if len(told) != 1:
        found = ", ".join(f"{field.name} ({field.type})" for field in schema)
        wanted = f"a column {column} of bytes" if column else "a column of images"
        what = f"several could be it: {', '.join(told)}; name one: parquet:PATTERN:COLUMN" if told else f"has {found}"
        raise UserError(f"{name}: expected {wanted}, as bytes or struct{{bytes, path}}; {what}")
    types = pyarrow.types
    numbers = [one.name for one in schema if types.is_integer(one.type) and not types.is_uint64(one.type)]
    labels = [key for key in numbers if kinds.get(key) == "ClassLabel"] or [key for key in numbers if key == "label"]
    label = labels[0] if labels else None
    return told[0], label, tuple(map(str, features.get(label, {}).get("names") or ())) if label else ()


def _features(metadata: dict[bytes, bytes]) -> dict[str, dict[str, Any]]:
    """What the Hub's library says of each column; nothing where it says nothing, or it can't be understood."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return {key: one for key, one in features.items() if isinstance(one, dict)}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _holds_bytes(kind: Any) -> bool:
    import pyarrow

    if pyarrow.types.is_struct(kind):
        return any(field.name == "bytes" and _holds_bytes(field.type) for field in kind)
    return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)


def _copy(
    batches: Iterator[tuple[list[Any], list[Any] | None]], images: Any, rows: Any, file: int, digest: Any
) -> None:
    """Append the images of a file, and where each lies; what both are goes into the digest."""
    row = 0
    for values, labels in batches:
        table = np.zeros(len(values), _ROW)
        for i, value in enumerate(values):
            label = NO_LABEL if labels is None or labels[i] is None else max(labels[i], NO_LABEL)
            table[i] = (images.tell(), len(value or b""), label, file, row + i)
            images.write(value or b"")
            digest.update(b"%d %d %d\n" % (len(value or b""), isal_zlib.crc32(value or b""), label))
        rows.write(table.tobytes())
        row += len(values)
