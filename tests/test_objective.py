"""The gate of the objective: loss and gradients on real ranks against one process that sees the global batch.

The reference is a loop over anchors in fp64. The gate itself is held against losses that are known to be wrong
(`wrong_objectives`), and the reference against other libraries' losses.
"""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from dist_ssl import distributed, objective
from dist_ssl.objective import tiles
from tests import wrong_objectives
from tests.counting import Count
from tests.pool import RankFailed, ranks

EVEN = {1: [12], 2: [6, 6], 3: [4, 4, 4], 4: [3, 3, 3, 3]}
UNEVEN = {2: [5, 7], 3: [1, 6, 5], 4: [5, 1, 2, 4]}
SIZES = [*EVEN.values(), *UNEVEN.values()]


# --- the reference ---------------------------------------------------------------------------------------------


def reference(form, z1, z2, temperature, ids=None, labels=None):
    """The paper's formula, one anchor and one pair at a time."""
    n = len(z1)
    ids = torch.arange(n) if ids is None else ids
    u = [F.normalize(z, dim=0) for pair in zip(z1, z2, strict=True) for z in pair]
    losses = []
    for i in range(2 * n):
        others = [j for j in range(2 * n) if j != i]
        negatives = [j for j in others if ids[j // 2] != ids[i // 2]]
        positives, denominator = [i ^ 1], [i ^ 1, *negatives]
        if form == "decoupled":
            denominator = negatives
        if form == "supervised":
            denominator = others
            positives = [j for j in others if labels[j // 2] == labels[i // 2] and (labels[j // 2] >= 0 or j == i ^ 1)]
        lse = torch.stack([u[i] @ u[j] / temperature for j in denominator]).logsumexp(0)
        losses.append(torch.stack([lse - u[i] @ u[j] / temperature for j in positives]).mean())
    return torch.stack(losses).mean()


def batch(total: int, dtype, spread: float = 1.0, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x1, noise = torch.randn(2, total, 6, dtype=torch.float64, generator=generator)
    ids = torch.arange(total) * 10**12
    ids[total // 2] = ids[0]  # an image that the batch holds twice
    labels = torch.randint(-1, 3, (total,), generator=generator)
    return x1.to(dtype), (x1 + spread * noise).to(dtype), ids, labels


def encoder(dtype) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 5)).to(dtype)


def expected(form, total, temperature, spread, with_ids):
    """Loss, gradient of the encoder, gradient of the temperature: of one process, in fp64."""
    x1, x2, ids, labels = batch(total, torch.float64, spread)
    model, tau = encoder(torch.float64), torch.tensor(temperature, dtype=torch.float64, requires_grad=True)
    loss = reference(form, model(x1), model(x2), tau, ids if with_ids else None, labels)
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters()]), tau.grad


def on_ranks(loss_function, sizes, temperature, spread, dtype, with_ids, with_labels):
    """The same three numbers of this rank's share; gradients averaged over ranks as data parallelism does."""
    start = sum(sizes[: distributed.rank()])
    own = slice(start, start + sizes[distributed.rank()])
    x1, x2, ids, labels = (x[own] for x in batch(sum(sizes), dtype, spread))
    model, tau = encoder(dtype), torch.tensor(temperature, dtype=torch.float64, requires_grad=True)
    extra = {"sample_ids": ids if with_ids else None} | ({"labels": labels} if with_labels else {})
    loss = loss_function(model(x1), model(x2), tau, rows_per_rank=sizes, **extra)
    loss.backward()
    answer = torch.cat([loss.detach().view(1), tau.grad.view(1), *(p.grad.flatten() for p in model.parameters())])
    dist.all_reduce(answer)
    answer = answer.double() / len(sizes)
    return answer[0], answer[2:], answer[1]


def gate_errors(loss_function, form, sizes, *, dtype, temperature=0.1, spread=1.0, with_ids=False):
    """The largest relative errors over ranks: loss, encoder's gradient, temperature's gradient."""
    want = expected(form, sum(sizes), temperature, spread, with_ids)
    arguments = (sizes, temperature, spread, dtype, with_ids, form == "supervised")
    answers = ranks(len(sizes)).run(on_ranks, loss_function, *arguments)
    return [max(float((a[k] - want[k]).norm() / want[k].norm()) for a in answers) for k in range(3)]


# --- C2: exact gradient ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_exact_on_any_number_of_ranks(sizes, dtype, tolerance):
    assert max(gate_errors(objective.nt_xent, "nt_xent", sizes, dtype=dtype)) <= tolerance


@pytest.mark.parametrize("sizes", [[12], [5, 7], [1, 6, 5]], ids=str)
@pytest.mark.parametrize("form", ["nt_xent", "decoupled", "supervised"])
def test_copies_of_an_image_and_variants(sizes, form):
    loss_function = getattr(objective, form)
    errors = gate_errors(loss_function, form, sizes, dtype=torch.float64, with_ids=form != "supervised")
    assert max(errors) <= 1e-12


@pytest.mark.parametrize("sizes", [[12], [5, 7]], ids=str)
def test_small_temperature_with_close_positives(sizes):
    gate = {"dtype": torch.float32, "temperature": 0.02, "spread": 0.02}
    assert max(gate_errors(objective.nt_xent, "nt_xent", sizes, **gate)) <= 1e-4


@pytest.mark.parametrize("temperature", [0.01, 0.002])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-3)])
def test_tiny_temperature(temperature, dtype, tolerance):  # exp(1 / temperature) is infinite in fp32
    gate = {"dtype": dtype, "temperature": temperature}
    assert max(gate_errors(objective.nt_xent, "nt_xent", [5, 7], **gate)) <= tolerance


