"""What shards are written from: see `SOURCES`.

A source is picklable, since worker processes read from it, and gives the bytes of an image as they are where it has
bytes: decoding and encoding again would lose quality.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import logging
import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from dist_ssl.config import StorageConfig, UserError
from dist_ssl.data import idx, shapes
from dist_ssl.data.decode import ENDINGS, ending_of
from dist_ssl.data.parquet import ParquetImages

PARTS = ("train", "test", "val")  # names of folders that hold class folders, and are none

log = logging.getLogger(__name__)

SOURCES = {
    "shapes:COUNT[:SIZE]": "coloured shapes, made here, with labels and factors",
    "folder:DIR": "images under a folder, one class a subfolder",
    "torchvision:NAME:ROOT": "a classification set of torchvision that lies under ROOT",
    "idx:IMAGES[:LABELS]": "the files of MNIST and its kin",
    "parquet:PATTERN[:COLUMN]": "Parquet files with images, as on the Hugging Face Hub; any store's URL",
}


@dataclass(frozen=True)
class SourceSample:
    key: str
    image: bytes
    extension: str
    label: int | None = None
    factors: bytes | None = None  # JSON
    path: str = ""  # of the file whose bytes these are; none where a source encoded the image itself


class Source(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str:
        """Changes with what there is to write, where the name alone does not tell: a folder's files."""

    @property
    def classes(self) -> tuple[str, ...]: ...

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int]) -> list[SourceSample]:
        """The samples, in the order asked for."""
        ...

    def digests(self, indices: Sequence[int]) -> list[bytes]:
        """Equal for equal images: what a split into training and test must not tear apart."""
        ...


def open_source(spec: str, seed: int = 0, config: StorageConfig | None = None) -> Source:
    """The source that `spec` names, stores reached by `config`. Raises UserError."""
    kind, _, rest = spec.partition(":")
    match kind:
        case "shapes":
            return ShapesSource.parse(spec, rest, seed)
        case "folder" if rest:
            return FolderSource(rest)
        case "torchvision" if rest.count(":"):
            return TorchvisionSource(*rest.split(":", 1))
        case "idx" if rest:
            return IdxSource(spec, *rest.split(":", 1))
        case "parquet" if rest:
            return ParquetSource(spec, rest, config or StorageConfig())
    raise UserError(f"{spec}: expected {', '.join(SOURCES)}")


