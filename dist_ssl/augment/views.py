"""Crops -> views on the training device: flip, colour jitter in the drawn order, grey, blur, solarise, normalise.

The definitions are torchvision's for float tensors. On CUDA all rows go through two kernels at once (`cuda`), elsewhere
in blocks (`cpu`).

Legend: n samples, V views of one size of each, S pixels a side, P parameters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dist_ssl.augment import cpu
from dist_ssl.config import AugmentConfig
from dist_ssl.distributed import HAS_TRITON, on_gpu


def augment(crops_u8: Tensor, parameters: Tensor, config: AugmentConfig, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 crops (n, V, 3, S, S) on any device, parameters (n, V, P) -> normalised views like the crops.

    dtype: of the views; what the first convolution computes in, so that it reads them as they are. Flattened to
    (n V, 3, S, S), they are in channels-last format where CUDA's kernels made them, contiguous otherwise.
    Parameters are read on the host: keep them on the CPU, or this waits for the device.
    """
    rows_u8, drawn = crops_u8.flatten(0, 1), parameters.flatten(0, 1).cpu()
    if _has_kernels(crops_u8):
        from dist_ssl.augment import cuda  # torch's builds without CUDA bring no triton

        return cuda.colours(rows_u8, drawn, config, dtype).unflatten(0, crops_u8.shape[:2])
    return cpu.colours(rows_u8, drawn, config).view(crops_u8.shape).to(dtype)


def _has_kernels(crops_u8: Tensor) -> bool:
    return on_gpu(crops_u8) and HAS_TRITON


def normalize(images_u8: Tensor, config: AugmentConfig) -> Tensor:
    """uint8 (..., 3, S, S) -> float32, scaled to [0, 1], then by the config's mean and standard deviation."""
    device = images_u8.device
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (config.mean, config.std))
    return images_u8.to(torch.float32).mul_(1 / 255).sub_(mean).div_(std)
