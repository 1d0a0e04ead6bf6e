"""MoCo v3's Triton kernel: its arithmetic in Triton's interpreter, its compilation for GPUs, and on a GPU itself."""

from __future__ import annotations

import re

import pytest
import torch

from dist_ssl import objective
from dist_ssl.distributed import HAS_TRITON, as_on_gpu
from dist_ssl.objective import tiles
from tests.test_nt_xent_triton import HAS_CUDA, assembled, fresh_process, relative

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="this build of torch came without Triton")
# N, own rows, d, dtype: one tile and many, edges that no tile divides, d beyond one block.
CASES = {
    "one row, one dimension": (64, (3, 4), 1, "float32"),
    "odd everything": (301, (37, 170), 21, "float32"),
    "bf16": (258, (0, 258), 128, "bfloat16"),
    "wide": (130, (99, 130), 200, "float32"),
    "wide bf16": (140, (4, 90), 256, "bfloat16"),
}


def kernel_errors(total: int, own: tuple[int, int], d: int, dtype: str, device: str = "cpu") -> list[float]:
    """Sums and pulls against the tiles in fp64."""
    from dist_ssl.objective import queries_triton

    generator, rows = torch.Generator().manual_seed(0), slice(*own)
    q, k = (3 * torch.randn(count, d, generator=generator) for count in (own[1] - own[0], total))
    q, k = q.to(getattr(torch, dtype)), k.to(getattr(torch, dtype))
    lengths = [x.float().norm(dim=1) for x in (q, k)]
    here = [x.to(device) for x in (q, k, *(1 / length for length in lengths))]
    got = queries_triton.query_sums(*here, rows, 5.0)
    unit = [x.double() / x.double().norm(dim=1, keepdim=True) for x in (q, k)]
    return [relative(*pair) for pair in zip(got, tiles.query_sums(*unit, rows, 5.0), strict=True)]


def loss_errors(dtype: str, temperature: float, device: str = "cpu", n: int = 70, d: int = 24) -> list[float]:
    """Loss and gradients of the queries through the kernel, against fp64 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(n, 2, d, generator=generator).to(getattr(torch, dtype)) for _ in range(2)]
    answers = []
    for to in ({"device": device}, {"dtype": torch.float64}):
        p, k = (x.to(**to, copy=True) for x in given)
        p.requires_grad_()
        loss = objective.moco_v3(*p.unbind(1), *k.unbind(1), temperature)  # strided, as training hands them over
        loss.backward()
        answers.append([loss.detach(), p.grad])
    return [relative(got, want) for got, want in zip(*answers, strict=True)]


def in_the_interpreter() -> dict[str, list[float]]:
    with as_on_gpu():
        losses = {str(temperature): loss_errors("float32", temperature) for temperature in (0.2, 0.01)}
    return {name: kernel_errors(*case) for name, case in CASES.items()} | losses


@pytest.fixture(scope="module")
def interpreted() -> dict[str, list[float]]:
    return fresh_process("in_the_interpreter", "tests.test_moco_triton", TRITON_INTERPRET="1")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.slow
def test_the_kernel_in_the_interpreter(interpreted, case):
    sums, pulls = interpreted[case]
    assert sums <= 1e-6
    assert pulls <= (4e-3 if "bf16" in case else 1e-6)  # for tensor cores the weights become bf16


@pytest.mark.parametrize("temperature", ["0.2", "0.01"])  # the second is computed in fp64, by the tiles
@pytest.mark.slow
def test_the_loss_in_the_interpreter(interpreted, temperature):
    assert max(interpreted[temperature]) <= 2e-6


def compiled() -> list[dict]:
    """The kernel compiled to machine code for Ampere and Hopper."""
    from dist_ssl.objective import queries_triton as kernels

    facts = []
    for capability in (90, 80):
        for dtype in ("bf16", "fp32"):
            for d in (128, 256):
                block = kernels.block_of({"bf16": torch.bfloat16, "fp32": torch.float32}[dtype], d)
                types = dict.fromkeys(("q_inverse_norm", "k_inverse_norm", "sums", "pulls"), "*fp32")
                types |= {"q": f"*{dtype}", "k": f"*{dtype}", "scale": "fp32"}
                types |= dict.fromkeys(sizes := ("first", "n", "N"), "i32")
                constants = {"D": d, "BLOCK_D": 128, "SPLIT": 2**16, "BLOCK_M": block["BLOCK_M"]}
                constants |= {"BLOCK_N": block["BLOCK_N"], "PRECISION": "tf32x3" if dtype == "fp32" else "tf32"}
                constants["PRODUCT"] = kernels.tl.float32 if dtype == "fp32" else kernels.tl.bfloat16
                types = {name: types.get(name, "constexpr") for name in kernels._query_sums.arg_names}
                options = {"num_warps": block["num_warps"], "num_stages": block["num_stages"]}
                fact, ptx = assembled(kernels._query_sums, types, constants, capability, sizes, **options)
                products = sorted(set(re.findall(r"wgmma\.mma_async|mma\.sync", ptx)))
                facts.append({"capability": capability, "dtype": dtype, "d": d, "products": products, **fact})
    return facts


@pytest.mark.slow
def test_the_kernel_compiles_to_tensor_core_code():
    for fact in fresh_process("compiled", "tests.test_moco_triton", TRITON_INTERPRET="0"):
        hopper = fact["capability"] == 90
        assert fact["products"] == (["wgmma.mma_async"] if hopper and fact["dtype"] == "bf16" else ["mma.sync"]), fact
        assert fact["shared"] <= (227 if hopper else 99) * 1024, fact
        assert fact["spilled"] <= (0 if fact["dtype"] == "bf16" else 16), fact


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")
@pytest.mark.parametrize("case", CASES)
def test_the_kernel_on_a_gpu(case):
    sums, pulls = kernel_errors(*CASES[case], device="cuda")
    assert sums <= 2e-6
    assert pulls <= (4e-3 if "bf16" in case else 2e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_the_loss_on_a_gpu(dtype, tolerance):
    assert max(loss_errors(dtype, 0.2, "cuda", n=1500, d=256)) <= tolerance
