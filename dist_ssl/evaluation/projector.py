"""An evaluation's embeddings and pictures for TensorBoard, beside its results: those of `pictures`, for its projector.

    tensorboard --logdir RUN

Names: embeddings `h` and `z`, images `neighbours/h`, `neighbours/z` (a row a query, which stands first), `views`.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch

from dist_ssl.evaluation.features import Features, Split
from dist_ssl.evaluation.pictures import thumbnails

POINTS, SIDE = 512, 32  # of the projector, each with its image, SIDE pixels wide: about 10 MB at D = 2,048


def write(folder: Path, step: int, test: Split, features: Features, shown: dict[str, np.ndarray]) -> None:
    """Replace what `folder` holds by the first POINTS test images in h and z, and by `pictures.pictures`' arrays."""
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(folder, ignore_errors=True)
    count = min(POINTS, len(features.labels))
    images = torch.cat([batch.images for batch in test.batches(0, count)])
    small = torch.from_numpy(thumbnails(images, min(SIDE, images.shape[-1]))).float() / 255
    with SummaryWriter(str(folder)) as writer:
        for layer in ("h", "z"):
            if layer not in features.layers:
                continue
            rows, labels = np.array(features.layers[layer][:count]), features.labels[:count].tolist()
            writer.add_embedding(rows, labels, small, step, layer)
            around = shown["sample_images"][np.column_stack([shown["queries"], shown[f"neighbours_{layer}"]])]
            writer.add_image(f"neighbours/{layer}", _grid(around), step)
        if "views" in shown:
            writer.add_image("views", _grid(shown["views"]), step)


def _grid(images: np.ndarray) -> np.ndarray:
    """(rows, columns, 3, s, s) -> (3, rows * s, columns * s)."""
    rows, columns, colours, height, width = images.shape
    return images.transpose(2, 0, 3, 1, 4).reshape(colours, rows * height, columns * width)
