"""Encoder and head together: pixels -> h, z; and how blocks are computed again in backward to save memory."""

from __future__ import annotations

import contextlib
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.vision_transformer import EncoderBlock

from dist_ssl.config import Config
from dist_ssl.models.batch_norm import GlobalBatchNorm, counted_at_once, frozen_running_statistics
from dist_ssl.models.encoders import build_encoder
from dist_ssl.models.head import ProjectionHead


class ContrastiveModel(nn.Module):
    """Pixels (B, 3, S, S) -> h (B, D), z (B, d). Collective in training mode where there is batch norm."""

    def __init__(self, encoder: nn.Module, head: ProjectionHead):
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.widths = {"h": cast(int, encoder.output_dim), "z": head.output_dim}
        self._batch_norms = [module for module in self.modules() if isinstance(module, GlobalBatchNorm)]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with counted_at_once(self._batch_norms):
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
