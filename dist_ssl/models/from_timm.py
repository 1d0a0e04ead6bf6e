"""Encoders of timm, an extra: any model that it builds, without classifier, with batch norm over the global batch.

Nothing is downloaded: weights are drawn by the seed, or come by `model.init`. A module of timm's whose work differs
over ranks is given another class in place, so that parameter names, weights and options stay timm's own.

Legend: B rows (views), S side of a view, D width of h.
"""

from __future__ import annotations

import logging
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from dist_ssl.config import TIMM, UserError, check_encoder
from dist_ssl.models.batch_norm import GlobalBatchNorm
from dist_ssl.models.drop_path import DropPath


def build_timm(name: str, image_size: int, drop_path_rate: float = 0.0) -> nn.Module:
    """The model that timm calls `name`, untrained, pixels (B, 3, S, S) -> h (B, D), with D in `output_dim`.

    Raises UserError where timm is not installed, has no such model, or where it can't be what an encoder is here.
    """
    check_encoder(TIMM + name)
    # Options that models without position embeddings or windows don't have; the last two are for other sizes.
    options: dict[str, Any] = {"img_size": image_size, "dynamic_img_size": True, "strict_img_size": False}
    if drop_path_rate:
        options["drop_path_rate"] = drop_path_rate
    encoder, options = _created(name, options)
    _make_global(encoder, name)
    encoder.timm_name, encoder.timm_options, encoder.known_sides = name, options, set()
    check_side(encoder, image_size, "augment.crop_size")
    encoder.register_forward_pre_hook(_check_images)
    return encoder


def is_timms(encoder: nn.Module) -> bool:
    return hasattr(encoder, "timm_name")


def check_side(encoder: Any, side: int, key: str) -> None:
    """Try images of a side, on fake tensors, and set `output_dim`. Raises UserError, naming the config's key."""
    if side in encoder.known_sides:
        return
    modes, device = [(module, module.training) for module in encoder.modules()], next(encoder.parameters()).device
    encoder.eval()
    told = logging.getLogger("torch._subclasses.fake_tensor")
    was_disabled, told.disabled = told.disabled, True  # of a shape that does not fit it would log a page
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            h = encoder.forward(torch.zeros(2, 3, side, side, device=device))
    except Exception as error:  # of many kinds: timm asserts, torch complains of shapes
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"{key}: {TIMM}{encoder.timm_name} does not take images of {side} x {side} pixels: {reason[:200]}; "
            "take another size, or another encoder"
        ) from None
    finally:
        told.disabled = was_disabled
        encoder.train()  # which also empties what some models keep for evaluation
        for module, training in modes:
            module.training = training
    if not isinstance(h, Tensor) or h.dim() != 2:
        raise UserError(f"model.encoder: {TIMM}{encoder.timm_name} gives no (B, D) vectors; take another one")
    encoder.output_dim = h.shape[1]  # num_features is another number where a layer follows the pooling
    encoder.known_sides.add(side)


def recompute(encoder: Any) -> None:
    """Keep activations of few places for backward, by timm's own choice. Raises UserError where it has none."""
    try:
        encoder.set_grad_checkpointing(True)
    except (AssertionError, AttributeError):
        raise UserError(
            f"model.activation_checkpointing: {TIMM}{encoder.timm_name} has none; leave the key out"
        ) from None


def _check_images(encoder: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    check_side(encoder, inputs[0].shape[-1], "evaluation.image_size")


def _created(name: str, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(timm's model, the options that it takes)."""
    import timm

    try:
        return timm.create_model(name, pretrained=False, num_classes=0, **options), options
    except TypeError as error:  # before anything is drawn
        unknown = [key for key in options if f"'{key}'" in str(error)]
        if not unknown:
            raise UserError(f"model.encoder: timm does not build {TIMM}{name} without classifier: {error}") from None
        if "drop_path_rate" in unknown:
            raise UserError(f"model.drop_path_rate: {TIMM}{name} has none; leave the key out") from None
        return _created(name, {key: value for key, value in options.items() if key not in unknown})
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UserError(f"model.encoder: timm does not build {TIMM}{name} for {options}: {error}") from None


class _BatchNorm1d(GlobalBatchNorm):
    """Of (B, C), or (B, C, L)."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) if x.dim() == 2 else super().forward(x.unsqueeze(-1)).squeeze(-1)


class _BatchNormAct2d(GlobalBatchNorm):
    """timm's batch norm with what follows it: something that drops, and an activation."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        if type(self.act) is nn.ReLU and type(self.drop) is nn.Identity:
            return super().forward(x, relu=True)  # on a GPU in the same pass
        return cast(Tensor, self.act(self.drop(super().forward(x))))


def _make_global(encoder: nn.Module, name: str) -> None:
    """Batch norm and stochastic depth of the global batch, in place.

    Raises UserError for a norm over the batch that has no counterpart over the global one.
    """
    from timm import layers

    paths: list[Any] = [module for module in encoder.modules() if type(module) is layers.DropPath]
    for number, path in enumerate(paths):
        path.__class__, path.layer = DropPath, number
    counterparts = {
        nn.BatchNorm1d: _BatchNorm1d,
        nn.BatchNorm2d: GlobalBatchNorm,
        layers.BatchNormAct2d: _BatchNormAct2d,
    }
    for module in encoder.modules():
        kind = type(module)
        if kind in counterparts:
            module.__class__ = counterparts[kind]
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) or kind.__name__.startswith("EvoNorm2dB"):
            raise UserError(
                f"model.encoder: {TIMM}{name} has {kind.__name__}, whose statistics would be of one rank's rows; "
                "take another encoder"
            )