@dataclass(frozen=True)
class ShapesSource:
    count: int
    size: int
    seed: int
    classes: tuple[str, ...] = shapes.CLASSES

    @staticmethod
    def parse(spec: str, rest: str, seed: int) -> ShapesSource:
        try:
            count, size = map(int, rest.split(":")) if ":" in rest else (int(rest), 64)
        except ValueError:
            raise UserError(f"{spec}: expected shapes:COUNT or shapes:COUNT:SIZE in whole numbers") from None
        if count < 1 or not 8 <= size <= 2048:
            raise UserError(f"{spec}: expected a count of at least 1 and a size from 8 to 2048")
        return ShapesSource(count, size, seed)

    @property
    def name(self) -> str:
        return f"shapes:{self.count}:{self.size}"

    @property
    def fingerprint(self) -> str:
        return self.name

    def __len__(self) -> int:
        return self.count

    def read(self, indices: Sequence[int]) -> list[SourceSample]:
        at_once = max(1, 64 * 64 * 64 // self.size**2)  # a working set of a few MB
        encoded = []
        for i in range(0, len(indices), at_once):
            encoded += shapes.encode(self.seed, indices[i : i + at_once], self.size)
        return [
            SourceSample(f"{index:08d}", image, "jpg", label, factors)
            for index, (image, label, factors) in zip(indices, encoded, strict=True)
        ]

    def digests(self, indices: Sequence[int]) -> list[bytes]:
        return [index.to_bytes(8, "little") for index in indices]  # no two are equal: the noise differs


class FolderSource:
    """Images under a directory: one class a subfolder, or a flat folder without labels."""

    def __init__(self, directory: str):
        self.name = f"folder:{directory}"
        self.root = root = Path(directory)
        if not root.is_dir():
            raise UserError(f"folder:{directory}: no such directory")
        folders = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
        if "train" in folders and set(folders).issubset(PARTS) and len(folders) > 1:
            each = " and ".join(f"folder:{directory}/{name}" for name in folders)
            raise UserError(
                f"folder:{directory}: {' and '.join(folders)} are parts, not classes; give {each} one by one"
            )
        self.paths: list[str] = []
        self.labels: list[int] = []
        listing, unreadable = hashlib.sha256(), []
        others, examples = Counter[str](), dict[str, str]()  # by their ending, files that are not taken
        for loose in sorted(root.iterdir()) if folders else ():
            if loose.is_file() and _extension(loose.name) in ENDINGS:
                others["beside the class folders"] += 1
                examples.setdefault("beside the class folders", str(loose))
        for label, folder in enumerate(folders or ["."]):
            for parent, files in folders_in(root / folder, below=root if folders else None):
                for file in files:
                    path = os.path.join(parent, file)
                    if _extension(file) not in ENDINGS:
                        if not file.startswith("."):
                            others[f".{_extension(file)}"] += 1
                            examples.setdefault(f".{_extension(file)}", path)
                        continue
                    try:
                        found = os.stat(path)
                    except OSError as error:
                        unreadable.append(f"{path}: {error.strerror}")
                        continue
                    if not stat.S_ISREG(found.st_mode):  # reading a pipe would wait for ever
                        unreadable.append(f"{path}: no ordinary file")
                        continue
                    self.paths.append(path)
                    self.labels.append(label)
                    listing.update(
                        f"{os.path.relpath(path, root)}\0{found.st_size}\0{label}\n".encode("utf-8", "surrogateescape")
                    )
        self.fingerprint = listing.hexdigest()
        self.classes = tuple(folders)
        left_out = ", ".join(f"{count} {why} (such as {examples[why]})" for why, count in sorted(others.items()))
        if not self.paths:
            others_told = f"; its files are {left_out}" if left_out else ""
            raise UserError(f"folder:{directory}: holds no {', '.join(ENDINGS)} files{others_told}")
        if left_out:
            log.warning("%s: left out: %s; taken are %s", self.name, left_out, ", ".join(ENDINGS))
        if unreadable:
            log.warning("%d files are left out, being unreadable, such as %s", len(unreadable), unreadable[0])
        if not folders:
            log.info("folder:%s: no sub-folders, so no labels; probes want %s/CLASS/IMAGE", directory, directory)

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, indices: Sequence[int]) -> list[SourceSample]:
        return [
            SourceSample(
                f"{index:08d}",
                Path(self.paths[index]).read_bytes(),
                _extension(self.paths[index]),
                self.labels[index] if self.classes else None,
                path=self.paths[index],
            )
            for index in indices
        ]

    def digests(self, indices: Sequence[int]) -> list[bytes]:
        return [hashlib.sha256(Path(self.paths[index]).read_bytes()).digest() for index in indices]


def folders_in(folder: str | Path, below: Path | None = None) -> Iterator[tuple[str, list[str]]]:
    """Each folder under one, itself first, with its files' names, sorted; hidden folders are passed over.

    Links to folders are followed, but no folder is given twice, nor `below`: a link that leads up would have no end.
    One that can't be read is left out, with a warning.
    """

    def left_out(error: OSError) -> None:
        log.warning("%s: left out with all that is in it: %s", error.filename, error.strerror)

    seen = {_identity(below)} if below is not None else set()
    for parent, subfolders, files in os.walk(folder, followlinks=True, onerror=left_out):
        subfolders[:] = sorted(one for one in subfolders if not one.startswith("."))
        if (here := _identity(parent)) in seen:
            subfolders.clear()
            continue
        seen.add(here)
        yield parent, sorted(files)


def _identity(folder: str | Path) -> tuple[int, int]:
    found = os.stat(folder)
    return found.st_dev, found.st_ino


