"""The gate of the objectives beside NT-Xent: what test_objective.py holds, for each of them.

Loss and gradient on real ranks against one process that sees the global batch (`reference_objectives`); the gate
against losses that are known to be wrong (`wrong_objectives`); ours against other libraries'.
"""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from dist_ssl import distributed, objective
from dist_ssl.objective import gaussian, tiles
from tests import reference_objectives, wrong_objectives
from tests.pool import ranks
from tests.reference_objectives import CASES, NARROW, SLICES, call, gradients, inputs

SIZES = [[12], [6, 6], [5, 7], [4, 4, 4], [1, 6, 5], [3, 3, 3, 3], [5, 1, 2, 4]]


def batch(total, dtype):
    generator = torch.Generator().manual_seed(0)
    x1, noise = torch.randn(2, total, 6, dtype=torch.float64, generator=generator)
    return x1.to(dtype), (x1 + noise).to(dtype)


def networks(d, dtype, offset):
    """Encoder and momentum encoder; z's dimensions have standard deviations on both sides of VICReg's 1."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        encoder, slow = (nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, d)).to(dtype) for _ in range(2))
    with torch.no_grad():
        encoder[2].weight.mul_(torch.linspace(0.3, 6, d, dtype=dtype)[:, None])
        encoder[2].bias.add_(offset)
    return encoder, slow


def share(case, loss, d, x1, x2, dtype, offset, **rows):
    """(loss, gradient of the encoder's parameters) of some images, and whether the keys got a gradient."""
    encoder, slow = networks(d, dtype, offset)
    value = call(case, loss, encoder(x1), encoder(x2), slow(x1), slow(x2), **rows)
    value.backward()
    assert not rows or all(p.grad is None for p in slow.parameters())
    return torch.cat([value.detach().view(1), *(p.grad.flatten() for p in encoder.parameters())])


@functools.lru_cache
def expected(case, total, d, offset):
    return share(
        case, getattr(reference_objectives, case.split()[0]), d, *batch(total, torch.float64), torch.float64, offset
    )


def on_ranks(case, loss, sizes, d, dtype, offset):
    start = sum(sizes[: distributed.rank()])
    own = slice(start, start + sizes[distributed.rank()])
    answer = share(case, loss, d, *(x[own] for x in batch(sum(sizes), dtype)), dtype, offset, rows_per_rank=sizes)
    dist.all_reduce(answer)
    return answer.double() / len(sizes)


def gate_error(case, sizes, d, dtype, loss=None, offset=0.5):
    """The largest relative error over ranks, of the loss and of the averaged gradient."""
    want, loss = expected(case, sum(sizes), d, offset), loss or getattr(objective, case.split()[0])
    answers = ranks(len(sizes)).run(on_ranks, case, loss, sizes, d, dtype, offset)
    return max(float((a[k] - want[k]).norm() / want[k].norm()) for a in answers for k in (slice(0, 1), slice(1, None)))


# --- C2: exact gradient ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("case", "d"), CASES)
def test_exact_on_any_number_of_ranks(case, d, dtype, tolerance):
    errors = {str(sizes): gate_error(case, sizes, d, dtype) for sizes in SIZES}
    assert max(errors.values()) <= tolerance, errors


def test_means_far_from_zero():
    """z's means are 300 times their spread: what centres last, or too late, is off by tens of percent in fp32."""
    for case, d in CASES[:4]:
        assert gate_error(case, [5, 7], d, torch.float32, offset=300.0) <= 5e-4
    wrong = wrong_objectives.barlow_twins_of_raw_moments
    assert gate_error("barlow_twins", [5, 7], NARROW, torch.float64, wrong) <= 1e-12
    assert gate_error("barlow_twins", [5, 7], NARROW, torch.float32, wrong, offset=300.0) > 1e-2


def test_a_dimension_that_outgrows_the_others():
    """VICReg of gathered z subtracts the diagonal: how many digits that costs is written in `covariance`."""
    z = inputs(2, 96, 200, torch.float32)
    for view in z:
        view[:, 0] *= 30
    wide = [view.double().requires_grad_() for view in z]
    c = [torch.cov(view.T) for view in wide]
    off = sum((x - x.diagonal().diag()).square().sum() for x in c) / 200
    (want,) = torch.autograd.grad(off, wide[0])
    z[0].requires_grad_()
    (got,) = torch.autograd.grad(objective.vicreg(*z, invariance=0.0, variance=0.0), z[0])
    assert (got - want).norm() <= 1e-5 * want.norm()
    assert (got - want)[:, 0].norm() <= 1e-4 * want[:, 0].norm()


@pytest.mark.parametrize(
    ("case", "wrong", "sizes"),
    [
        ("vicreg", "vicreg_gather_without_gradient", [6, 6]),
        ("vicreg", "vicreg_of_each_rank", [6, 6]),
        ("vicreg", "vicreg_mean_of_means", [5, 7]),
        ("barlow_twins", "barlow_twins_reduced_without_gradient", [6, 6]),
        ("barlow_twins", "barlow_twins_normalised_on_each_rank", [6, 6]),
        ("moco_v3", "moco_v3_positives_of_rank_0", [6, 6]),
        ("moco_v3", "moco_v3_keys_of_this_rank", [6, 6]),
        ("moco_v3", "moco_v3_mean_of_means", [5, 7]),
        ("byol", "byol_mean_of_means", [5, 7]),
        ("byol", "byol_of_the_same_view", [6, 6]),
        ("simsiam", "simsiam_mean_of_means", [5, 7]),
        ("simsiam", "simsiam_without_stop", [6, 6]),
        ("sigreg", "sigreg_reduced_without_gradient", [6, 6]),
        ("sigreg", "sigreg_of_each_rank", [6, 6]),
        ("sigreg", "sigreg_with_slices_of_each_rank", [6, 6]),
    ],
)
def test_gate_turns_down_what_is_wrong(case, wrong, sizes):
    assert not gate_error(case, sizes, NARROW, torch.float64, getattr(wrong_objectives, wrong)) <= 1e-3


def test_gate_passes_what_is_right():
    """The wrong losses are wrong in what their names say: with one rank, or even ones, nothing is left of it."""
    for case, right, sizes in [
        ("vicreg", "vicreg_gather_without_gradient", [12]),
        ("vicreg", "vicreg_mean_of_means", [6, 6]),
        ("barlow_twins", "barlow_twins_reduced_without_gradient", [12]),
        ("moco_v3", "moco_v3_positives_of_rank_0", [12]),
        ("moco_v3", "moco_v3_mean_of_means", [6, 6]),
        ("byol", "byol_mean_of_means", [6, 6]),
        ("simsiam", "simsiam_mean_of_means", [6, 6]),
        ("sigreg", "sigreg_reduced_without_gradient", [12]),
    ]:
        assert gate_error(case, sizes, NARROW, torch.float64, getattr(wrong_objectives, right)) <= 1e-12, right


# --- one process: tiles, dtypes, slices, other libraries --------------------------------------------------------


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (4, 3), (7, 30)])
@pytest.mark.parametrize("case", ["moco_v3", "sigreg 2"])
def test_any_tile(case, rows, width, monkeypatch):
    want = gradients(case, getattr(reference_objectives, case.split()[0]), 11, 3)
    monkeypatch.setattr(tiles, "TILE_ROWS", rows)
    monkeypatch.setattr(tiles, "TILE_ENTRIES_CPU", rows * width)
    monkeypatch.setattr(gaussian, "TILE_ENTRIES_CPU", rows * SLICES)
    got = gradients(case, getattr(objective, case.split()[0]), 11, 3)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.02, 0.002])