@pytest.mark.parametrize(
    ("wrong", "sizes"),
    [
        ("gather_without_gradient", [6, 6]),
        ("local_loss_without_gradient", [6, 6]),
        ("mean_of_means", [5, 7]),
        ("self_mask_with_gradient", [6, 6]),
        ("self_mask_of_zero", [12]),
        ("unpadded_gather", [5, 7]),
    ],
)
def test_gate_turns_down_what_is_wrong(wrong, sizes):
    try:
        errors = gate_errors(getattr(wrong_objectives, wrong), "nt_xent", sizes, dtype=torch.float32)
    except RankFailed:
        return
    assert not max(errors) <= 1e-5


def test_gate_passes_what_is_right():
    assert max(gate_errors(wrong_objectives.mean_of_means, "nt_xent", [6, 6], dtype=torch.float64)) <= 1e-12
    assert max(gate_errors(wrong_objectives.textbook, "nt_xent", [12], dtype=torch.float64)) <= 1e-12


def test_gate_sees_copies_of_an_image():
    errors = gate_errors(wrong_objectives.textbook, "nt_xent", [12], dtype=torch.float64, with_ids=True)
    assert max(errors) > 1e-3


# --- one process: tiles, shapes, dtypes, other libraries -------------------------------------------------------


def gradients(loss, *inputs):
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


def pair(n, d, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, d, dtype=torch.float64, generator=generator).to(dtype).requires_grad_() for _ in range(2)]