class TorchvisionSource:
    """A classification set of torchvision that lies under ROOT already; a split may follow the name: STL10/train."""

    def __init__(self, dataset: str, root: str):
        self.name = f"torchvision:{dataset}"
        self._dataset_name, self._root = dataset, root
        self._dataset = _open_torchvision(dataset, root)
        self.fingerprint = f"{dataset}: {len(self._dataset)}"
        self.classes = tuple(map(str, getattr(self._dataset, "classes", ())))

    def __len__(self) -> int:
        return len(self._dataset)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_dataset"}  # may be gigabytes

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._dataset = _open_torchvision(self._dataset_name, self._root)

    def read(self, indices: Sequence[int]) -> list[SourceSample]:
        files = getattr(self._dataset, "samples", None)  # ImageNet and other folders: the bytes as they are
        found = []
        for index in indices:
            if files is not None and _extension(files[index][0]) in ENDINGS:
                path, label = files[index][:2]
                image, extension = Path(path).read_bytes(), _extension(path)
            else:
                path, (picture, label) = "", self._dataset[index][:2]
                buffer = io.BytesIO()
                picture.convert("RGB").save(buffer, "PNG")
                image, extension = buffer.getvalue(), "png"
            label = int(label) if int(label) >= 0 else None
            found.append(SourceSample(f"{index:08d}", image, extension, label, path=path))
        return found

    def digests(self, indices: Sequence[int]) -> list[bytes]:
        return [hashlib.sha256(sample.image).digest() for sample in self.read(indices)]


class IdxSource:
    """The files of MNIST and its kin: IMAGES of one byte a pixel, as PNGs, and LABELS. Either may be gzipped."""

    def __init__(self, spec: str, images: str, labels: str | None = None):
        self.name = spec
        self.images, self.labels = images, labels
        pixels, classes = idx.read(images, 3), idx.read(labels, 1) if labels is not None else None
        if classes is not None and len(classes) != len(pixels):
            raise UserError(f"{spec}: {len(pixels)} images, but {len(classes)} labels; expected as many")
        digest = hashlib.sha256(pixels.data)
        digest.update(classes.data if classes is not None else b"")
        self.fingerprint = digest.hexdigest()
        self.classes = tuple(map(str, range(int(classes.max()) + 1))) if classes is not None else ()
        self._count = len(pixels)

    def __len__(self) -> int:
        return self._count

    def read(self, indices: Sequence[int]) -> list[SourceSample]:
        pixels = idx.read(self.images, 3)
        labels = idx.read(self.labels, 1) if self.labels is not None else None
        found = []
        for index in indices:
            buffer = io.BytesIO()
            Image.fromarray(pixels[index]).save(buffer, "PNG")
            label = int(labels[index]) if labels is not None else None
            found.append(SourceSample(f"{index:08d}", buffer.getvalue(), "png", label))
        return found

    def digests(self, indices: Sequence[int]) -> list[bytes]:
        pixels = idx.read(self.images, 3)
        return [hashlib.sha256(pixels[index].data).digest() for index in indices]


class ParquetSource:
    """Images in Parquet files, their labels and the names of those where the schema tells them."""

    def __init__(self, spec: str, rest: str, config: StorageConfig):
        pattern, _, column = rest.rpartition(":")
        if not pattern or "/" in column:  # a URL's colon
            pattern, column = rest, ""
        self.name = spec
        self._images = ParquetImages(spec, pattern, column or None, config)
        self.fingerprint, self.classes = self._images.digest, self._images.classes

    def __len__(self) -> int:
        return len(self._images)

    def read(self, indices: Sequence[int]) -> list[SourceSample]:
        return [
            SourceSample(f"{index:08d}", image, ending_of(image), label, path=place)
            for index, (image, label, place) in zip(indices, self._images.read(indices), strict=True)
        ]

    def digests(self, indices: Sequence[int]) -> list[bytes]:
        return [hashlib.sha256(image).digest() for image, _, _ in self._images.read(indices)]


def _open_torchvision(name: str, root: str) -> Any:
    from torchvision import datasets

    name, _, split = name.partition("/")
    if name not in datasets.__all__:
        raise UserError(f"torchvision:{name}:{root}: torchvision has no data set of that name")
    options: dict[str, Any] = {"root": root}
    if split:
        takes_train = "train" in inspect.signature(getattr(datasets, name)).parameters
        options |= {"train": split == "train"} if takes_train else {"split": split}
    try:
        return getattr(datasets, name)(**options)
    except (RuntimeError, OSError, TypeError, ValueError) as error:
        raise UserError(f"torchvision:{name}:{root}: {str(error).splitlines()[0]}") from None


def _extension(path: str) -> str:
    return path.rsplit(".", 1)[-1].lower() if "." in path else ""
