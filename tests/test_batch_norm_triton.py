"""Batch norm fused with addition and ReLU: the kernels in Triton's interpreter and compiled for GPUs, and what calls
them in plain torch, against torch's own batch norm in fp64.
"""

from __future__ import annotations

import copy
import itertools
import re

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from dist_ssl.models import GlobalBatchNorm, batch_norm, frozen_running_statistics, fused_batch_norm
from dist_ssl.models.resnet import BasicBlock, Bottleneck, ResNet
from dist_ssl.objective.contrastive import HAS_TRITON
from tests import fused_batch_norm_kernels
from tests.pool import ranks
from tests.test_nt_xent_triton import assembled, fresh_process, relative

HAS_CUDA = torch.cuda.is_available()
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="this build of torch came without Triton")
# Shape and dtype: channels that no block divides, several blocks, one row, one channel, several parts of the rows.
CASES = {
    "odd": ((5, 19, 7, 3), "float32"),
    "two blocks": ((3, 130, 2, 3), "float32"),
    "a batch of vectors": ((70, 40), "float32"),
    "one row": ((1, 24), "float32"),
    "one channel": ((9, 1, 30, 31), "float32"),
    "many parts": ((6, 4, 36, 37), "float32"),
    "bf16": ((4, 32, 9, 8), "bfloat16"),
    "fp16": ((4, 32, 9, 8), "float16"),
}
FORMS = list(itertools.product((False, True), (False, True)))  # residual, relu
TOLERANCES = {"float32": 3e-6, "bfloat16": 6e-3, "float16": 8e-4}


