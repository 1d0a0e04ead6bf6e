"""A loss whose gradient is computed beside its value, in forward: backward multiplies, and sends nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def scalar(compute: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> Tensor:
    """The loss that compute(*inputs) returns first; what it returns after it are the gradients, one an input.

    Autocast does not reach inside, nor TF32: products of fp32 are fp32's.
    """
    loss: Tensor = _Scalar.apply(compute, *inputs)
    return loss


def wide(dtype: torch.dtype) -> torch.dtype:
    """What a loss of inputs of this dtype is computed in: fp32 at least."""
    return torch.promote_types(dtype, torch.float32)


class _Scalar(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, compute: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> Tensor:
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            with torch.autocast(inputs[0].device.type, enabled=False):
                loss, *gradients = compute(*inputs)
        finally:
            torch.set_float32_matmul_precision(precision)
        ctx.save_for_backward(*gradients)
        ctx.dtype = inputs[0].dtype
        return loss.to(wide(ctx.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *((gradient * gradients[0]).to(ctx.dtype) for gradient in ctx.saved_tensors)
