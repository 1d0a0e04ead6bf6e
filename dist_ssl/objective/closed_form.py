"""A loss whose gradient is computed beside its value, in forward: backward multiplies, and sends nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
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


@contextlib.contextmanager
def exact_products(device_type: str) -> Iterator[None]:
    """In here products of fp32 are fp32's: neither autocast's nor TF32's, which a bf16 run allows the model."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


class _Scalar(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, compute: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> Tensor:
        with exact_products(inputs[0].device.type):
            loss, *gradients = compute(*inputs)
        ctx.save_for_backward(*gradients)
        ctx.dtype = inputs[0].dtype
        return loss.to(wide(ctx.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *((gradient * gradients[0]).to(ctx.dtype) for gradient in ctx.saved_tensors)
