"""The colour kernels: their arithmetic in Triton's interpreter, their compilation for GPUs, and on a GPU itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dist_ssl.augment import augment, views
from dist_ssl.augment import parameters as A
from dist_ssl.config import AugmentConfig
from dist_ssl.data.stream import draw_views
from dist_ssl.objective.contrastive import HAS_TRITON
from tests.test_augment import photographs
from tests.test_nt_xent_triton import assembled, fresh_process

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="this build of torch came without Triton")
HAS_CUDA = torch.cuda.is_available()
SIZE = 33  # which no tile divides
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def differences(size: int, dtype: str, device: str = "cpu") -> tuple[float, float, bool]:
    """`augment` by the kernels: against the CPU's, in parts of a pixel's range; against two rows alone; its format.

    Every order of jitter, and rows without; flip, grey, blur and solarisation as drawn.
    """
    config, n = AugmentConfig(crop_size=size, solarise_probability=0.3), 14
    crops, (drawn, _) = photographs(n, size), draw_views(3, np.zeros(n, np.int64), np.arange(n), config)
    drawn.flatten(0, 1)[:, A.ORDER] = torch.arange(2 * n) % 24
    drawn[5, 1, A.BLUR] = 1
    drawn.flatten(0, 1)[:, A.JITTER] = (torch.arange(2 * n) < 24).float()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(views, "_has_kernels", lambda _: False)
        wanted = augment(crops, drawn, config)
        patch.setattr(views, "_has_kernels", lambda _: True)
        found = augment(crops.to(device), drawn, config, DTYPES[dtype])
        again = augment(crops[5:6].to(device), drawn[5:6], config, DTYPES[dtype])
    assert found.dtype == DTYPES[dtype]
    channels_last = found.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    found, again = found.cpu().float(), again.cpu().float()
    std = torch.tensor(config.std).view(3, 1, 1)
    return float(((found - wanted) * std).abs().max()), float((found[5] - again[0]).abs().max()), channels_last


def in_the_interpreter() -> list[tuple[float, float, bool]]:
    return [differences(SIZE, "float32"), differences(21, "bfloat16"), differences(12, "float32")]


def compiled() -> list[dict[str, int]]:
    """All kernels compiled to machine code for Ampere and Hopper."""
    from dist_ssl.augment import cuda as kernels

    facts = []
    types = {"crops": "*u8", "table": "*fp32", "sums": "*i64", "views": "*bf16", "planes": "*fp32"}
    types |= {"S": "i32", "radius": "i32"}
    columns, rows = {"ALONG_ROWS": False}, {"ALONG_ROWS": True}
    for capability in (80, 90):
        for kernel, form, out in [
            (kernels._luma_sums, {}, ""),
            (kernels._colours, {"TILES": 64}, ""),
            (kernels._blur, rows, "*fp32"),
            (kernels._blur, columns, "*bf16"),
        ]:
            constants = form | {"BLOCK": kernels.BLOCK}
            signature = {a: "constexpr" if a in constants else types.get(a, "fp32") for a in kernel.arg_names}
            if out:
                signature["out"] = out
            fact, _ = assembled(kernel, signature, constants, capability)
            facts.append({"kernel": kernel.fn.__name__, "capability": capability} | fact)
    return facts


@pytest.mark.slow
def test_colours_in_the_interpreter() -> None:
    whole, rounded, unblurred = fresh_process("in_the_interpreter", "tests.test_augment_triton", TRITON_INTERPRET="1")
    assert whole[0] <= 1e-5
    assert unblurred[0] <= 1e-5
    assert rounded[0] <= 2**-6 * 0.23  # bf16's last bit of values from 2 to 4, the standard deviation
    assert all(from_alone == 0 and channels_last for _, from_alone, channels_last in (whole, rounded, unblurred))


@pytest.mark.slow
def test_kernels_compile_without_spills() -> None:
    for fact in fresh_process("compiled", "tests.test_augment_triton", TRITON_INTERPRET="0"):
        print(fact)
        assert fact["spilled"] == 0, fact
        assert fact["registers"] <= 128, fact


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")
@pytest.mark.parametrize("size", [32, SIZE, 224])
def test_colours_on_a_gpu(size: int) -> None:
    from_cpu, from_alone, channels_last = differences(size, "float32", "cuda")
    assert from_cpu <= 1 / 255
    assert from_alone == 0
    assert channels_last
