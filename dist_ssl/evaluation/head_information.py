"""What each layer still knows, from h through the head to z: transformations of the image, and its true factors.

After SimCLR's Table 3 (Chen et al. 2020, section 4.2), on any images: each is transformed in one of a few known ways,
and the same small classifier is trained to name the way from each layer. Its log-loss on other images gives a lower
bound of the mutual information in bits (Barber and Agakov 2003): entropy of the label minus log-loss. Where shards
carry factors (a `.json` beside each image), the same is done for those.

Legend: n images, S their side, D a layer's width, C ways, K seeds.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import functional as TF

from dist_ssl import distributed
from dist_ssl.data.progress import Progress, track
from dist_ssl.evaluation.factor_weights import evenness, factor_weight
from dist_ssl.evaluation.features import RowWriter, Split, layer_dims
from dist_ssl.evaluation.frozen import Readable
from dist_ssl.evaluation.intervals import bootstrap_interval, share_interval
from dist_ssl.evaluation.mlp_probe import mlp_log_probabilities

FACTOR_BINS = 8  # of a factor that is a real number: bins of equal population
NOISE_STD = 0.1


@dataclass(frozen=True)
class Transformation:
    """`apply(images uint8 (n, 3, S, S), way)` transforms a batch in way 0 (as it is) to num_ways - 1."""

    num_ways: int
    apply: Callable[[Tensor, int], Tensor]


def _grey(images: Tensor, way: int) -> Tensor:
    return TF.rgb_to_grayscale(images, num_output_channels=3) if way else images


def _rotation(images: Tensor, way: int) -> Tensor:
    return torch.rot90(images, way, dims=(2, 3))


def _noise(images: Tensor, way: int) -> Tensor:
    if not way:
        return images
    # Seeded by the image's own pixels: it gets the same noise in whatever batch and on whatever rank it is.
    seeds = images.sum(dim=(1, 2, 3), dtype=torch.int64).tolist()
    noise = torch.stack([torch.randn(images[0].shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    return (images.float() + noise * (255 * NOISE_STD)).round().clamp(0, 255).to(torch.uint8)


def _sobel(images: Tensor, way: int) -> Tensor:
    if not way:
        return images
    kernel = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
    both = torch.stack([kernel, kernel.T])[:, None].repeat(3, 1, 1, 1)
    edges = F.conv2d(F.pad(images.float(), (1, 1, 1, 1), mode="replicate"), both, groups=3)
    size = edges.view(len(images), 3, 2, *images.shape[2:]).square().sum(2).sqrt()
    return (size / 4).round().clamp(0, 255).to(torch.uint8)


def _hue(images: Tensor, way: int) -> Tensor:
    return TF.adjust_hue(images, (0.0, 0.25, 0.5, -0.25)[way]) if way else images


def _zoom(images: Tensor, way: int) -> Tensor:
    if not way:
        return images
    side = images.shape[-1]
    inner = round(side / (1.5, 2.0)[way - 1])
    cropped = TF.center_crop(images, [inner, inner])
    return TF.resize(cropped, [side, side], antialias=True)


TRANSFORMATIONS = {
    "colour or grey": Transformation(2, _grey),
    "quarter turn": Transformation(4, _rotation),
    "clean or noisy": Transformation(2, _noise),
    "image or its edges": Transformation(2, _sobel),
    "hue shift": Transformation(4, _hue),
    "zoom": Transformation(3, _zoom),
}


def head_information(train: Split, test: Split, readable: Readable, folder: Path) -> dict[str, Any]:
    """The results' `head_information`: for each task its kind, entropy and chance, and per layer accuracy and bits.

    Of a factor its weight in the layer too, and of each layer how even these weights are (`factor_weights`).

    Probes are trained on images of `train` and scored on images of `test`, evaluation.head_information_images in all,
    two to one. Collective: ranks share the images, then the probes. `folder` holds features while this runs.
    """
    settings = train.config.evaluation
    total, num_seeds = settings.head_information_images, settings.num_seeds
    num_train = min(total * 2 // 3, train.manifest.num_samples)
    num_test = min(total // 3, test.manifest.num_samples)
    read_train = _read(train, num_train, readable, folder / "head_train")
    read_test = _read(test, num_test, readable, folder / "head_test")
    tasks = [(name, "transformation", name) for name in TRANSFORMATIONS]
    tasks += [(name, "factor", "as it is") for name in _factor_names(read_train.factors, read_test.factors)]
    jobs = [(task, layer) for task in tasks for layer in read_train.dims]
    mine = {}
    shown = distributed.rank() == 0
    for position, ((name, kind, way), layer) in track(enumerate(jobs), len(jobs), "head information", shown):
        if position % distributed.world_size() == distributed.rank():
            y_train, y_test = _labels(name, kind, read_train, read_test)
            x_train, x_test = (part.features(way, layer) for part in (read_train, read_test))
            mine[name, layer] = score(x_train, y_train, x_test, y_test, num_seeds, train.device)
            if kind == "factor":
                mine[name, layer]["weight"] = factor_weight(x_train, y_train, x_test, y_test)
    scores = {key: value for part in distributed.gather_objects(mine) for key, value in part.items()}
    found: dict[str, Any] = {}
    for name, kind, _ in tasks:
        y_train, y_test = _labels(name, kind, read_train, read_test)
        shares = np.bincount(y_test) / len(y_test)
        entropy = float(-sum(p * math.log2(p) for p in shares if p > 0))
        found[name] = {"kind": kind, "ways": int(max(y_train.max(), y_test.max())) + 1, "entropy_bits": entropy}
        found[name] |= {
            "chance": float(shares.max()),
            "layers": {layer: scores[name, layer] for layer in read_train.dims},
        }
    distributed.gather_objects(None)  # every rank is done reading before the files go
    if distributed.rank() == 0:
        for part in (read_train, read_test):
            shutil.rmtree(part.folder)
    factors = [name for name, kind, _ in tasks if kind == "factor"]
    even = {layer: evenness([scores[name, layer]["weight"] for name in factors]) for layer in read_train.dims}
    counts = {"train_images": num_train, "test_images": num_test, "num_seeds": num_seeds}
    return counts | {"tasks": found, "evenness": even}


def score(
    x_train: np.ndarray,
    y_train: np.ndarray,
    x_test: np.ndarray,
    y_test: np.ndarray,
    num_seeds: int,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """{accuracy, accuracy_interval, bits, bits_interval, seeds_bits} of the MLP probe on (n, D) features."""
    num_classes = int(max(y_train.max(), y_test.max())) + 1
    log_p = mlp_log_probabilities(x_train, y_train, x_test, num_classes, num_seeds, device)
    correct = (log_p.argmax(2) == y_test[None]).mean(axis=0)
    shares = np.bincount(y_test, minlength=num_classes) / len(y_test)
    own = np.take_along_axis(log_p, y_test[None, :, None].repeat(num_seeds, 0), axis=2)[:, :, 0]
    bits = own / math.log(2) - np.log2(shares[y_test])[None]
    return {
        "accuracy": float(correct.mean()),
        "accuracy_interval": list(share_interval(correct)),
        "bits": float(bits.mean()),
        "bits_interval": list(bootstrap_interval(bits.mean(axis=0))),
        "seeds_bits": [float(value) for value in bits.mean(axis=1)],
    }


def ways_of(name: str, split: str, count: int) -> np.ndarray:
    """Which way each of the first `count` images of a split is transformed: fixed, whatever the ranks are."""
    key = [list(TRANSFORMATIONS).index(name), 0 if split == "train" else 1]
    return np.random.Generator(np.random.Philox(key=key)).integers(0, TRANSFORMATIONS[name].num_ways, count)


@dataclass
class _Read:
    """Features of every transformation (and "as it is") of the first images of a split, in memory-mapped files."""

    split: str
    count: int
    folder: Path
    dims: dict[str, int]
    factors: list[dict[str, Any]] | None

    def features(self, way: str, layer: str) -> np.ndarray:
        return np.load(_file(self.folder, way, layer), mmap_mode="r")


def _file(folder: Path, way: str, layer: str) -> Path:
    return folder / f"{way.replace(' ', '_')}-{layer}.npy"


def _read(split: Split, count: int, readable: Readable, folder: Path) -> _Read:
    dims = layer_dims(split, [readable])
    names = [*TRANSFORMATIONS, "as it is"]
    if distributed.rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name in names:
            for layer, dim in dims.items():
                np.lib.format.open_memmap(_file(folder, name, layer), mode="w+", dtype=np.float32, shape=(count, dim))
    distributed.gather_objects(None)  # the files are there
    cuts = np.linspace(0, count, distributed.world_size() + 1).astype(int)
    start, stop = int(cuts[distributed.rank()]), int(cuts[distributed.rank() + 1])
    error, factors = None, None
    try:
        factors = _fill(split, names, readable, folder, start, stop, count)
    except Exception as failure:
        error = failure
    distributed.raise_together(error)
    parts = distributed.gather_objects(factors)
    whole = None if any(part is None for part in parts) else [one for part in parts for one in part]
    return _Read(split.name, count, folder, dims, whole)


def _fill(
    split: Split, names: list[str], readable: Readable, folder: Path, start: int, stop: int, count: int
) -> list[dict[str, Any]] | None:
    writers: dict[tuple[str, str], RowWriter] = {}
    factors: list[dict[str, Any]] | None = []
    row = start
    with Progress(f"transformed {split.name} images", stop - start, distributed.rank() == 0) as progress:
        for batch in split.batches(start, stop):
            size = len(batch.labels)
            factors = None if factors is None or batch.factors is None else factors + batch.factors
            for name in names:
                images = batch.images
                if name in TRANSFORMATIONS:
                    images = _transformed(images, name, ways_of(name, split.name, count)[row : row + size])
                with torch.inference_mode():
                    for layer, values in readable.read(split.pixels(images)).items():
                        if (name, layer) not in writers:
                            writers[name, layer] = RowWriter(_file(folder, name, layer))
                        writers[name, layer].write(row, values.float().cpu().numpy())
            row += size
            progress.advance(size)
    for writer in writers.values():
        writer.close()
    return factors


def _transformed(images: Tensor, name: str, ways: np.ndarray) -> Tensor:
    out = torch.empty_like(images)
    for way in np.unique(ways).tolist():
        rows = torch.from_numpy(np.flatnonzero(ways == way))
        out[rows] = TRANSFORMATIONS[name].apply(images[rows], way)
    return out


def _factor_names(*parts: list[dict[str, Any]] | None) -> list[str]:
    """Factors that every image has as a number; a name that a transformation has too would be ambiguous."""
    if any(not part for part in parts):
        return []
    everywhere = set.intersection(*(set(one) for part in parts for one in part or []))
    numbers = [
        name
        for name in (parts[0] or [{}])[0]
        if name in everywhere
        and name not in TRANSFORMATIONS
        and all(isinstance(one[name], (int, float)) for part in parts for one in part or [])
    ]
    return [name for name in numbers if len({one[name] for one in parts[0] or []}) > 1]


def _labels(name: str, kind: str, train: _Read, test: _Read) -> tuple[np.ndarray, np.ndarray]:
    if kind == "transformation":
        return ways_of(name, train.split, train.count), ways_of(name, test.split, test.count)
    values = [np.array([one[name] for one in part.factors or []]) for part in (train, test)]
    if all(value.dtype.kind in "ib" for value in values):
        distinct = np.unique(np.concatenate(values))
        return np.searchsorted(distinct, values[0]), np.searchsorted(distinct, values[1])
    edges = np.quantile(values[0], np.linspace(0, 1, FACTOR_BINS + 1)[1:-1])
    return np.searchsorted(edges, values[0]), np.searchsorted(edges, values[1])