def tensors(shape: tuple[int, ...], dtype: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """x far from zero in each channel, a residual and a gradient, and weight and bias."""
    generator = torch.Generator().manual_seed(0)
    c = shape[1]
    away = torch.randn(c, generator=generator).view(1, -1, *[1] * (len(shape) - 2))
    of_rows = [torch.randn(shape, generator=generator) + 3 * away * (i == 0) for i in range(3)]
    return [x.to(getattr(torch, dtype)) for x in of_rows], [
        torch.randn(c, generator=generator) + 1,
        torch.randn(c, generator=generator) / 2,
    ]


def reference(of_rows, of_channels, residual: bool, relu: bool, rounded: torch.dtype | None):
    """y, the gradients of x, residual, weight and bias, the running statistics: by torch's own, in fp64."""
    x, added, dy = (t.double() for t in of_rows)
    weight, bias = (t.double().requires_grad_() for t in of_channels)
    x.requires_grad_(), added.requires_grad_()
    running = torch.zeros_like(weight), torch.ones_like(weight)
    running = [r.detach() for r in running]
    if x.numel() == x.shape[1]:  # one row, which torch refuses: zero, and no gradient
        y = (x - x.detach()) * 0 * weight.view(1, -1) + bias
        running = [0.1 * x.detach().flatten(), 0.9 * running[1]]
    else:
        y = F.batch_norm(x, *running, weight, bias, training=True, momentum=0.1, eps=1e-5)
    if residual:
        y = y + added
    # Where bf16 can't tell y from zero neither can a mask: both take what is rounded.
    if relu:
        y = y * (y.to(rounded) > 0 if rounded else y > 0)
    y.backward(dy)
    gradients = [x.grad, *([added.grad] if residual else []), weight.grad, bias.grad]
    return [y.detach(), *gradients, *running]


def fused(of_rows, of_channels, residual: bool, relu: bool, device: str = "cpu"):
    """The same by the module, through what `_kernels` and `_has_kernels` choose."""
    x, added, dy = (t.to(device, copy=True).requires_grad_(i < 2) for i, t in enumerate(of_rows))
    norm = GlobalBatchNorm(x.shape[1]).to(device, of_channels[0].dtype)
    norm.weight, norm.bias = (nn.Parameter(t.to(device)) for t in of_channels)
    y = norm(x, added if residual else None, relu=relu)
    y.backward(dy)
    assert int(norm.num_batches_tracked) == 1
    gradients = [x.grad, *([added.grad] if residual else []), norm.weight.grad, norm.bias.grad]
    return [y.detach(), *gradients, norm.running_mean, norm.running_var]


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative, or absolute where nothing is expected."""
    return relative(got, want) if want.norm() > 1e-9 else float(got.double().norm())


def errors(shape: tuple[int, ...], dtype: str, device: str = "cpu") -> float:
    given = tensors(shape, dtype)
    worst = 0.0
    for residual, relu in FORMS:
        want = reference(*given, residual, relu, getattr(torch, dtype))
        got = fused(*given, residual, relu, device)
        worst = max(worst, *map(error, got, want))
    return worst


def in_the_interpreter() -> dict[str, float]:
    from dist_ssl.models import batch_norm_triton

    batch_norm_triton.PROGRAMS = 3  # so that a program takes several steps over its rows
    batch_norm._has_kernels = lambda x: True
    return {name: errors(*case) for name, case in CASES.items()} | {"ranks": merged_error()}


def merged_error() -> float:
    """Statistics of uneven ranks, merged, against those of all rows; the mean is 1,000 standard deviations away."""
    from dist_ssl.models import batch_norm_triton as kernels

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(901, 21, generator=generator) + 1000
    parts = [kernels.merge(kernels.moments(rows)) for rows in x.split([1, 300, 600])]
    mean, inverse_std, count = kernels.statistics(torch.stack(parts), 0.0, 0.1, None, None)
    assert count.tolist() == [901]
    variance, mean_64 = torch.var_mean(x.double(), dim=0, correction=0)
    return max(relative(mean, mean_64) * 1000, relative(inverse_std, variance.rsqrt()))


@pytest.fixture(scope="module")
def interpreted() -> dict[str, float]:
    return fresh_process("in_the_interpreter", "tests.test_batch_norm_triton", TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.parametrize("case", CASES)
@pytest.mark.slow
def test_kernels_in_the_interpreter(interpreted, case):
    assert interpreted[case] <= TOLERANCES[CASES[case][1]]


@needs_triton
@pytest.mark.slow
def test_merged_statistics_in_the_interpreter(interpreted):
    assert interpreted["ranks"] <= 2e-4  # fp32 holds 1000 to 3e-5


# --- what calls the kernels, in plain torch --------------------------------------------------------------------


def as_if_fused(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(batch_norm, "_has_kernels", lambda x: True)
    patch.setattr(fused_batch_norm, "_kernels", lambda: fused_batch_norm_kernels)


@pytest.fixture
def through_fusion(monkeypatch):
    as_if_fused(monkeypatch)


@pytest.mark.parametrize("case", [name for name, (_, dtype) in CASES.items() if dtype == "float32"])
@pytest.mark.parametrize(("residual", "relu"), FORMS)
def test_one_layer_in_fp64(through_fusion, case, residual, relu):
    given = [[t.double() for t in ts] for ts in tensors(*CASES[case])]
    for got, want in zip(fused(*given, residual, relu), reference(*given, residual, relu, None), strict=True):
        assert error(got, want) <= 1e-12


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_a_networks_gradients_are_those_without_fusion(monkeypatch, block):
    torch.manual_seed(0)
    plain = ResNet(block, [1, 1, 1, 2], num_classes=4, norm_layer=GlobalBatchNorm).double()
    for parameter in plain.parameters():  # also those that start as zeros
        nn.init.normal_(parameter, std=0.1)
    with_fusion, x = copy.deepcopy(plain), torch.randn(3, 3, 24, 24, dtype=torch.float64)
    answers = []
    for encoder in (plain, with_fusion):
        pixels = x.clone().requires_grad_()
        encoder(pixels).square().sum().backward()
        answers.append([pixels.grad, *(p.grad for p in encoder.parameters()), *encoder.buffers()])
        as_if_fused(monkeypatch)
    for got, want in zip(*answers, strict=True):
        assert relative(got, want) <= 1e-10


def layer_on_a_rank(rows_per_rank: list[int]):
    """Gradients of this rank's rows, and of weight and bias summed over ranks."""
    import torch.distributed as dist

    rank = dist.get_rank()
    rows = slice(sum(rows_per_rank[:rank]), sum(rows_per_rank[: rank + 1]))
    of_rows, of_channels = tensors((sum(rows_per_rank), 6, 5, 4), "float32")
    with pytest.MonkeyPatch.context() as patch:
        as_if_fused(patch)
        got = fused([t.double()[rows] for t in of_rows], [t.double() for t in of_channels], True, True)
    return [t.tolist() for t in got]


def test_uneven_ranks_make_one_batch():
    rows_per_rank = [1, 6, 2]
    answers = ranks(3).run(layer_on_a_rank, rows_per_rank)
    of_ranks = [[torch.tensor(t, dtype=torch.float64) for t in answer] for answer in answers]
    given = [[t.double() for t in ts] for ts in tensors((sum(rows_per_rank), 6, 5, 4), "float32")]
    y, dx, dresidual, dweight, dbias, *running = reference(*given, True, True, None)
    for i, want in enumerate([y, dx, dresidual]):
        assert relative(torch.cat([got[i] for got in of_ranks]), want) <= 1e-12
    for i, want in ((3, dweight), (4, dbias)):
        assert relative(sum(got[i] for got in of_ranks), want) <= 1e-12
    for got in of_ranks:
        assert all(relative(a, b) <= 1e-12 for a, b in zip(got[5:], running, strict=True))


def test_frozen_statistics_stay(through_fusion):
    norm = GlobalBatchNorm(4)
    before = copy.deepcopy(norm.state_dict())
    with frozen_running_statistics():
        norm(torch.randn(9, 4), relu=True)
    assert all(torch.equal(before[name], tensor) for name, tensor in norm.state_dict().items())


@needs_triton
def test_bytes_of_a_layer(monkeypatch):
    """An element of bf16 moves 16 bytes through norm and ReLU, 22 with an addition, forward and backward."""
    from triton.runtime.jit import JITFunction

    launches = []

    def run(kernel, *arguments, **options):
        tensors = {id(t): t for t in arguments if isinstance(t, torch.Tensor)}.values()
        launches.append(sum(t.numel() * t.element_size() for t in tensors))

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(batch_norm, "_has_kernels", lambda x: True)
    with FakeTensorMode():
        norm = GlobalBatchNorm(64)
        x = torch.empty(64, 64, 28, 28, dtype=torch.bfloat16).to(memory_format=torch.channels_last).requires_grad_()
        for residual, expected in ((None, 16), (torch.empty_like(x), 22)):
            launches.clear()
            torch.autograd.backward(norm(x, residual, relu=True), torch.empty_like(x))
            assert len(launches) == 5
            assert expected <= sum(launches) / x.numel() <= 1.03 * expected


# --- compiled for GPUs -----------------------------------------------------------------------------------------

KERNELS = {
    "_moments": [{}],
    "_merge": [{"FINAL": True, "TRACK": True, "BLOCK_P": 64, "BLOCK_C": 16}],
    "_normalise": [{"RESIDUAL": residual, "RELU": relu} for residual, relu in FORMS],
    "_gradient_sums": [{"RELU": True, "FROM_Y": True}, {"RELU": True, "FROM_Y": False}],
    "_gradient": [{"RELU": True}, {"RELU": False}],
}
OF_ROWS = ("x", "residual", "y", "dy", "g_out", "dx")


def compiled() -> list[dict]:
    from dist_ssl.models import batch_norm_triton as kernels

    facts = []
    for capability, name in itertools.product((80, 90), KERNELS):
        kernel = getattr(kernels, name)
        for form in KERNELS[name]:
            types = dict.fromkeys(OF_ROWS, "*bf16") | dict.fromkeys(("eps", "momentum"), "fp32")
            types |= dict.fromkeys(("N", "C", "P", "part_rows"), "i32")
            constants = {"BLOCK_N": 32, "BLOCK_C": 128} | form
            types = {a: types.get(a, "constexpr" if a in constants else "*fp32") for a in kernel.arg_names}
            constants = {a: value for a, value in constants.items() if a in types}
            warps = 8 if name in ("_moments", "_gradient_sums") else 4
            fact, ptx = assembled(kernel, types, constants, capability, ("C",), num_warps=warps)
            wide = len(re.findall(r"ld\.global\.v4", ptx))
            facts.append({"kernel": name, "form": form, "capability": capability, "wide_loads": wide, **fact})
    return facts


@needs_triton
@pytest.mark.slow
def test_kernels_compile_to_wide_loads_without_spills():
    facts = fresh_process("compiled", "tests.test_batch_norm_triton", TRITON_INTERPRET="0")
    for fact in facts:
        print(fact)
        assert fact["spilled"] == 0, fact
        if fact["kernel"] != "_merge":  # two programs of eight warps a processor: 32 KiB of loads in flight
            assert fact["wide_loads"] > 0, fact
            assert fact["registers"] <= 128, fact


# --- on a GPU --------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")
@pytest.mark.parametrize("case", CASES)
def test_kernels_on_a_gpu(case):
    shape, dtype = CASES[case]
    assert errors(shape, dtype, "cuda") <= TOLERANCES[dtype]
    given = tensors(shape, dtype)
    first, second = (fused(*given, True, True, "cuda") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
