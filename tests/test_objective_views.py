"""NT-Xent, decoupled and supervised over any number of views: what test_objective.py holds for two."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dist_ssl import distributed, objective
from dist_ssl.objective import contrastive
from tests.counting import Count
from tests.pool import ranks

SIZES = [[12], [6, 6], [5, 7], [4, 4, 4], [1, 6, 5], [3, 3, 3, 3], [5, 1, 2, 4]]
FORMS = ["nt_xent", "decoupled", "supervised"]


def reference(form, z, temperature, ids, labels):
    """Every pair of views in one matrix: (n, V, d) of the global batch."""
    n, num_views, _ = z.shape
    u, image = F.normalize(z.flatten(0, 1), dim=1), torch.arange(n).repeat_interleave(num_views)
    s, same_image = u @ u.T / temperature, image[:, None] == image
    itself = torch.eye(len(u), dtype=torch.bool)
    if form == "supervised":
        labels = labels[image]
        positives = (same_image | (labels[:, None] == labels) & (labels[:, None] >= 0)) & ~itself
        denominator = ~itself
    else:
        positives, denominator = same_image & ~itself, ids[image][:, None] != ids[image]
        if form == "nt_xent":
            denominator = denominator | positives
    lse = s.masked_fill(~denominator, -torch.inf).logsumexp(dim=1)
    return (lse - s.masked_fill(~positives, 0).sum(dim=1) / positives.sum(dim=1)).mean()


def batch(total, num_views, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(total, num_views + 1, 6, dtype=torch.float64, generator=generator)
    ids = torch.arange(total) * 10**12
    ids[total // 2] = ids[0]  # an image that the batch holds twice
    return (x[:, :1] + x[:, 1:]).to(dtype), ids, torch.randint(-1, 3, (total,), generator=generator)


def share(loss, num_views, own, dtype, **arguments):
    """Loss, gradient of the temperature, gradient of an encoder, for images `own` of the global batch."""
    x, ids, labels = (part[own] for part in batch(12, num_views, dtype))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 5)).to(dtype)
    tau = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    value = loss(model(x), tau, ids, labels, **arguments)
    value.backward()
    return torch.cat([value.detach().view(1), tau.grad.view(1), *(p.grad.flatten() for p in model.parameters())])


def ours(form, z, tau, ids, labels, **rows):
    if form == "supervised":
        return objective.supervised_views(z, tau, labels, **rows)
    return getattr(objective, f"{form}_views")(z, tau, sample_ids=ids, **rows)


class Precisions(TorchDispatchMode):
    """What products of fp32 are allowed to be, at each of them."""

    def __init__(self):
        super().__init__()
        self.of_products = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if "mm" in function.name():
            self.of_products.append(torch.get_float32_matmul_precision())
        return function(*arguments, **keywords or {})


@pytest.mark.parametrize("num_views", [2, 3])
def test_products_inside_are_not_those_that_a_bf16_run_allows(num_views):
    z, ids, labels = batch(12, num_views, torch.float32)
    torch.set_float32_matmul_precision("high")
    try:
        with Precisions() as seen:
            ours("nt_xent", z.requires_grad_(), 0.1, ids, labels).backward()
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen.of_products == ["highest"] * (3 * (num_views - 1))  # of three views also those within an image


def on_ranks(form, num_views, sizes, dtype):
    start = sum(sizes[: distributed.rank()])
    own = slice(start, start + sizes[distributed.rank()])
    answer = share(functools.partial(ours, form), num_views, own, dtype, rows_per_rank=sizes)
    dist.all_reduce(answer)
    return answer.double() / len(sizes)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("num_views", [2, 3, 8])
@pytest.mark.parametrize("form", FORMS)
def test_exact_on_any_number_of_ranks(form, num_views, dtype, tolerance):
    want = share(functools.partial(reference, form), num_views, slice(None), torch.float64)
    for sizes in SIZES:
        for got in ranks(len(sizes)).run(on_ranks, form, num_views, sizes, dtype):
            for part in (slice(0, 1), slice(1, 2), slice(2, None)):
                assert (got[part] - want[part]).norm() <= tolerance * want[part].norm(), (sizes, part)


def inputs(n, num_views, dtype=torch.float64, d=6):
    z = torch.randn(n, num_views, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return z.to(dtype).requires_grad_()


@pytest.mark.parametrize("form", FORMS)
def test_two_views_are_the_functions_of_two_views(form):
    z, labels = inputs(20, 2, torch.float32), torch.arange(20) % 3
    extra = {"labels": labels} if form == "supervised" else {"sample_ids": labels}
    got, want = (
        getattr(objective, f"{form}_views")(z, 0.1, **extra),
        getattr(objective, form)(*z.unbind(1), 0.1, **extra),
    )
    assert torch.equal(got, want)
    assert torch.equal(*(torch.autograd.grad(x, z)[0] for x in (got, want)))


@pytest.mark.parametrize("form", FORMS)
def test_chunks_of_views(form, monkeypatch):
    want = share(functools.partial(ours, form), 3, slice(None), torch.float64)
    monkeypatch.setattr(contrastive, "CHUNK_VIEWS", 7)  # two images a chunk
    got = share(functools.partial(ours, form), 3, slice(None), torch.float64)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


def test_distinct_labels_are_nt_xent():
    z = inputs(9, 4)
    torch.testing.assert_close(objective.supervised_views(z, 0.2, torch.arange(9)), objective.nt_xent_views(z, 0.2))


def counted(num_views):
    z = inputs(20, num_views, torch.float32)
    with Count() as forward:
        loss = objective.nt_xent_views(z, 0.1, rows_per_rank=[20] * distributed.world_size())
    with Count() as backward:
        loss.backward()
    return forward.collectives, backward.collectives


def test_one_gather_of_z_one_of_lse_none_in_backward():
    for forward, backward in ranks(3).run(counted, 8):
        assert forward == [("allgather_base", 8 * 20 * 6 * 4), ("allgather_base", 8 * 20 * 4)]
        assert backward == []


def test_bad_input():
    z = inputs(5, 3)
    with pytest.raises(ValueError, match=r"rank 0: expected z of one shape \(n, V, d\), n and d at least 1"):
        objective.nt_xent_views(z[0], 0.1)
    with pytest.raises(ValueError, match="expected a number of views of at least 2, got 1"):
        objective.nt_xent_views(z[:, :1], 0.1)
    bad = z.detach().clone()
    bad[3, 1, 0] = torch.nan
    with pytest.raises(ValueError, match=r"NaN or infinity on rank 0, rows \[3\]"):
        objective.decoupled_views(bad, 0.1, validate=True)