def test_small_temperature_with_close_positives(temperature):
    k1, noise, k2 = inputs(3, 16, 10)
    q1, q2 = ((k + 0.02 * noise).requires_grad_() for k in (k2, k1))
    want = torch.autograd.grad(reference_objectives.moco_v3(q1, q2, k1, k2, temperature), (q1, q2))
    narrow = [x.detach().float().requires_grad_() for x in (q1, q2, k1, k2)]
    got = torch.autograd.grad(objective.moco_v3(*narrow, temperature), narrow[:2])
    for a, b in zip(got, want, strict=True):  # at 0.002 the gradient is of 1e-60: nothing, in fp32
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-30


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("case", "d"), [x for x in CASES if " " not in x[0]])
def test_half_precision_input_is_computed_in_fp32(case, d, dtype):
    loss = getattr(objective, case.split()[0])
    wide = [x.to(dtype).double() for x in inputs(4, 40, d)]
    z1, z2 = (z.requires_grad_() for z in wide[:2])
    want_loss = call(case, loss, z1, z2, *wide[2:])
    want = [g for g in torch.autograd.grad(want_loss, (z1, z2), allow_unused=True) if g is not None]
    got_loss, *got = gradients(case, loss, 40, d, dtype)
    assert got_loss.dtype == torch.float32
    tolerance = 2 * torch.finfo(dtype).eps if case == "simsiam" else 1e-5  # its call computes targets in `dtype`
    assert abs(got_loss - want_loss) <= tolerance * abs(want_loss)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).norm() <= 4 * torch.finfo(dtype).eps * b.norm()


