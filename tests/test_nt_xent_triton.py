"""The Triton kernels: their arithmetic in Triton's interpreter, their compilation for real GPUs, and on a GPU itself.

The interpreter and the compiler need no GPU, but a fresh process: Triton decides on import which of them it is.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dist_ssl import objective
from dist_ssl.objective import contrastive, tiles
from dist_ssl.objective.contrastive import HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="this build of torch came without Triton")
HAS_CUDA = torch.cuda.is_available()
# M, own rows, d, dtype: one tile and many, edges that no tile divides, d beyond one block, splits of the columns.
CASES = {
    "one row, one dimension": (64, (0, 1), 1, "float32"),
    "odd everything": (301, (37, 170), 21, "float32"),
    "bf16": (258, (0, 258), 128, "bfloat16"),
    "wide": (130, (99, 130), 200, "float32"),
    "wide bf16": (140, (4, 90), 300, "bfloat16"),
}


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double().cpu() - want.double().cpu()).norm() / want.double().norm())


def kernel_errors(total: int, own: tuple[int, int], d: int, dtype: str, device: str = "cpu") -> list[float]:
    """Both kernels against the tiles in fp64, with a third of the keys equal to others."""
    from dist_ssl.objective import tiles_triton

    generator = torch.Generator().manual_seed(0)
    z = (3 * torch.randn(total, d, generator=generator)).to(getattr(torch, dtype))
    key = torch.randint(-(2**40), 2**40, (total,), generator=generator)[torch.randint(0, total, (total,))]
    weight, rows = torch.rand(total, generator=generator), slice(*own)
    inverse_norm = z.float().norm(dim=1).reciprocal()
    wide = (z.double(), inverse_norm.double(), key)
    here = [x.to(device) for x in (z, inverse_norm, key)]
    return [
        relative(tiles_triton.exponential_sums(*here, rows, 10.0), tiles.exponential_sums(*wide, rows, 10.0)),
        relative(
            tiles_triton.weighted_sums(*here, weight.to(device), rows, 10.0),
            tiles.weighted_sums(*wide, weight.double(), rows, 10.0),
        ),
    ]


def loss_errors(form: str, dtype: str, device: str = "cpu", n: int = 150, d: int = 24) -> list[float]:
    """Loss, gradients of z and of the temperature through the kernels, against fp64 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    views = [torch.randn(n, d, generator=generator).to(getattr(torch, dtype)) for _ in range(2)]
    ids = torch.arange(n) // 2 * 10**12  # every image twice
    extra = {"labels": torch.arange(n) % 7 - 1} if form == "supervised" else {"sample_ids": ids}
    answers = []
    for to in ({"device": device}, {"dtype": torch.float64}):
        z1, z2 = (z.to(**to, copy=True).requires_grad_() for z in views)
        tau = torch.tensor(0.1, requires_grad=True)
        loss = getattr(objective, form)(z1, z2, tau, **{name: x.to(z1.device) for name, x in extra.items()})
        loss.backward()
        answers.append([loss.detach(), torch.cat([z1.grad, z2.grad]), tau.grad])
    return [relative(got, want) for got, want in zip(*answers, strict=True)]


def in_the_interpreter() -> dict[str, list[float]]:
    from dist_ssl.objective import tiles_triton

    errors = {name: kernel_errors(*case) for name, case in CASES.items()}
    contrastive._kernels = lambda z: tiles if z.dtype == torch.float64 else tiles_triton
    return errors | {form: loss_errors(form, "float32") for form in ("nt_xent", "decoupled", "supervised")}


@pytest.fixture(scope="module")
def interpreted() -> dict[str, list[float]]:
    return fresh_process("in_the_interpreter", TRITON_INTERPRET="1")


def fresh_process(function: str, module: str = "tests.test_nt_xent_triton", **environment: str):
    code = f"import json; from {module} import {function} as f; print(json.dumps(f()))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.slow
def test_kernels_in_the_interpreter(interpreted, case):
    sums, weighted = interpreted[case]
    assert sums <= 1e-6
    # For tensor cores the weights become bf16; the interpreter truncates where a GPU rounds.
    assert weighted <= (4e-3 if "bf16" in case else 1e-6)


@pytest.mark.parametrize("form", ["nt_xent", "decoupled", "supervised"])
@pytest.mark.slow
def test_losses_in_the_interpreter(interpreted, form):
    assert max(interpreted[form]) <= 5e-6


