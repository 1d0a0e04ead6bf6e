"""Encoders f: pixels -> h, the projection head g: h -> z, and the two together.

Legend: B rows (views), S side of a view, D width of h, d width of z.
"""

from __future__ import annotations

import contextlib
from typing import Any, cast

import torch
import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.models.vision_transformer import EncoderBlock, VisionTransformer

from dist_ssl.config import Config, HeadConfig, UserError
from dist_ssl.distributed import GlobalBatchNorm, frozen_running_statistics

_RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101")
ENCODERS = ("resnet_tiny", *_RESNETS, *(f"{name}_small" for name in _RESNETS), "vit_s_16", "vit_b_16")


class ResNetTiny(nn.Module):
    """Three stages of torchvision's basic blocks, 32 to 128 channels, for images of 32 to 64 pixels on a CPU."""

    def __init__(self, width: int = 32):
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
        self.output_dim = channels

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.blocks(self.stem(x)).mean(dim=(2, 3)))


def build_encoder(name: str, image_size: int = 224) -> nn.Module:
    """An untrained encoder, pixels (B, 3, S, S) -> h (B, D), with D in its attribute `output_dim`.

    ResNets and ViTs are torchvision's, parameter names included, without their classifier; batch norm is global.
    `_small` replaces the ResNet's stem by one 3x3 convolution (SimCLR, Chen et al. 2020, appendix B.9).
    `image_size` matters to ViTs only. Raises UserError for another name.
    """
    match name.removesuffix("_small"):
        case "resnet_tiny" if name == "resnet_tiny":
            return ResNetTiny()
        case ("resnet18" | "resnet34" | "resnet50" | "resnet101") as base:
            return _resnet(base, small_stem=name.endswith("_small"))
        case "vit_s_16" if name == "vit_s_16":
            return _vit(image_size, num_heads=6, hidden_dim=384)
        case "vit_b_16" if name == "vit_b_16":
            return _vit(image_size, num_heads=12, hidden_dim=768)
        case _:
            raise UserError(f"model.encoder: expected one of {', '.join(ENCODERS)}; got {name!r}")


def _resnet(name: str, small_stem: bool) -> ResNet:
    # zero_init_residual: Goyal et al. 2017, section 5.1, as in SimCLR.
    encoder = getattr(torchvision.models, name)(norm_layer=GlobalBatchNorm, zero_init_residual=True)
    encoder.output_dim, encoder.fc = encoder.fc.in_features, nn.Identity()
    if small_stem:
        encoder.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
        encoder.maxpool = nn.Identity()
    return cast(ResNet, encoder)


def _vit(image_size: int, num_heads: int, hidden_dim: int) -> VisionTransformer:
    if image_size % 16:
        raise UserError(f"augment.crop_size: expected a multiple of the ViT's patch, 16; got {image_size}")
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


class ProjectionHead(nn.Module):
    """g: h (B, D) -> z (B, d): nothing, one linear layer, or an MLP of `num_layers` linear layers.

    With `batch_norm` every linear layer, the last one too, is without bias and followed by batch norm, as in SimCLR's
    published code (Chen et al. 2020); ReLU between layers.
    """

    def __init__(self, input_dim: int, config: HeadConfig):
        super().__init__()
        match config.kind:
            case "none":
                dims = []
            case "linear":
                dims = [config.output_dim]
            case "mlp":
                dims = [config.hidden_dim] * (config.num_layers - 1) + [config.output_dim]
        self.output_dim = dims[-1] if dims else input_dim
        layers = []
        for depth, dim in enumerate(dims):
            layer = nn.Sequential(nn.Linear(input_dim, dim, bias=not config.batch_norm))
            if config.batch_norm:
                layer.append(GlobalBatchNorm(dim))
            if depth < len(dims) - 1:
                layer.append(nn.ReLU(inplace=True))
            layers.append(layer)
            input_dim = dim
        self.stack = nn.ModuleList(layers)

    def layers(self, h: Tensor) -> list[tuple[str, Tensor]]:
        """(name, output) of each layer: "g1", "g2", ... after their ReLU, and the last, named "z"."""
        outputs, names = [h], [f"g{i + 1}" for i in range(len(self.stack) - 1)] + ["z"]
        for layer in self.stack:
            outputs.append(layer(outputs[-1]))
        return list(zip(names, outputs[1:] or outputs, strict=True))

    def forward(self, h: Tensor) -> Tensor:
        for layer in self.stack:
            h = layer(h)
        return h


class ContrastiveModel(nn.Module):
    """Pixels (B, 3, S, S) -> h (B, D), z (B, d). Collective in training mode where there is batch norm."""

    def __init__(self, encoder: nn.Module, head: ProjectionHead):
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.widths = {"h": cast(int, encoder.output_dim), "z": head.output_dim}

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.encoder(x)
        return h, self.head(h)


def build_model(config: Config) -> ContrastiveModel:
    """The model that a config describes, its weights a function of `run.seed` alone; the global generator is kept."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        encoder = build_encoder(config.model.encoder, config.augment.crop_size)
        head = ProjectionHead(cast(int, encoder.output_dim), config.model.head)
    if config.model.activation_checkpointing:
        for block in encoder.modules():
            if isinstance(block, BasicBlock | Bottleneck | EncoderBlock):
                _recompute_in_backward(block)
    return ContrastiveModel(encoder, head)


def _recompute_in_backward(block: nn.Module) -> None:
    """Keep only the block's input for backward (Chen et al. 2016); parameter names stay as they are."""
    forward = block.forward

    def checkpointed(*inputs: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return cast(Tensor, forward(*inputs))
        return cast(Tensor, checkpoint(forward, *inputs, use_reentrant=False, context_fn=_contexts))

    block.forward = checkpointed


def _contexts() -> tuple[Any, Any]:
    # The recomputation must not count its batch in the running statistics a second time.
    return contextlib.nullcontext(), frozen_running_statistics()
