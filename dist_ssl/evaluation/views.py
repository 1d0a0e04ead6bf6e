"""Views of images that an evaluation has read: cropped and augmented as the pretraining would, each image's by itself.

Legend: n images, V views of each, S their side, P parameters of a view.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms import functional as TF

from dist_ssl import augment
from dist_ssl.augment.parameters import NUM_UNIFORMS
from dist_ssl.config import ViewPolicy
from dist_ssl.data.random import view_uniforms
from dist_ssl.evaluation.features import Split


def draw(
    sample_ids: NDArray[np.int64], policies: Sequence[ViewPolicy], seed: int = 0, epoch: int = 0
) -> tuple[Tensor, NDArray[np.float64]]:
    """Parameters (n, V, P) and uniforms (n, V, 22) for the crops: a function of (seed, epoch, sample, view)."""
    epochs = np.full(len(sample_ids), epoch)
    return augment.draw(view_uniforms(seed, epochs, sample_ids, len(policies), NUM_UNIFORMS), policies)


def views(
    split: Split,
    images: Tensor,
    policies: Sequence[ViewPolicy],
    parameters: Tensor,
    crop_uniforms: NDArray[np.float64],
) -> Tensor:
    """uint8 (n, 3, S, S) -> normalised fp32 (n, V, 3, S, S) on the device. Crops are of the image as it was read."""
    side = images.shape[-1]
    crops = torch.empty((len(images), len(policies), 3, side, side), dtype=torch.uint8)
    for row, image in enumerate(images):
        for view, policy in enumerate(policies):
            box = augment.crop_box(crop_uniforms[row, view], side, side, policy.min_scale, policy.max_scale)
            if box == (0, 0, side, side):
                crops[row, view] = image
            else:
                crops[row, view] = TF.resized_crop(image, *box, [side, side], antialias=True)
    return augment.augment(crops.to(split.device), parameters, split.augment)
