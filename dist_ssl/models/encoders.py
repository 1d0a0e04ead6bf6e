"""Encoders f: pixels -> h.

Legend: B rows (views), S side of a view, D width of h.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dist_ssl.config import ENCODERS, TIMM, check_encoder
from dist_ssl.models.batch_norm import GlobalBatchNorm
from dist_ssl.models.from_timm import build_timm, check_side, is_timms
from dist_ssl.models.resnet import BasicBlock, Bottleneck, ResNet
from dist_ssl.models.vit import VisionTransformer, check_divides

_RESNETS: dict[str, tuple[type[BasicBlock | Bottleneck], list[int]]] = {
    "resnet18": (BasicBlock, [2, 2, 2, 2]),
    "resnet34": (BasicBlock, [3, 4, 6, 3]),
    "resnet50": (Bottleneck, [3, 4, 6, 3]),
    "resnet101": (Bottleneck, [3, 4, 23, 3]),
}
LEVELS = (4, 2, 1)  # of ResNetTiny's pyramid: places on a side


class ResNetTiny(nn.Module):
    """Three stages of torchvision's basic blocks, 32 to 128 channels, for images of 16 to 64 pixels on a CPU.

    h is the mean of the last map or, as a pyramid (Lazebnik et al. 2006; He et al. 2015), batch norm of its means at
    4 x 4, 2 x 2 places and all, each level of equal weight: where objects stand alike, as in Fashion-MNIST, layout
    tells them apart.
    """

    def __init__(self, width: int = 32, pyramid: bool = False):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False), GlobalBatchNorm(width), nn.ReLU(inplace=True)
        )
        blocks, channels = [], width
        for stage_width in (width, 2 * width, 4 * width):
            stride = 1 if stage_width == channels else 2
            shortcut = None
            if stride != 1:
                shortcut = nn.Sequential(
                    nn.Conv2d(channels, stage_width, 1, stride=stride, bias=False), GlobalBatchNorm(stage_width)
                )
            blocks.append(BasicBlock(channels, stage_width, stride, shortcut, norm_layer=GlobalBatchNorm))
            channels = stage_width
        self.blocks = nn.Sequential(*blocks)
        self.output_dim, self.norm = channels, None
        if pyramid:
            weights = torch.cat([torch.full((channels * level**2,), LEVELS[0] / level) for level in LEVELS])
            self.output_dim, self.norm = len(weights), GlobalBatchNorm(len(weights))
            with torch.no_grad():
                self.norm.weight.copy_(weights)

    def forward(self, x: Tensor) -> Tensor:
        maps = cast(Tensor, self.blocks(self.stem(x)))
        if self.norm is None:
            return maps.mean(dim=(2, 3))
        return cast(Tensor, self.norm(_pyramid(maps)))


def _pyramid(maps: Tensor) -> Tensor:
    """Means of (B, C, H, W) at each level's places, (B, sum of C level^2).

    By one product with what adaptive pooling makes of an identity: on a CPU its backward took a tenth of a step.
    """
    height, width = maps.shape[2:]
    identity = torch.eye(height * width, device=maps.device, dtype=maps.dtype).view(1, -1, height, width)
    weights = torch.cat([F.adaptive_avg_pool2d(identity, level)[0].flatten(1) for level in LEVELS], dim=1)
    levels = torch.matmul(maps.flatten(2), weights).split([level**2 for level in LEVELS], dim=2)
    return torch.cat([level.flatten(1) for level in levels], dim=1)


def build_encoder(name: str, image_size: int = 224, drop_path_rate: float = 0.0) -> nn.Module:
    """An untrained encoder, pixels (B, 3, S, S) -> h (B, D), with D in its attribute `output_dim`.

    ResNets and ViTs are torchvision's, parameter names included, without their classifier; batch norm is global.
    `_small` replaces the ResNet's stem by one 3x3 convolution (SimCLR, Chen et al. 2020, appendix B.9).
    `timm/NAME` is timm's model of that name. `image_size` matters where there are position embeddings, which are
    resampled for other sizes; `drop_path_rate` is of timm's models only. Raises UserError for another name.
    """
    check_encoder(name)
    if name.startswith(TIMM):
        return build_timm(name.removeprefix(TIMM), image_size, drop_path_rate)
    match name.removesuffix("_small"):
        case "resnet_tiny" if name == "resnet_tiny":
            return ResNetTiny()
        case "resnet_tiny_pyramid" if name == "resnet_tiny_pyramid":
            return ResNetTiny(pyramid=True)
        case ("resnet18" | "resnet34" | "resnet50" | "resnet101") as base:
            return _resnet(base, small_stem=name.endswith("_small"))
        case "vit_s_16" if name == "vit_s_16":
            return _vit(image_size, num_heads=6, hidden_dim=384)
        case "vit_b_16" if name == "vit_b_16":
            return _vit(image_size, num_heads=12, hidden_dim=768)
        case _:
            raise AssertionError(f"one of {ENCODERS} is not built: {name}")


def check_image_size(encoder: nn.Module, side: int, key: str) -> None:
    """Raises UserError, naming the config's key, where the encoder does not take images of this side."""
    if isinstance(encoder, VisionTransformer):
        check_divides(encoder.patch_size, side, key)
    elif is_timms(encoder):
        check_side(encoder, side, key)


def _resnet(name: str, small_stem: bool) -> ResNet:
    # zero_init_residual: Goyal et al. 2017, section 5.1, as in SimCLR.
    encoder = ResNet(*_RESNETS[name], norm_layer=GlobalBatchNorm, zero_init_residual=True)
    encoder.output_dim, encoder.fc = encoder.fc.in_features, nn.Identity()
    if small_stem:
        encoder.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
        encoder.maxpool = nn.Identity()
    return encoder


def _vit(image_size: int, num_heads: int, hidden_dim: int) -> VisionTransformer:
    check_divides(16, image_size, "augment.crop_size")
    encoder = VisionTransformer(
        image_size=image_size,
        patch_size=16,
        num_layers=12,
        num_heads=num_heads,
        hidden_dim=hidden_dim,
        mlp_dim=4 * hidden_dim,
    )
    encoder.heads = nn.Identity()
    encoder.output_dim = hidden_dim
    return encoder