def assembled(kernel, types: dict, constants: dict, capability: int, aligned=(), **options) -> tuple[dict, str]:
    """(shared memory, registers, spilled bytes; PTX) of a kernel for a GPU, with pointers and `aligned` in 16s."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    attributes = {
        (i,): [["tt.divisibility", 16]] for i, (name, t) in enumerate(types.items()) if t[0] == "*" or name in aligned
    }
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    # A cubin's header tells no spills; the assembler does, when it is asked to talk.
    assembler = [triton.knobs.nvidia.ptxas.path, "-v", f"--gpu-name=sm_{capability}{'a' * (capability == 90)}"]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as ptx:
        ptx.write(binary.asm["ptx"])
        ptx.flush()
        command = [*assembler, ptx.name, "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    fact = {"shared": binary.metadata.shared, "spilled": int(re.search(r"(\d+) bytes spill stores", said)[1])}
    return fact | {"registers": int(re.search(r"Used (\d+) registers", said)[1])}, binary.asm["ptx"]


def test_keys_are_dense_int32_and_nobody_waits_for_them():
    """On fake tensors, which have no values, whatever the host would read raises."""
    generator = torch.Generator().manual_seed(0)
    for values in (1, 2, 50, 2**62):
        ids = torch.randint(-values, values, (40,), generator=generator)[torch.randint(0, 40, (64,))]
        key = contrastive._keys("nt_xent", ids, torch.empty(128, 1), 2)
        assert key.dtype == torch.int32
        assert torch.equal(key.long(), torch.unique(ids, return_inverse=True)[1].repeat_interleave(2))
    assert contrastive._keys("nt_xent", ids[:1], torch.empty(2, 1), 2).tolist() == [0, 0]
    with FakeTensorMode():
        z, ids = torch.empty(128, 8), torch.empty(64, dtype=torch.int64)
        contrastive._keys("decoupled", ids, z, 2)
        for form in ("nt_xent", "supervised"):
            list(contrastive._anchors(form, z, torch.empty(128), ids, slice(0, 64), 2))


def compiled() -> list[dict]:
    """Both kernels compiled to machine code for Ampere and Hopper."""
    from dist_ssl.objective import tiles_triton as kernels

    key = contrastive._keys("nt_xent", torch.arange(4), torch.empty(8, 1), 2)
    facts = []
    for capability, dtype, blocks in [
        (90, "bf16", (kernels.FORWARD, kernels.BACKWARD)),
        (90, "fp32", (kernels.SINGLE, kernels.SINGLE_BACKWARD)),
        (80, "bf16", (kernels.SMALL, kernels.SMALL)),
        (80, "fp32", (kernels.SINGLE, kernels.SINGLE_BACKWARD_SMALL)),
    ]:
        for kernel, block in zip((kernels._exponential_sums, kernels._weighted_sums), blocks, strict=True):
            types = dict.fromkeys(("inverse_norm", "weight", "parts"), "*fp32") | {"z": f"*{dtype}"}
            types |= {"key": {torch.int32: "*i32", torch.int64: "*i64"}[key.dtype], "scale": "fp32"}
            types |= dict.fromkeys(sizes := ("first", "m", "M"), "i32")
            constants = {"D": 128, "BLOCK_D": 128, "SPLIT": 2**16, "BLOCK_M": block["BLOCK_M"]}
            constants |= {"BLOCK_N": block["BLOCK_N"], "PRECISION": "tf32x3" if dtype == "fp32" else "tf32"}
            constants["PRODUCT"] = kernels.tl.float32 if dtype == "fp32" else kernels.tl.bfloat16
            types = {name: types.get(name, "constexpr") for name in kernel.arg_names}
            options = {"num_warps": block["num_warps"], "num_stages": block["num_stages"]}
            fact, ptx = assembled(kernel, types, constants, capability, sizes, **options)
            products = sorted(set(re.findall(r"wgmma\.mma_async|mma\.sync", ptx)))
            facts.append({"kernel": kernel.fn.__name__, "capability": capability, "dtype": dtype, **fact})
            facts[-1]["products"] = products
    return facts


@pytest.mark.slow
def test_kernels_compile_to_tensor_core_code():
    for fact in fresh_process("compiled", TRITON_INTERPRET="0"):
        hopper = fact["capability"] == 90
        assert fact["products"] == (["wgmma.mma_async"] if hopper else ["mma.sync"]), fact
        assert fact["shared"] <= (227 if hopper else 99) * 1024, fact
        assert fact["spilled"] <= (0 if fact["dtype"] == "bf16" else 16), fact
        if hopper and fact["kernel"] == "_exponential_sums" and fact["dtype"] == "bf16":  # two programs a processor
            assert fact["shared"] <= 113 * 1024, fact
            assert fact["registers"] <= 128, fact


# --- on a GPU --------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")
@pytest.mark.parametrize("case", CASES)
def test_kernels_on_a_gpu(case):
    sums, weighted = kernel_errors(*CASES[case], device="cuda")
    assert sums <= 2e-6
    assert weighted <= (4e-3 if "bf16" in case else 2e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("form", ["nt_xent", "decoupled", "supervised"])
def test_losses_on_a_gpu(form, dtype, tolerance):
    assert max(loss_errors(form, dtype, "cuda", n=1500, d=130)) <= tolerance


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")
def test_same_bits_and_little_memory_on_a_gpu():
    generator = torch.Generator("cuda").manual_seed(0)
    views = torch.randn(2, 32768, 128, device="cuda", dtype=torch.bfloat16, generator=generator)
    answers = []
    for _ in range(2):
        z1, z2 = (z.clone().requires_grad_() for z in views)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = objective.nt_xent(z1, z2, 0.1)
        loss.backward()
        assert torch.cuda.max_memory_allocated() - before <= 150 * 2**20
        answers.append((loss.detach(), z1.grad, z2.grad))
    assert all(torch.equal(a, b) for a, b in zip(*answers, strict=True))
