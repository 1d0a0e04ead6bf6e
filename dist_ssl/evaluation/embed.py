"""What a trained encoder makes of anybody's images: h, without probes, labels or shards.

    encoder = load_encoder("runs/imagenet")
    h = embed(encoder, "photos")                     # all images under a folder, in the order of images_in("photos")
    h = embed(encoder, [Image.open("a.jpg"), "b.png"])

Images are prepared as an evaluation prepares them: resize, centre crop, normalise.

Legend: n images, D the encoder's width, S pixels a side.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from dist_ssl.augment import normalize
from dist_ssl.checkpoint import load_run
from dist_ssl.config import Config, UserError
from dist_ssl.data.decode import ENDINGS, BadSample, centre_crop, channels_first, decode
from dist_ssl.data.progress import Progress
from dist_ssl.data.sources import folders_in
from dist_ssl.evaluation.frozen import Readable
from dist_ssl.storage.store import Store

Picture = str | Path | bytes | Image.Image


@dataclass(frozen=True)
class Encoder:
    """A run's encoder, frozen, on its device, and what prepares its images."""

    readable: Readable
    config: Config
    step: int
    device: torch.device


def load_encoder(
    run: str | Path, step: int | None = None, teacher: bool = False, device: torch.device | str | None = None
) -> Encoder:
    """The encoder of a run's newest or given checkpoint, or its teacher's, on a GPU where there is one.

    Raises UserError where there is no such checkpoint.
    """
    config, step, model = load_run(run, step, teacher)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return Encoder(Readable(model.encoder.to(place)), config, step, place)


def images_in(folder: str | Path) -> list[str]:
    """Paths of all images under a folder by their endings, sorted; hidden folders are passed over."""
    found = []
    for parent, files in folders_in(folder):
        found += [
            os.path.join(parent, name) for name in files if name.lower().endswith(tuple(f".{e}" for e in ENDINGS))
        ]
    if not found:
        raise UserError(f"{folder}: no {', '.join(ENDINGS)} file under it")
    return sorted(found)


def embed(
    encoder: Encoder,
    images: str | Path | Sequence[Picture],
    *,
    left_out: dict[int, str] | None = None,
    progress: bool = False,
) -> NDArray[np.float32]:
    """h (n, D) of images, in their order: a folder's, or paths, encoded bytes and PIL images.

    Raises BadSample for one that is no good image; with `left_out`, its row is missing and its place and the reason are
    put there.
    """
    pictures: Sequence[Picture] = images_in(images) if isinstance(images, str | Path) else images
    size, rows = encoder.config.evaluation.batch_size_per_rank, []
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool, Progress("embed", len(pictures), progress) as shown:
        for start in range(0, len(pictures), size):
            made = list(pool.map(partial(_prepared, encoder), pictures[start : start + size]))
            for place, one in enumerate(made, start):
                if isinstance(one, BadSample):
                    if left_out is None:
                        raise one
                    left_out[place] = str(one)
            good = [one for one in made if not isinstance(one, BadSample)]
            if good:
                with torch.inference_mode():
                    pixels = normalize(torch.from_numpy(np.stack(good)).to(encoder.device), encoder.config.augment)
                    rows.append(encoder.readable.read(pixels)["h"].float().cpu().numpy())
            shown.advance(len(made))
    if not rows:
        raise UserError(f"none of {len(pictures)} files is a good image: {next(iter((left_out or {}).values()), '')}")
    return np.concatenate(rows)


def _prepared(encoder: Encoder, picture: Picture) -> NDArray[np.uint8] | BadSample:
    """uint8 (3, S, S)."""
    try:
        data = Path(picture).read_bytes() if isinstance(picture, str | Path) else picture
        image = decode(data, encoder.config.data.max_pixels)
    except (BadSample, OSError) as error:
        name = picture if isinstance(picture, str | Path) else "an image"
        return BadSample(f"{name}: {error}")
    return channels_first(centre_crop(image, encoder.config.evaluated_size, encoder.config.evaluation.resize_ratio))


def check_output(file: Path) -> None:
    """Raises UserError for a format that is none, or whose package is not installed, and where it can't be written."""
    if file.suffix not in (".npy", ".parquet"):
        raise UserError(f"{file}: expected a name that ends in .npy or .parquet, the formats that are written")
    if file.suffix == ".parquet":
        _arrow(file)
    if not os.access(file.absolute().parent, os.W_OK):
        raise UserError(f"{file}: expected a folder that exists and that you may write to")


def write_embeddings(file: Path, h: NDArray[np.float32], paths: list[str], encoder: Encoder) -> None:
    """`.npy`: h as (n, D) float32, and beside it a .json with the paths of its rows. `.parquet`: columns path and h.

    A byte of a path that is no UTF-8 stands in both as JSON escapes it, such as \\udce9.
    """
    described: dict[str, Any] = {"encoder": encoder.config.model.encoder, "step": encoder.step}
    described |= {"run": encoder.config.run.dir, "image_size": encoder.config.evaluated_size}
    beside = Store(str(file.absolute().parent), encoder.config.storage)
    if file.suffix == ".npy":
        with (temporary := file.with_name(f"{file.name}.tmp")).open("wb") as stream:
            np.save(stream, h)
        temporary.replace(file)
        beside.write(file.with_suffix(".json").name, json.dumps(described | {"paths": paths}, indent=1).encode())
        return
    pa, parquet = _arrow(file)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(h.reshape(-1)), h.shape[1])
    texts = [path.encode(errors="backslashreplace").decode() for path in paths]
    table = pa.table({"path": texts, "h": vectors}).replace_schema_metadata({"dist_ssl": json.dumps(described)})
    parquet.write_table(table, file)


def _arrow(file: Path) -> tuple[Any, Any]:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{file}: parquet wants pyarrow: pip install pyarrow, or name a .npy") from None
    return pa, parquet