@settings(deadline=None, max_examples=40)
@given(n=st.integers(2, 40), d=st.integers(1, 9), rows=st.integers(1, 33), width=st.integers(1, 9), data=st.data())
def test_any_shape_any_tile(n, d, rows, width, data):
    ids = torch.tensor(data.draw(st.lists(st.integers(-(2**62), 2**62) | st.just(7), min_size=n, max_size=n)))
    ids[0] = 3
    z1, z2 = pair(n, d)
    u = F.normalize(torch.stack([z1, z2], dim=1).flatten(0, 1), dim=1)
    s = u @ u.T / 0.3
    key, index = ids.repeat_interleave(2), torch.arange(2 * n)
    s_negative = s.masked_fill((key[:, None] == key) & (index[:, None] ^ 1 != index), -torch.inf)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "TILE_ROWS", rows)
        patch.setattr(tiles, "TILE_ENTRIES_CPU", rows * width)
        got = gradients(objective.nt_xent(z1, z2, 0.3, sample_ids=ids), z1, z2)
    torch.testing.assert_close(got, gradients(F.cross_entropy(s_negative, index ^ 1), z1, z2), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_is_computed_in_fp32(dtype):
    z1, z2 = pair(300, 32, dtype)
    wide = [z.detach().double().requires_grad_() for z in (z1, z2)]
    loss, *grads = gradients(objective.nt_xent(z1, z2, 0.1), z1, z2)
    want_loss, *want = gradients(wrong_objectives.textbook(*wide, torch.tensor(0.1)), *wide)
    assert loss.dtype == torch.float32
    assert abs(loss - want_loss) <= 1e-5 * want_loss
    for got, exact in zip(grads, want, strict=True):
        assert got.dtype == dtype
        assert (got.double() - exact).norm() <= 2 * torch.finfo(dtype).eps * exact.norm()


def test_nothing_cancels_where_positives_dominate():
    z1, noise = pair(16, 10)
    z2 = (z1 + 0.1 * noise).detach().requires_grad_()  # the loss is 7e-8: in fp32, LSE_i - s_i,p(i) is mostly rounding
    tau = torch.tensor(0.02, dtype=torch.float64, requires_grad=True)
    want = gradients(reference("nt_xent", z1, z2, tau), z1, z2, tau)
    inputs = [x.detach().float().requires_grad_() for x in (z1, z2, tau)]

    def error(loss_function):
        got = gradients(loss_function(*inputs), *inputs)
        return max(float((a - b).norm() / b.norm()) for a, b in zip(got, want, strict=True))

    assert error(objective.nt_xent) <= 1e-4
    assert error(wrong_objectives.textbook) > 1e-2


def test_temperature_of_one_element():
    tau = torch.tensor([0.1], requires_grad=True)
    objective.nt_xent(*pair(4, 3), tau).backward()
    assert tau.grad.shape == (1,)


def test_autocast_does_not_reach_inside():
    z1, z2 = pair(64, 16, torch.float32)
    want = gradients(objective.nt_xent(z1, z2, 0.1), z1, z2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = gradients(objective.nt_xent(z1, z2, 0.1), z1, z2)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_other_libraries_agree():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, on import
        from lightly.loss import DCLLoss, NTXentLoss
        from pytorch_metric_learning import losses

    z1, z2 = pair(50, 8)
    labels = torch.arange(50) % 7
    both, images = torch.cat([z1, z2]), torch.arange(50).repeat(2)
    for ours, theirs in [
        (objective.nt_xent(z1, z2, 0.2), NTXentLoss(temperature=0.2)(z1, z2)),
        (objective.nt_xent(z1, z2, 0.2), losses.NTXentLoss(temperature=0.2)(both, images)),
        (objective.decoupled(z1, z2, 0.2), DCLLoss(temperature=0.2)(z1, z2)),
        (objective.supervised(z1, z2, 0.2, labels), losses.SupConLoss(temperature=0.2)(both, labels.repeat(2))),
    ]:
        torch.testing.assert_close(gradients(ours, z1, z2), gradients(theirs, z1, z2), rtol=1e-6, atol=1e-9)


# --- cost: collectives, bytes, memory --------------------------------------------------------------------------


def counted(loss_function, n, d, dtype, with_ids):
    z1, z2 = pair(n, d, dtype, seed=distributed.rank())
    sizes = [n] * distributed.world_size()
    ids = torch.arange(n) + n * distributed.rank() if with_ids else None
    with Count() as forward:
        loss = loss_function(z1, z2, torch.tensor(0.1), rows_per_rank=sizes, sample_ids=ids)
    with Count() as backward:
        loss.backward()
    return forward.collectives, backward.collectives, max(forward.largest, backward.largest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_gather_of_z_one_of_lse_none_in_backward(dtype):
    n, d, width = 40, 128, torch.finfo(dtype).bits // 8
    for with_ids in (False, True):
        for forward, backward, _ in ranks(3).run(counted, objective.nt_xent, n, d, dtype, with_ids):
            assert backward == []
            assert [name for name, _ in forward] == ["allgather_base"] * 2
            assert [sent for _, sent in forward] == [2 * n * d * width + 8 * n * with_ids, 2 * n * 4]
            assert sum(sent for _, sent in forward) <= 1.02 * (2 * n * d * width + 2 * n * 4)


def test_the_count_sees_collectives_in_backward():
    for _, backward, _ in ranks(3).run(counted, wrong_objectives.mean_of_means, 4, 8, torch.float32, False):
        assert len(backward) == 1


def test_no_tensor_grows_with_the_square_of_the_batch():
    n, d = 2048, 8
    _, _, largest = counted(objective.nt_xent, n, d, torch.float32, True)
    assert largest <= max(tiles.TILE_ENTRIES_CPU, 2 * n * d + 2 * n)
    _, _, largest = counted(wrong_objectives.textbook, n, d, torch.float32, True)
    assert largest == (2 * n) ** 2


# --- bad input -------------------------------------------------------------------------------------------------


def bad_call(case, with_sizes=False):
    rank = distributed.rank()
    n, d, dtype, temperature, labels, ids = 4 + rank, 8, torch.float32, 0.1, None, None
    if rank == 1:
        d = 9 if case == "d" else d
        n = 0 if case == "empty" else n
        dtype = {"dtype": torch.float64, "integer": torch.int64}.get(case, dtype)
        temperature = {"tau 0": 0.0, "tau -1": -1.0, "tau nan": float("nan"), "tau differs": 0.2}.get(case, temperature)
        ids = torch.arange(n + 1) if case == "ids" else None
    z1, z2 = torch.zeros(2, n, d).to(dtype) + 1
    if case in ("nan", "inf") and rank == 1:
        z2[torch.tensor([0, 3]), 2] = float(case)
    if rank == 1 and case == "shapes":
        z2 = z2[:-1]
    call = {"rows_per_rank": [4, 5] if with_sizes else None, "validate": case in ("nan", "inf")}
    try:
        if labels is None:
            objective.nt_xent(z1, z2, temperature, sample_ids=ids, **call)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("d", "rank 1: expected the same as on rank 0"),
        ("dtype", "rank 1: expected the same as on rank 0"),
        ("integer", "rank 1: expected z1 and z2 of one dtype"),
        ("empty", "rank 1: expected z1 and z2 of one shape (n, d), n and d at least 1, got (0, 8)"),
        ("shapes", "rank 1: expected z1 and z2 of one shape"),
        ("ids", "rank 1: expected integer sample_ids of shape (5,)"),
        ("tau 0", "rank 1: expected a temperature of at least"),
        ("tau -1", "rank 1: expected a temperature of at least"),
        ("tau nan", "rank 1: expected a temperature of at least"),
        ("tau differs", "rank 1: expected the same as on rank 0"),
        ("nan", "NaN or infinity on rank 1, rows [0, 3]"),
        ("inf", "NaN or infinity on rank 1, rows [0, 3]"),
    ],
)
def test_bad_input_is_the_same_error_on_every_rank(case, words):
    first, second = ranks(2).run(bad_call, case, timeout=20)
    assert first == second
    assert first is not None
    assert words in first


def test_finite_input_validates():
    z1, z2 = pair(5, 3)
    assert torch.equal(objective.nt_xent(z1, z2, 0.1, validate=True), objective.nt_xent(z1, z2, 0.1))


def test_sizes_that_do_not_fit_are_an_error():
    with pytest.raises(ValueError, match=r"rows_per_rank of 1 ranks with 5 at 0, got \[4\]"):
        objective.nt_xent(*pair(5, 3), 0.1, rows_per_rank=[4])
    with pytest.raises(ValueError, match="at least two images"):
        objective.nt_xent(*pair(1, 3), 0.1)
