"""The projection head g: h -> z, whose every layer can be read.

Legend: B rows (views), D width of h, d width of z.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dist_ssl.config import OF_AN_MLP, HeadConfig, UserError
from dist_ssl.models.batch_norm import GlobalBatchNorm


class ProjectionHead(nn.Module):
    """g: h (B, D) -> z (B, d), of one of the kinds that `config.HEADS` tells of.

    With `batch_norm` every linear layer of an MLP is without bias and followed by batch norm, the last one too, as in
    SimCLR's published code (Chen et al. 2020), unless `last_batch_norm` is false. `backwards_per_step` shares what `l1`
    adds to the gradient between GradCache's chunks. Raises UserError where `direct` asks for more than h has.
    """

    def __init__(self, input_dim: int, config: HeadConfig, backwards_per_step: int = 1):
        super().__init__()
        self.shortcut = config.kind == "shortcut"
        l1 = config.l1 / backwards_per_step
        layers: Sequence[nn.Module]
        match config.kind:
            case "none":
                layers, dim = [], input_dim
            case "direct":
                layers, dim = [First(input_dim, config.output_dim)], config.output_dim
            case "fixed_reweight":
                layers, dim = [FixedReweighting(input_dim, config.kappa)], input_dim
            case "sae":
                layers, dim = _sparse_autoencoder(input_dim, config, l1), config.output_dim
            case _:
                layers, dim = _linear_layers(input_dim, config, l1), config.output_dim
        self.output_dim = dim + (input_dim if self.shortcut else 0)
        self.stack = nn.ModuleList(layers)

    def layers(self, h: Tensor) -> list[tuple[str, Tensor]]:
        """(name, output) of each layer: "g1", "g2", ... after their activation, and the last, named "z".

        Of a shortcut the MLP's own output is the last "g", and z is h and that.
        """
        outputs = [h]
        for layer in self.stack:
            outputs.append(layer(outputs[-1]))
        if self.shortcut:
            outputs.append(_joined(h, outputs[-1]))
        read = outputs[1:] or outputs
        return list(zip([*(f"g{i + 1}" for i in range(len(read) - 1)), "z"], read, strict=True))

    def forward(self, h: Tensor) -> Tensor:
        z = h
        for layer in self.stack:
            z = layer(z)
        return _joined(h, z) if self.shortcut else z


def _linear_layers(input_dim: int, config: HeadConfig, l1: float) -> list[nn.Sequential]:
    hidden = [config.hidden_dim] * (config.num_layers - 1) if config.kind in OF_AN_MLP else []
    layers, last = [], len(hidden)
    for depth, dim in enumerate([*hidden, config.output_dim]):
        batch_norm = config.batch_norm and (config.last_batch_norm or depth < last)
        layer = nn.Sequential(_linear(input_dim, dim, not batch_norm, l1 if depth == last else 0.0))
        if batch_norm:
            layer.append(GlobalBatchNorm(dim))
        if depth < last:
            layer.append(_activation(config.activation))
        elif config.kind == "discrete":
            layer.append(Rounding(config.levels))
        layers.append(layer)
        input_dim = dim
    return layers


def _sparse_autoencoder(input_dim: int, config: HeadConfig, l1: float) -> list[nn.Sequential]:
    """Encoder and decoder of Ouyang et al.'s published code, trained by the loss alone, as there.

    Its "pre-bias", which is subtracted from h and added to z, is no freedom beside the biases of two linear layers.
    """
    code = nn.Sequential(nn.Linear(input_dim, config.latent_dim), nn.ReLU(inplace=True), TopK(config.top_k))
    return [code, nn.Sequential(_linear(config.latent_dim, config.output_dim, True, l1))]


def _linear(input_dim: int, dim: int, bias: bool, l1: float) -> nn.Linear:
    return SparseLinear(input_dim, dim, bias, l1) if l1 else nn.Linear(input_dim, dim, bias=bias)


def _activation(name: str) -> nn.Module:
    match name:
        case "silu":
            return nn.SiLU(inplace=True)
        case "tanh":
            return nn.Tanh()
    return nn.ReLU(inplace=True)


def _joined(h: Tensor, z: Tensor) -> Tensor:
    """(B, D), (B, d) -> (B, D + d): a cosine of two rows is the mean of h's and z's; a number's mean square is 1."""
    length = ((h.shape[1] + z.shape[1]) / 2) ** 0.5
    return torch.cat([F.normalize(part, dim=1) * length for part in (h, z)], dim=1)


class First(nn.Module):
    """(B, D) -> (B, d0), the first numbers of each row."""

    def __init__(self, input_dim: int, output_dim: int):
        super().__init__()
        if output_dim > input_dim:
            raise UserError(
                f"model.head.output_dim: expected at most {input_dim}, h's width, for kind 'direct', got {output_dim}"
            )
        self.output_dim = output_dim

    def forward(self, h: Tensor) -> Tensor:
        return h[:, : self.output_dim].contiguous()


class FixedReweighting(nn.Module):
    """(B, D) -> (B, D), number i divided by kappa^i."""

    weights: Tensor

    def __init__(self, input_dim: int, kappa: float):
        super().__init__()
        powers = [math.exp(-i * math.log(kappa)) for i in range(input_dim)]
        self.register_buffer("weights", torch.tensor(powers), persistent=False)

    def forward(self, h: Tensor) -> Tensor:
        return h * self.weights


class TopK(nn.Module):
    """(B, L) -> (B, L), all but the k largest of a row 0; of equal ones more may stay."""

    def __init__(self, k: int):
        super().__init__()
        self.k = k

    def forward(self, code: Tensor) -> Tensor:
        return code * (code >= code.topk(self.k, dim=1).values[:, -1:])


class Rounding(nn.Module):
    """tanh, then the nearest of `levels` values from -1 to 1 (as FSQ does, Mentzer et al. 2024), each number alone.

    The gradient is that of tanh (straight through).
    """

    def __init__(self, levels: int):
        super().__init__()
        self.levels = levels

    def forward(self, x: Tensor) -> Tensor:
        bounded, steps = x.tanh(), self.levels - 1
        rounded = ((bounded.detach() + 1) * (steps / 2)).round() * (2 / steps) - 1
        return bounded + (rounded - bounded).detach()


class SparseLinear(nn.Linear):
    """A linear layer whose weights have l1 * sign(weight) added to their gradient: that of l1 * sum |weight|.

    The same on every rank, so the mean over ranks is exact and nothing is sent. Like a weight decay, it is no part of
    the loss that is shown.
    """

    def __init__(self, input_dim: int, output_dim: int, bias: bool, l1: float):
        super().__init__(input_dim, output_dim, bias=bias)
        self.l1 = l1

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return cast(Tensor, _Shrinking.apply(y, self.weight, self.l1)) if self.weight.requires_grad else y


class _Shrinking(torch.autograd.Function):
    """y -> y, and l1 * sign(weight) for the weight; its signs are kept, since ZeRO 3 takes the weight away."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, weight: Tensor, l1: float) -> Tensor:
        ctx.l1 = l1
        ctx.save_for_backward(weight.sign())
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        (signs,) = ctx.saved_tensors
        return gradient, ctx.l1 * signs, None
