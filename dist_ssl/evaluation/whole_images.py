"""Batch norm's running statistics, taken anew on images as an evaluation sees them.

Training leaves those of augmented crops of its last steps, which a probe of whole images, larger ones often, does not
meet (Touvron et al. 2019); of many images at once they are exacter too (Wu and Johnson 2021, "precise" batch norm).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dist_ssl.checkpoint import load_run
from dist_ssl.config import UserError, with_overrides
from dist_ssl.evaluation.features import Split, open_split
from dist_ssl.models import GlobalBatchNorm

NUM_IMAGES, BATCH, PIECE = 4096, 256, 32


def statistics(run_dir: Path, shards: str, step: int | None = None, teacher: bool = False) -> dict[str, Tensor]:
    """Buffers of a run's encoder by name, its statistics those of up to NUM_IMAGES of `shards`, which need no labels.

    Prepared as `evaluate` prepares them. Not collective. Raises UserError for an encoder without batch norm.
    """
    config, _, model = load_run(run_dir, step, teacher)
    encoder = model.encoder
    norms = [module for module in encoder.modules() if isinstance(module, GlobalBatchNorm)]
    if not norms:
        raise UserError(f"--batch-norm-from: {config.model.encoder} has no batch norm; leave it out")
    config = with_overrides(config, [f"evaluation.train_shards={json.dumps(shards)}"])
    split = open_split("train", config, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    images = _spread(split)
    encoder.to(split.device)
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over batches
        norm.train()
    with torch.inference_mode():
        for batch in images.tensor_split(max(1, len(images) // BATCH)):
            encoder(split.pixels(batch))
    return {name: buffer.cpu() for name, buffer in encoder.named_buffers()}


def _spread(split: Split) -> Tensor:
    """uint8 (n, 3, S, S): pieces from all over the split, mixed, since shards may be sorted by class."""
    rows = split.manifest.num_samples
    starts = range(0, rows, max(PIECE, rows * PIECE // NUM_IMAGES))
    pieces = [batch.images for start in starts for batch in split.batches(start, min(start + PIECE, rows))]
    images = torch.cat(pieces)
    return images[torch.from_numpy(np.random.default_rng(0).permutation(len(images)))]
