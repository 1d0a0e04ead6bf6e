"""Batch norm's running statistics, taken anew on images as an evaluation sees them.

Training leaves those of augmented crops of its last steps, which a probe of whole images, larger ones often, does not
meet (Touvron et al. 2019); of many images at once they are exacter too (Wu and Johnson 2021, "precise" batch norm).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dist_ssl.checkpoint import NormStatistics, load_run
from dist_ssl.config import UserError, override, with_overrides
from dist_ssl.evaluation.features import Split, open_split
from dist_ssl.evaluation.frozen import with_batch_statistics
from dist_ssl.models import GlobalBatchNorm
from dist_ssl.storage import redact

log = logging.getLogger(__name__)

NUM_IMAGES, BATCH, PIECE = 4096, 256, 32


def statistics(run_dir: Path, shards: str, step: int | None = None, teacher: bool = False) -> NormStatistics:
    """Buffers of a run's encoder, its statistics those of up to NUM_IMAGES of `shards`, which need no labels.

    Prepared as `evaluate` prepares them. Not collective. Raises UserError for an encoder without batch norm, and where
    more than data.max_bad_fraction of the images are bad; fewer are left out, with a warning.
    """
    config, _, model = load_run(run_dir, step, teacher)
    encoder = model.encoder
    if not any(isinstance(module, GlobalBatchNorm) for module in encoder.modules()):
        raise UserError(f"--batch-norm-from: {config.model.encoder} has no batch norm; leave it out")
    config = with_overrides(config, [override("evaluation.train_shards", shards)])
    split = open_split("train", config, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    images = _spread(split)
    batches = (split.pixels(batch) for batch in images.tensor_split(max(1, len(images) // BATCH)))
    with_batch_statistics(encoder.to(split.device), batches)
    return NormStatistics(redact(shards), {name: buffer.cpu() for name, buffer in encoder.named_buffers()})


def _spread(split: Split) -> Tensor:
    """uint8 (n, 3, S, S): pieces from all over the split, mixed, since shards may be sorted by class."""
    pieces, bad, first = [], 0, ""
    for start, stop in _pieces(split.manifest.num_samples):
        for batch in split.batches(start, stop):
            whole = torch.ones(len(batch.images), dtype=torch.bool)
            whole[batch.replaced] = False
            pieces.append(batch.images[whole])
            bad += len(batch.replaced)
            first = first or next((f"{one['shard']}: {one['key']}: {one['reason']}" for one in batch.quarantined), "")
    images = torch.cat(pieces)
    if bad > split.config.data.max_bad_fraction * (bad + len(images)):
        raise UserError(
            f"--batch-norm-from: {bad} of {bad + len(images)} images are bad, more than data.max_bad_fraction = "
            f"{split.config.data.max_bad_fraction:g} of them; the first: {first}"
        )
    if bad:
        log.warning("--batch-norm-from: %d bad images are left out, the first: %s", bad, first)
    if len(images) < BATCH:
        log.warning("--batch-norm-from: statistics of %d images are rough; %d or more are better", len(images), BATCH)
    return images[torch.from_numpy(np.random.default_rng(0).permutation(len(images)))]


def _pieces(rows: int) -> Iterator[tuple[int, int]]:
    count = -(-min(rows, NUM_IMAGES) // PIECE)
    for i in range(count):
        start, following = rows * i // count, rows * (i + 1) // count
        yield start, min(start + PIECE, following)
