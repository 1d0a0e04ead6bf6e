"""torchvision's ViTs, parameter names included, for images of any size that their patches divide.

The position embeddings belong to the size that a ViT was built for; for another one they are resampled, bicubic, as
DINO does (Caron et al. 2021).

Legend: B rows (views), L patches of an image, D width.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torchvision
from torch import Tensor
from torch.nn import functional as F

from dist_ssl.config import UserError


class VisionTransformer(torchvision.models.VisionTransformer):
    """Pixels (B, 3, S, S) -> (B, D), S a multiple of the patch. Raises UserError for another S."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.encoder.__class__ = _Encoder  # its weights are drawn: a second one would change those of every seed

    def no_weight_decay(self) -> set[str]:
        """Parameters of more than one dimension that are not decayed, as timm's models name theirs."""
        return {"class_token", "encoder.pos_embedding"}

    def _process_input(self, x: Tensor) -> Tensor:
        check_divides(self.patch_size, x.shape[-1], "evaluation.image_size")
        return cast(Tensor, self.conv_proj(x)).flatten(2).permute(0, 2, 1)


class _Encoder(torchvision.models.vision_transformer.Encoder):
    def forward(self, input: Tensor) -> Tensor:
        x = input + self._positions(input.shape[1])
        return cast(Tensor, self.ln(self.layers(self.dropout(x))))

    def _positions(self, length: int) -> Tensor:
        """(1, length, D): the class token's, and those of length - 1 patches."""
        own = self.pos_embedding
        if length == own.shape[1]:
            return own
        side, wanted = math.isqrt(own.shape[1] - 1), math.isqrt(length - 1)
        # As a product, since the backward of torch's resampling adds in any order on a GPU.
        each = torch.eye(side**2, device=own.device).view(-1, 1, side, side)
        weights = F.interpolate(each, size=(wanted, wanted), mode="bicubic").flatten(1)  # (L, length - 1)
        with torch.autocast(own.device.type, enabled=False):
            return torch.cat([own[:, :1], weights.T @ own[:, 1:]], dim=1)


def check_divides(patch: int, side: int, key: str) -> None:
    """Raises UserError, naming the config's key, where patches do not fill an image of this side."""
    if side % patch:
        raise UserError(f"{key}: expected a multiple of the ViT's patch, {patch}; got {side}")
