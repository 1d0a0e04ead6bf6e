"""Images in Parquet files, as the Hub holds them, come to shards byte for byte, from a disk and over HTTP."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from dist_ssl.config import StorageConfig, UserError
from dist_ssl.data.manifest import Manifest
from dist_ssl.data.shards import write_shards
from dist_ssl.data.sources import open_source
from tests import terminal
from tests.test_shards import photo_folder, read_back
from tests.web import web_server

LOCAL = StorageConfig()
NAMES = ["class0", "class1", "class2"]
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def hub_metadata(**features: Any) -> dict[bytes, bytes]:
    return {b"huggingface": json.dumps({"info": {"features": features}}).encode()}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[bytes, int]]:
    root = photo_folder(tmp_path_factory.mktemp("photos"))
    return [(path.read_bytes(), int(path.parent.name[-1])) for path in sorted(root.glob("*/*"))]


def write_parquet(path: Path, images: Sequence[tuple[bytes, int]], column: str = "image", **more: Any) -> Path:
    """Rows as the Hub's library writes them, ten a group; there is a thumbnail beside each image."""
    schema = pa.schema(
        [(column, IMAGE), ("fine", pa.int64()), ("thumbnail", pa.binary()), ("caption", pa.string())],
        metadata=hub_metadata(**{column: {"_type": "Image"}, "fine": {"_type": "ClassLabel", "names": NAMES}}),
    )
    rows = {
        column: [{"bytes": data, "path": "x.tiff"} for data, _ in images],
        "fine": [label for _, label in images],
        "thumbnail": [data[:10] for data, _ in images],
        "caption": ["-" for _ in images],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(rows | more, schema=schema), path, row_group_size=10)
    return path


def images_and_labels(manifest: Manifest) -> list[tuple[bytes, int]]:
    return [(sample.get("jpg") or sample["png"], int(sample.get("cls", -1))) for sample in read_back(manifest)]


def test_images_and_labels_come_back_from_a_disk_and_from_the_hub(
    photos: list[tuple[bytes, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    data = tmp_path / "org" / "photos" / "data"
    write_parquet(data / "train-0.parquet", photos[:25])
    write_parquet(data / "train-1.parquet", photos[25:])
    with web_server(tmp_path) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.port}")
        hashes = set()
        for i, pattern in enumerate(
            [str(data), f"{data}/train-{{0..1}}.parquet:image", "hf://datasets/org/photos/data/train-*.parquet"]
        ):
            source = open_source(f"parquet:{pattern}")
            there = pickle.loads(pickle.dumps(source))  # as worker processes get it
            (manifest,) = write_shards(there, str(tmp_path / f"out{i}"), LOCAL, shard_mb=0.05, num_workers=0)
            hashes.add(manifest.hash)
            assert list(manifest.classes) == NAMES
            found = images_and_labels(manifest)
            assert sorted(found) == sorted(photos)
            labels = [label for _, label in found]
            assert all(len(set(labels[i : i + 12])) == 3 for i in range(0, 48, 12))  # mixed over both files
            assert len(list((tmp_path / "scratch").iterdir())) == 1
            del source, there
        assert len(hashes) == 1
    assert list((tmp_path / "scratch").iterdir()) == []  # copies go away


def test_an_interrupted_write_goes_on_and_one_of_other_images_does_not(
    photos: list[tuple[bytes, int]], tmp_path: Path
) -> None:
    file = write_parquet(tmp_path / "a.parquet", photos)

    def write() -> Manifest:
        return write_shards(open_source(f"parquet:{file}"), str(tmp_path / "out"), LOCAL, shard_mb=0.05, num_workers=0)[
            0
        ]

    first = write()
    (tmp_path / "out" / "manifest.json").unlink()
    written = (tmp_path / "out" / "000000.tar").stat().st_mtime_ns
    (tmp_path / "out" / "000001.tar.idx").unlink()
    assert write().hash == first.hash
    assert (tmp_path / "out" / "000000.tar").stat().st_mtime_ns == written
    write_parquet(file, [(photos[0][0][:-1] + b"\0", 0), *photos[1:]])
    with pytest.raises(UserError, match="held other files"):
        write()


def test_plain_bytes_integers_and_what_is_no_image(
    photos: list[tuple[bytes, int]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Columns without the Hub's metadata; a row without an image is left out and named, a label of -1 is none."""
    rows = {"jpg": [photos[0][0], None, photos[21][0], b"<html>"], "label": [7, 1, -1, 2]}
    parquet.write_table(
        pa.table(rows, schema=pa.schema([("jpg", pa.large_binary()), ("label", pa.int8())])), tmp_path / "a.parquet"
    )
    (manifest,) = write_shards(open_source(f"parquet:{tmp_path}"), str(tmp_path / "out"), LOCAL, num_workers=0)
    assert manifest.classes == ()
    assert sorted(images_and_labels(manifest)) == sorted([(photos[0][0], 7), (photos[21][0], -1)])
    assert "2 of 4 files left out as bad: " in caplog.text
    assert "a.parquet, row 1 (empty)" in caplog.text


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        ({"text": ["a"], "label": [1]}, r"expected a column of images, .*; has text \(string\), label \(int64\)"),
        ({"a": [b"x"], "b": [b"y"]}, "several could be it: a, b; name one: parquet:PATTERN:COLUMN"),
        ({"image": pa.array([], pa.binary())}, "its 1 files hold no row"),
        (b"PAR1 no parquet", "is no Parquet file: "),
        (None, "no .parquet there; expected a directory of them, or a pattern"),
    ],
)
def test_a_parquet_without_images_is_one_line(tmp_path: Path, make: Any, expected: str) -> None:
    if isinstance(make, bytes):
        (tmp_path / "a.parquet").write_bytes(make)
    elif make is not None:
        parquet.write_table(pa.table(make), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=expected) as told:
        open_source(f"parquet:{tmp_path}")
    assert "\n" not in str(told.value)


def test_the_command_says_it_in_one_line_and_exits_with_2(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    command = ["shards", "write", f"parquet:{tmp_path}/a.parquet:image", str(tmp_path / "out")]
    done = terminal.run([sys.executable, "-m", "dist_ssl.cli", *command])
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "a.parquet: expected a column image of bytes, as bytes or struct{bytes, path}; has text (string)" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_memory_is_that_of_a_row_group(tmp_path: Path) -> None:
    """150 MB of images in groups of 3 MB."""
    table = pa.table({"image": [os.urandom(100_000) for _ in range(30)]})
    with parquet.ParquetWriter(tmp_path / "big.parquet", table.schema) as writer:
        for _ in range(50):
            writer.write_table(table)
    code = (  # a new process's ru_maxrss would be that of the one that started it
        "import sys\nimport pyarrow.parquet\nfrom dist_ssl.data.sources import open_source\n"
        "def peak(): return int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])\n"
        "before = peak()\n"
        "assert len(open_source('parquet:' + sys.argv[1])) == 1500\n"
        "print(peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "big.parquet")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100_000  # KiB; read whole it takes 210,000
