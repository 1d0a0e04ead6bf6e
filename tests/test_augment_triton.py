"""The colour kernels: their arithmetic in Triton's interpreter, their compilation for GPUs, and on a GPU itself."""

from __future__ import annotations

import re
import subprocess
import tempfile

import numpy as np
import pytest
import torch

from dist_ssl.augment import augment, views
from dist_ssl.augment import parameters as A
from dist_ssl.config import AugmentConfig
from dist_ssl.data.stream import draw_views
from dist_ssl.objective.contrastive import HAS_TRITON
from tests.test_augment import photographs
from tests.test_nt_xent_triton import fresh_process

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="this build of torch came without Triton")
HAS_CUDA = torch.cuda.is_available()
SIZE = 33  # which no tile divides


def differences(size: int, device: str = "cpu") -> tuple[float, float]:
    """`augment` by the kernels against the CPU's, in parts of a pixel's range, and against two rows of it alone.

    Every order of jitter, and rows without; flip, grey and blur as drawn.
    """
    config, n = AugmentConfig(crop_size=size), 14
    crops, (drawn, _) = photographs(n, size), draw_views(3, np.zeros(n, np.int64), np.arange(n), config)
    drawn.flatten(0, 1)[:, A.ORDER] = torch.arange(2 * n) % 24
    drawn[5, :, A.BLUR] = 0  # products of matrices may be summed otherwise in another batch
    drawn.flatten(0, 1)[:, A.JITTER] = (torch.arange(2 * n) < 24).float()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(views, "_has_kernels", lambda _: False)
        wanted = augment(crops, drawn, config)
        patch.setattr(views, "_has_kernels", lambda _: True)
        found = augment(crops.to(device), drawn, config).cpu()
        again = augment(crops[5:6].to(device), drawn[5:6], config).cpu()
    std = torch.tensor(config.std).view(3, 1, 1)
    return float(((found - wanted) * std).abs().max()), float((found[5] - again[0]).abs().max())


def in_the_interpreter() -> tuple[float, float]:
    return differences(SIZE)


def compiled() -> list[dict[str, int]]:
    """Both kernels compiled to machine code for Ampere and Hopper."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dist_ssl.augment import cuda as kernels

    facts = []
    pointers = {"crops": "*u8", "table": "*fp32", "sums": "*i64", "means": "*fp32", "views": "*fp32", "S": "i32"}
    for capability in (80, 90):
        for kernel in (kernels._luma_sums, kernels._colours):
            signature = {name: pointers.get(name, "fp32") for name in kernel.arg_names} | {"BLOCK": "constexpr"}
            source = ASTSource(fn=kernel, signature=signature, constexprs={"BLOCK": kernels.BLOCK})
            binary = triton.compile(source, target=GPUTarget("cuda", capability, 32))
            with tempfile.NamedTemporaryFile("w", suffix=".ptx") as ptx:
                ptx.write(binary.asm["ptx"])
                ptx.flush()
                gpu = f"--gpu-name=sm_{capability}{'a' * (capability == 90)}"
                command = [triton.knobs.nvidia.ptxas.path, "-v", gpu, ptx.name, "-o", "/dev/null"]
                said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
            facts.append({"spilled": int(re.search(r"(\d+) bytes spill stores", said)[1])})  # type: ignore[index]
    return facts


def test_colours_in_the_interpreter() -> None:
    from_cpu, from_alone = fresh_process("in_the_interpreter", "tests.test_augment_triton", TRITON_INTERPRET="1")
    assert from_cpu <= 1e-5
    assert from_alone == 0


@pytest.mark.slow
def test_kernels_compile_without_spills() -> None:
    facts = fresh_process("compiled", "tests.test_augment_triton", TRITON_INTERPRET="0")
    assert [fact["spilled"] for fact in facts] == [0, 0, 0, 0]


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")
@pytest.mark.parametrize("size", [32, SIZE, 224])
def test_colours_on_a_gpu(size: int) -> None:
    from_cpu, from_alone = differences(size, "cuda")
    assert from_cpu <= 1 / 255
    assert from_alone == 0
