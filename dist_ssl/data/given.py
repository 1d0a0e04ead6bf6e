"""`--data DIR`: shards or plain images, their training and test parts, as overrides of a config."""

from __future__ import annotations

import logging
import os
import shlex
from pathlib import Path
from typing import cast

from dist_ssl import storage
from dist_ssl.config import StorageConfig, UserError, override
from dist_ssl.config.environment import ranks_in_environment
from dist_ssl.data.in_place_index import index_in_place
from dist_ssl.data.manifest import MANIFEST, load_manifest, manifest_folder
from dist_ssl.data.sources import PARTS, open_source

TEST_FRACTION = 0.1  # of images that are in no `train` and `test` folder
MAX_LOOKED_AT = 200_000  # files: a network's file system takes a minute or more to tell of those

log = logging.getLogger(__name__)


def training_overrides(data: str, config: StorageConfig) -> list[str]:
    """What `pretrain --data` sets: the training part, and both for the probes. Collective."""
    train, test = train_and_test(data, config)
    # Without a test part an empty one: a config's own is of other images.
    values = {"data.shards": train, "evaluation.train_shards": train, "evaluation.test_shards": test or ""}
    return [override(key, place) for key, place in values.items()]


def train_and_test(data: str, config: StorageConfig) -> tuple[str, str | None]:
    """As `_found` says, found and indexed by rank 0. Collective."""
    if ranks_in_environment() is None:
        return _found(data, config)  # without torch, which takes seconds
    from dist_ssl import distributed

    with distributed.together():
        found = _found(data, config) if distributed.rank() == 0 else None
    return cast(tuple[str, str | None], distributed.broadcast_object(found))


def _found(data: str, config: StorageConfig) -> tuple[str, str | None]:
    """The locations of the two parts of `data`; None where there is no test part.

    Shards: DATA/train and DATA/test, as `shards write --test-fraction` makes them, or DATA alone. Images: the folders
    `train` and `test` (or `val`), or `train` alone, where there are such, else a tenth is held out of class folders,
    and nothing of images without labels. Images that are not indexed yet are indexed here, where they are. Raises
    UserError.
    """
    folder = data.removeprefix("folder:").rstrip("/")
    if data.startswith("idx:"):
        raise UserError(f"{data}: --data takes a folder; give IDX files by --set data.shards={data}")
    if not storage.is_local(folder) or _holds_shards(data):
        return f"{folder}/train", f"{folder}/test"
    if os.path.exists(f"{data}/{MANIFEST}"):
        log.info("%s: shards without a test part, so all are trained on and none is held out", data)
        return data, None
    if not os.path.isdir(folder):
        raise UserError(f"--data {data}: no such folder; expected one of images, or one that `shards write` filled")
    folders = {path.name for path in Path(folder).iterdir() if path.is_dir() and not path.name.startswith(".")}
    parts = [name for name in PARTS if name in folders]
    if "train" in parts and (len(parts) > 1 or len(folders) == 1):
        found = [f"folder:{folder}/{name}" for name in parts[:2]]
        for part in found:
            _index(part, config)
        return found[0], found[1] if len(found) > 1 else None
    if named := {"train", "test"} & folders:  # folder:DIR/train would be that folder, not the part
        raise UserError(
            f"--data {data}: its folder {min(named)} could be a part or a class; expected train and test (or val), "
            "or classes of other names: rename it"
        )
    if not folders:
        _index(f"folder:{folder}", config)
        log.info("%s: no class folders, so all images are trained on and none is held out", data)
        return f"folder:{folder}", None
    train, test = f"folder:{folder}/train", f"folder:{folder}/test"
    if _is_indexed(train) and _is_indexed(test):
        _tell_of_changes(f"folder:{folder}", train, config)
    else:
        index_in_place(f"folder:{folder}", config, test_fraction=TEST_FRACTION, progress=True)
    return train, test


def _holds_shards(data: str) -> bool:
    return os.path.exists(f"{data}/train/{MANIFEST}") and not data.startswith("folder:")


def _is_indexed(location: str) -> bool:
    place = manifest_folder(location)
    return place is not None and os.path.exists(f"{place}/{MANIFEST}")


def _index(location: str, config: StorageConfig) -> None:
    if _is_indexed(location):
        _tell_of_changes(location, location, config)
    else:
        index_in_place(location, config, progress=True)


def _tell_of_changes(folder: str, indexed: str, config: StorageConfig) -> None:
    """A warning where a folder's files are not those of its index, which a run that goes on keeps."""
    manifest = load_manifest(indexed, config)
    if manifest.num_samples > MAX_LOOKED_AT or open_source(folder).fingerprint == manifest.details.get("files"):
        return
    fraction = manifest.details.get("test_fraction")
    log.warning(
        "%s: its files are not those that were indexed, and only those are used; for a new run on what is there now: "
        "dist-ssl shards index %s%s",
        folder, shlex.quote(folder), f" --test-fraction {fraction:g}" if fraction else "",
    )  # fmt: skip
