"""Encoder, head and predictor together: pixels -> h, z, p; and how blocks are computed again to save memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.vision_transformer import EncoderBlock

from dist_ssl.config import WITH_PREDICTOR, Config, HeadConfig, PredictorConfig
from dist_ssl.models.batch_norm import GlobalBatchNorm, Slices, counted_at_once
from dist_ssl.models.drop_path import DropPath, Rows
from dist_ssl.models.encoders import build_encoder, check_image_size
from dist_ssl.models.from_timm import is_timms, recompute
from dist_ssl.models.head import ProjectionHead


class ContrastiveModel(nn.Module):
    """Views of one size or several -> h (n V, D), z (n V, d), p (n V, d), which is z itself without a predictor.

    The encoder runs once a size, so batch norm's statistics in it are of all views of that size; the head runs on all.
    Collective in training mode where there is batch norm.

    Legend: n images, V views of each, V_s of one size, D width of h, d of z.
    """

    def __init__(
        self,
        encoder: nn.Module,
        head: ProjectionHead,
        views_per_size: Sequence[int],
        predictor: ProjectionHead | None = None,
    ):
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.predictor = predictor
        self.widths = {"h": cast(int, encoder.output_dim), "z": head.output_dim}
        self._views_per_size = tuple(views_per_size)
        self._drop_paths = [module for module in self.modules() if isinstance(module, DropPath)]
        self._batch_norms = [module for module in self.modules() if isinstance(module, GlobalBatchNorm)]

    def of(self, rows: Rows) -> None:
        """Say which images of the global batch the next forward and its backward are of."""
        for path in self._drop_paths:
            path.of(rows)

    def normalise_in(self, slices: Slices | None) -> None:
        """Let batch norm's statistics be those of slices of the batch from now on, or of all of it."""
        for layer in self._batch_norms:
            layer.slices = slices

    def forward(self, *views: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A (n V_s, 3, S, S) tensor a size; rows that come out are ordered by image, then view, as in the config."""
        with counted_at_once(self._batch_norms):
            h = self._by_image([self.encoder(x) for x in views])
            z = self.head(h)
            return h, z, z if self.predictor is None else self.predictor(z)

    def _by_image(self, h_per_size: list[Tensor]) -> Tensor:
        if len(h_per_size) == 1:
            return h_per_size[0]
        parts = [h.unflatten(0, (-1, v)) for h, v in zip(h_per_size, self._views_per_size, strict=True)]
        return torch.cat(parts, dim=1).flatten(0, 1)


def build_model(config: Config) -> ContrastiveModel:
    """The model that a config describes, its weights a function of `run.seed` alone; the global generator is kept."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        encoder = build_encoder(config.model.encoder, config.augment.image_size, config.model.drop_path_rate)
        head = ProjectionHead(cast(int, encoder.output_dim), config.model.head, config.objective.chunks)
        predictor = _build_predictor(config, head.output_dim)
    sizes = config.augment.sizes()
    for side, _ in sizes:
        check_image_size(encoder, side, "augment.crop_size")
    if config.model.activation_checkpointing and is_timms(encoder):
        recompute(encoder)
    elif config.model.activation_checkpointing:
        for block in encoder.modules():
            if isinstance(block, BasicBlock | Bottleneck | EncoderBlock):
                _recompute_in_backward(block)
    return ContrastiveModel(encoder, head, [num_views for _, num_views in sizes], predictor)


def build_teacher(config: Config) -> ContrastiveModel:
    """The momentum encoder of a run at its start: encoder and head with the student's weights, and no predictor.

    Nothing is dropped on its paths.
    """
    model = build_model(config)
    for module in model.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.0
    views_per_size = [num_views for _, num_views in config.augment.sizes()]
    return ContrastiveModel(model.encoder, model.head, views_per_size).requires_grad_(False)


def kept_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that a checkpoint holds; tables that a module makes at its start are no part of it."""
    made = {
        f"{prefix}.{name}" if prefix else name
        for prefix, each in module.named_modules()
        for name in each._non_persistent_buffers_set
    }
    return {name: buffer for name, buffer in module.named_buffers() if name not in made}


def _build_predictor(config: Config, z_dim: int) -> ProjectionHead | None:
    if config.objective.name not in WITH_PREDICTOR:
        return None
    chosen = config.model.predictor or PredictorConfig()
    if chosen.kind == "none":
        return None
    hidden_dim = chosen.hidden_dim or config.model.head.hidden_dim
    return ProjectionHead(z_dim, HeadConfig(**chosen.model_dump() | {"hidden_dim": hidden_dim, "output_dim": z_dim}))


def _recompute_in_backward(block: nn.Module) -> None:
    """Keep only the block's input for backward (Chen et al. 2016); parameter names stay as they are.

    Batch norm sees by itself that it is computed again, and counts its batch once. A deep copy of the block, unlike one
    of a closure, has its own forward in it.
    """
    block.forward = partial(_checkpointed, block.forward)


def _checkpointed(forward: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(*inputs)
    return checkpoint(forward, *inputs, use_reentrant=False)
