"""LARS that is right under every ZeRO stage, AdamW, parameter groups, and the learning rate as a function of the step.

Under ZeRO the optimizer is handed one flat partition a group instead of the parameters; `Segment`s, which
`partition.py` reads off the engine, tell LARS which range of a flat tensor belongs to which parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_ssl.config import Config, OptimizerConfig
from dist_ssl.distributed import on_gpu


@dataclass(frozen=True)
class Segment:
    """Elements [start, start + length) of a tensor that the optimizer holds belong to parameter number `layer`."""

    layer: int
    start: int
    length: int


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017) with momentum over the scaled step, as SimCLR uses it.

    Groups with `adapt = False` (biases, norms) take plain momentum SGD. Until `attach` is called each tensor is taken
    for a whole parameter. Where `found_inf`, a scalar on the device, is 1, a step changes nothing, and the host does
    not hear of it. `step` is collective after `attach(..., partitioned=True)`: one all-reduce of two numbers a layer.
    """

    def __init__(
        self,
        parameters: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
    ):
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "adapt": True,
        }
        super().__init__(parameters, defaults)
        self.found_inf: Tensor | None = None  # torch's fused optimizers' name for it
        self._segments: dict[Tensor, list[Segment]] = {}
        self._layers: dict[tuple[int, ...], Tensor] = {}  # numbers of layers, on the device
        self._num_layers = 0
        self._partitioned = False

    def attach(self, segments: dict[Tensor, list[Segment]], num_layers: int, partitioned: bool) -> None:
        """Say which ranges of the tensors are which of `num_layers` parameters, and whether other ranks hold parts."""
        self._segments, self._num_layers, self._partitioned = segments, num_layers, partitioned

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            tensors = [p for p in group["params"] if p.grad is not None]
            # DeepSpeed steps one group at a time and empties the others: then all ranks skip the empty one.
            if not group["params"]:
                continue
            decay, momentum = group["weight_decay"], group["momentum"]
            if not tensors:
                if group["adapt"]:
                    self._scale_by_trust([], [], group)  # the others wait for this rank's norms
                continue
            # All tensors at once: on a GPU a launch a tensor would cost more than what it computes.
            updates = torch._foreach_add([p.grad.to(p.dtype) for p in tensors], tensors, alpha=decay)
            if self.found_inf is not None:
                momentum = momentum + (1 - momentum) * self.found_inf
                for update in updates:
                    update.masked_fill_(self.found_inf > 0, 0.0)
            if group["adapt"]:
                self._scale_by_trust(tensors, updates, group)
            for tensor in tensors:
                if "momentum_buffer" not in self.state[tensor]:
                    self.state[tensor]["momentum_buffer"] = torch.zeros_like(tensor)
            buffers = [self.state[tensor]["momentum_buffer"] for tensor in tensors]
            torch._foreach_mul_(buffers, momentum)
            torch._foreach_add_(buffers, updates, alpha=group["lr"])
            applied = buffers if self.found_inf is None else torch._foreach_mul(buffers, 1 - self.found_inf)
            torch._foreach_sub_(tensors, applied)

    def _scale_by_trust(self, tensors: Sequence[Tensor], updates: Sequence[Tensor], group: dict[str, Any]) -> None:
        """Multiply each layer's update by the coefficient * |w| / |update|, norms over the whole layer on all ranks."""
        segments = [
            (self._segments.get(tensor) or [Segment(number, 0, tensor.numel())])
            for number, tensor in enumerate(tensors)
        ]
        num_layers = max(self._num_layers, len(tensors))
        pieces = [
            (
                segment.layer,
                tensor.view(-1)[segment.start :][: segment.length],
                update.view(-1)[segment.start :][: segment.length],
            )
            for tensor, update, held in zip(tensors, updates, segments, strict=True)
            for segment in held
        ]
        if not pieces and not self._partitioned:
            return
        device = group["params"][0].device
        squares = torch.zeros(2, num_layers, dtype=torch.float64, device=device)
        if pieces:
            numbers = tuple(layer for layer, _, _ in pieces)
            if numbers not in self._layers:
                self._layers[numbers] = torch.tensor(numbers, device=device)
            layers = self._layers[numbers]
            for row, values in enumerate(zip(*((w, u) for _, w, u in pieces), strict=True)):
                norms = torch.stack(torch._foreach_norm(list(values))).double()
                squares[row].index_add_(0, layers, norms.square())
        if self._partitioned:
            dist.all_reduce(squares)
        weight_norm, update_norm = squares.sqrt()
        scaled = group["trust_coefficient"] * weight_norm / update_norm
        trust = torch.where((weight_norm > 0) & (update_norm > 0), scaled, 1.0)
        scales = trust.to(torch.float32).unbind()
        for layer, _, update in pieces:
            update.mul_(scales[layer])


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices and kernels with decay and adaptation; with neither what has one dimension (biases, norms, scales), and
    what a module names in `no_weight_decay()` (tokens, position embeddings)."""
    named = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in getattr(module, "no_weight_decay", set)()
    }
    plain: list[nn.Parameter] = []
    adapted: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (plain if parameter.ndim <= 1 or name in named else adapted).append(parameter)
    groups = [
        {"params": adapted, "weight_decay": weight_decay, "adapt": True},
        {"params": plain, "weight_decay": 0.0, "adapt": False},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer; its learning rate is set before each step from `learning_rate`."""
    groups = parameter_groups(model, config.weight_decay)
    if config.name == "lars":
        return LARS(groups, lr=0.0, momentum=config.momentum, trust_coefficient=config.trust_coefficient)
    fused = on_gpu(next(model.parameters()))
    return torch.optim.AdamW(groups, lr=0.0, betas=(config.beta1, config.beta2), fused=fused)


def peak_learning_rate(config: Config) -> float:
    """Linear scaling by global batch / 256 (Goyal et al. 2017), or by its square root (SimCLR, appendix B.1)."""
    optimizer, batch = config.optimizer, config.train.global_batch_size
    scale = {"linear": batch / 256, "sqrt": math.sqrt(batch), "none": 1.0}[optimizer.scaling]
    return optimizer.base_learning_rate * scale


def learning_rate(config: Config, step: int, total_steps: int, num_samples: int) -> float:
    """The rate of the step that follows `step` completed ones: linear warm-up, then cosine to zero or constant."""
    peak = peak_learning_rate(config)
    warmup = config.optimizer.warmup_epochs * num_samples / config.train.global_batch_size
    warmup = min(warmup, total_steps / 2)  # a run shorter than its warm-up still reaches its peak
    if step + 1 < warmup:
        return peak * (step + 1) / warmup
    if config.optimizer.schedule == "constant":
        return peak
    progress = min(1.0, (step + 1 - warmup) / max(1.0, total_steps - warmup))
    return peak * 0.5 * (1.0 + math.cos(math.pi * progress))