@pytest.mark.parametrize(("case", "d"), CASES)
def test_neither_autocast_nor_matmul_precision_reach_inside(case, d):
    name, before = case.split()[0], torch.get_float32_matmul_precision()
    want = gradients(case, getattr(objective, name), 40, d, torch.float32)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = gradients(case, getattr(objective, name), 40, d, torch.float32)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_byol_of_near_perfect_predictions_does_not_cancel():
    p1, noise, p2 = inputs(3, 16, 10)
    k1, k2 = p2 + 1e-4 * noise, p1 + 1e-4 * noise
    narrow = [x.float() for x in (p1, p2, k1, k2)]
    exact = reference_objectives.byol(*(x.double() for x in narrow))  # 1e-8: 2 - 2 u.v in fp32 would be rounding alone
    assert abs(objective.byol(*narrow) - exact) <= 1e-2 * exact


def test_slices_are_keyed_by_seed_and_step():
    a = gaussian.slices(8, 400, seed=1, step=2)
    assert torch.equal(a, gaussian.slices(8, 400, seed=1, step=2))
    torch.testing.assert_close(torch.linalg.vector_norm(a, dim=0), torch.ones(400, dtype=torch.float64))
    torch.testing.assert_close(a @ a.T / 400, torch.eye(8, dtype=torch.float64) / 8, rtol=0, atol=0.03)
    for seed, step in ((1, 3), (2, 2), (2, 1)):
        assert (a * gaussian.slices(8, 400, seed, step)).sum(dim=0).abs().mean() < 0.5


def test_sigreg_is_small_for_a_gaussian_alone():
    (z,) = inputs(1, 4000, 4)
    value = objective.sigreg(z, 0, 0)
    for other in (z * 1.2, z + 0.2, z.sign(), z * torch.tensor([1, 1, 1, 0.5])):
        assert objective.sigreg(other, 0, 0) > 10 * value


def test_other_libraries_agree():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, on import
        from lightly.loss import BarlowTwinsLoss, NegativeCosineSimilarity, VICRegLoss
        from lightly.loss.lejepa_loss import SIGReg

    z1, z2, k1, k2 = inputs(4, 30, 8)
    for z in (z1, z2):
        z.mul_(torch.linspace(0.5, 2, 8)).requires_grad_()
    cosine, labels = NegativeCosineSimilarity(), torch.arange(30)
    u1, u2, v1, v2 = (F.normalize(x, dim=1) for x in (z1, z2, k1, k2))
    for ours, theirs in [
        (objective.vicreg(z1, z2), VICRegLoss()(z1, z2)),
        (objective.barlow_twins(z1, z2), BarlowTwinsLoss(lambda_param=0.0051)(z1, z2)),
        (objective.simsiam(z1, z2, k1, k2), 0.5 * (cosine(z1, k2) + cosine(z2, k1))),
        (objective.byol(z1, z2, k1, k2), F.mse_loss(u1, v2) * 8 + F.mse_loss(u2, v1) * 8),
        (
            objective.moco_v3(z1, z2, k1, k2, 0.2),
            0.4 * (F.cross_entropy(u1 @ v2.T / 0.2, labels) + F.cross_entropy(u2 @ v1.T / 0.2, labels)),
        ),
    ]:
        ours, theirs = ([x.detach(), *torch.autograd.grad(x, (z1, z2), retain_graph=True)] for x in (ours, theirs))
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    theirs = SIGReg(knots=9, t_max=5.0)
    theirs._generate_unit_vectors = lambda *_: gaussian.slices(8, 64, 0, 0)
    torch.testing.assert_close(objective.sigreg(z1, 0, 0, 64), theirs(z1), rtol=1e-6, atol=0)  # its t are of fp32
