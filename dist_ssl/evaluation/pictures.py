"""What the report shows of images: neighbours in h and z, an embedding map, views as trained. Small arrays only.

pictures.npz: sample_images uint8 (n, 3, s, s) and sample_labels (n,); queries (q,) and neighbours_<layer> (q, 8), rows
of the sample; pca_<layer> (m, 2) with pca_share_<layer>, umap_<layer> where umap is installed, map_labels (m,); views
uint8 (p, V, 3, s, s).
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dist_ssl import augment
from dist_ssl.config import Config, UserError
from dist_ssl.data import stream
from dist_ssl.data.manifest import load_manifest
from dist_ssl.evaluation.features import Features, Split, in_batches_of
from dist_ssl.evaluation.knn import nearest

log = logging.getLogger(__name__)

SAMPLE, MAP_POINTS, QUERIES, NEIGHBOURS, VIEWS, THUMBNAIL = 1024, 1500, 6, 8, 24, 64


def pictures(test: Split, features: Features) -> dict[str, np.ndarray]:
    """All arrays of pictures.npz for the first images of the test split (shards are permuted when they are written)."""
    sample = min(SAMPLE, len(features.labels))
    rows = np.arange(min(MAP_POINTS, len(features.labels)))
    found: dict[str, Any] = {"map_labels": features.labels[rows]}
    used: set[int] = set()
    queries = _queries(features.labels[:sample])
    for layer in ("h", "z"):
        if layer not in features.layers:
            continue
        values = np.asarray(features.layers[layer][rows])
        found[f"pca_{layer}"], found[f"pca_share_{layer}"] = principal_components(values)
        projected = _umap(values)
        if projected is not None:
            found[f"umap_{layer}"] = projected
        # One more than is shown: the nearest to a query is itself.
        _, neighbours = nearest(values[queries], values[:sample], NEIGHBOURS + 1)
        found[f"neighbours_{layer}"] = np.stack(
            [
                [r for r in row if r != query][:NEIGHBOURS]
                for query, row in zip(queries, neighbours.tolist(), strict=True)
            ]
        )
        used |= {*queries.tolist(), *found[f"neighbours_{layer}"].ravel().tolist()}
    images = torch.cat([batch.images for batch in test.batches(0, sample)])
    kept = np.array(sorted(used))
    found["sample_images"], found["sample_labels"] = thumbnails(images[kept]), features.labels[kept]
    place = {int(row): position for position, row in enumerate(kept)}
    found["queries"] = queries
    for name in ("queries", *(name for name in found if name.startswith("neighbours_"))):
        found[name] = np.vectorize(place.__getitem__, otypes=[np.int64])(found[name])
    views = views_as_trained(test.config)
    if views is not None:
        found["views"] = views
    return found


def save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Written beside its place, then renamed."""
    temporary = path.with_name("writing-" + path.name)
    np.savez_compressed(temporary, allow_pickle=False, **arrays)
    os.replace(temporary, path)


def principal_components(values: np.ndarray) -> tuple[np.ndarray, np.float64]:
    """(m, 2) coordinates on the first two principal components, and the share of the variance that they hold."""
    centred = torch.from_numpy(values - values.mean(axis=0, keepdims=True)).double()
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    two = torch.zeros(len(values), 2, dtype=torch.float64)
    count = min(2, len(s))
    two[:, :count] = (u * s)[:, :count]
    return two.float().numpy(), np.float64((s[:2].square().sum() / s.square().sum().clamp(min=1e-30)).item())


def views_as_trained(config: Config) -> np.ndarray | None:
    """Views of the first images, by the run's own data and augmentation; None, with a warning, where its data is gone.

    uint8 (p, V, 3, s, s); views of all sizes are shown alike.
    """
    if not config.data.shards:
        return None
    images = max(VIEWS // config.augment.num_views, 4)
    few = in_batches_of(images, config, num_workers=0)
    try:
        manifest = load_manifest(few.data.shards, few.storage)
        place = {"cursor": 0, "first_step": 0, "num_steps": 1, "rank": 0, "world_size": 1}
        with stream.training_batches(few, manifest, **place) as batches:
            batch = next(batches)
        sizes = [augment.augment(crops, drawn, few.augment) for crops, drawn in batch.of_each_size()]
    except (OSError, UserError) as error:
        log.warning("no views in the report: %s", error)
        return None
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (few.augment.mean, few.augment.std))
    side = min(few.augment.image_size, THUMBNAIL)
    small = []
    for views in sizes:
        pixels = ((views.flatten(0, 1) * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
        small.append(thumbnails(pixels, side).reshape(*views.shape[:3], side, side))
    return np.concatenate(small, axis=1)


def thumbnails(images: Tensor, side: int | None = None) -> np.ndarray:
    """uint8 (n, 3, S, S) -> `side` pixels wide, or THUMBNAIL where they are wider than that."""
    side = side or min(images.shape[-1], THUMBNAIL)
    if images.shape[-1] != side:
        small = F.interpolate(images.float(), size=(side, side), mode="bilinear", antialias=True)
        images = small.round().clamp(0, 255).to(torch.uint8)
    return images.numpy()


def _queries(labels: np.ndarray) -> np.ndarray:
    """The first image of each of the first classes; the first images where there are no labels."""
    if (labels < 0).all():
        return np.arange(min(QUERIES, len(labels)))
    first = [int(np.flatnonzero(labels == label)[0]) for label in np.unique(labels)]
    return np.array(sorted(first)[:QUERIES])


def _umap(values: np.ndarray) -> np.ndarray | None:
    try:
        from umap import UMAP
    except ImportError:
        return None
    return np.asarray(UMAP(n_components=2, random_state=0).fit_transform(values), dtype=np.float32)
