"""Diagnostics against numpy and loops; alarms on what they are for; the online probe on one rank and on three."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dist_ssl.training.diagnostics import alarms, diagnose, effective_rank
from dist_ssl.training.online_probe import OnlineProbe, exchange
from tests.counting import Count, wire_bytes
from tests.pool import ranks


@pytest.mark.parametrize("shape", [(40, 17), (17, 40), (30, 30)])
def test_effective_rank_is_numpys(shape):
    x = np.random.default_rng(0).normal(size=shape)
    singular = np.linalg.svd(x, compute_uv=False)
    shares = singular / singular.sum() + 1e-7
    assert float(effective_rank(torch.from_numpy(x))) == pytest.approx(
        np.exp(-(shares * np.log(shares)).sum()), rel=1e-6
    )


def test_effective_rank_of_one_direction_is_one_in_fp32():
    x = torch.randn(512, 1) @ torch.randn(1, 2048)
    assert 1.0 <= float(effective_rank(x)) < 1.01
    assert float(effective_rank(torch.zeros(8, 4))) == pytest.approx(1.0, abs=1e-4)


def pair(z1, z2):
    return torch.stack([z1, z2], dim=1)


def test_diagnose_is_the_naive_loops():
    torch.manual_seed(0)
    h, z1, z2 = torch.randn(12, 2, 9).relu(), torch.randn(12, 6), torch.randn(12, 6)
    h[..., 3] = 0
    found = diagnose(h, pair(z1, z2), loss=2.0, num_views=24, temperature=0.5, gradient_norm=torch.tensor(3.0))
    u, v = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    views = [(row, i) for part in (u, v) for i, row in enumerate(part)]
    others = [(a, b) for a, i in views for b, j in views if i != j]
    assert found["alignment"] == pytest.approx(
        np.mean([float((a - b).square().sum()) for a, b in zip(u, v, strict=True)]), rel=1e-5
    )
    assert found["positive_similarity"] == pytest.approx(
        np.mean([float(a @ b) for a, b in zip(u, v, strict=True)]), abs=1e-6
    )
    assert found["negative_similarity"] == pytest.approx(np.mean([float(a @ b) for a, b in others]), abs=1e-6)
    potential = np.mean([math.exp(-2 * float((a - b).square().sum())) for a, b in others])
    assert found["uniformity"] == pytest.approx(math.log(potential), rel=1e-5)
    assert found["loss_gap"] == pytest.approx(math.log(23) - 2.0)
    assert found["dead_units_h"] == pytest.approx(1 / 9)
    assert found["gradient_norm"] == 3.0
    assert all(isinstance(value, float) for value in found.values())


def test_alarms_say_what_to_try():
    torch.manual_seed(0)
    n, h = 64, torch.rand(64, 2, 32)
    healthy = torch.randn(n, 16)
    near = healthy + 0.5 * torch.randn(n, 16)
    late = {"step": 1000.0}
    assert alarms(diagnose(h, pair(healthy, near), loss=2.0, num_views=2 * n) | late) == []
    one_point = torch.ones(n, 16) + 1e-3 * torch.randn(n, 16)
    one_line = torch.randn(n, 1) @ torch.randn(1, 16) + 1e-3 * torch.randn(n, 16)
    cases = {
        "collapse": diagnose(h, pair(one_point, one_point)),
        "dimensional collapse": diagnose(h, pair(one_line, one_line)),
        "nothing learned": diagnose(h, pair(healthy, near), loss=math.log(2 * n - 1), num_views=2 * n),
        "saturated": diagnose(h, pair(healthy, healthy)),
        "dead units": diagnose(torch.zeros(n, 2, 32), pair(healthy, near)),
        "not finite": {"loss_gap": float("nan")},
    }
    for start, metrics in cases.items():
        said = alarms(metrics | late)
        assert said[0].startswith(start), (start, said)
        assert "try" in said[0]
    assert alarms(cases["collapse"] | {"step": 10.0}) == []


def _trained_probe(rows_per_rank, steps):
    from dist_ssl.distributed import rank

    probe = OnlineProbe(5, {"h": 12, "z": 4})
    start = sum(rows_per_rank[: rank()])
    mine = slice(start, start + rows_per_rank[rank()])
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(12, 5, generator=generator)
    for _ in range(steps):
        h = torch.randn(64, 12, generator=generator)
        labels = (h @ direction).argmax(1)
        labels[::7] = -1
        probe.update({"h": 3 * h[mine] + 2, "z": h[mine, :4]}, labels[mine])
    return {name: value.clone() for name, value in probe.state_dict().items()}, probe.metrics()


def test_online_probe_learns_and_is_the_same_on_any_number_of_ranks():
    alone, metrics = _trained_probe([64], 200)
    assert metrics["online_accuracy_h"] > 0.8
    assert 0.2 < metrics["online_accuracy_z"] < metrics["online_accuracy_h"]
    for state, _ in ranks(3).run(_trained_probe, [30, 1, 33], 20):
        single, _ = _trained_probe([64], 20)
        for name, value in single.items():
            assert torch.allclose(state[name], value, rtol=1e-3, atol=1e-5), name
    restored = OnlineProbe(5, {"h": 12, "z": 4})
    restored.load_state_dict(alone)
    assert restored.metrics() == metrics


def _spread_probe(rows_per_rank, state):
    """A probe of 150 classes after 8 steps: its whole state, what it says, and the collectives of a step."""
    from dist_ssl.distributed import rank

    probe = OnlineProbe(150, {"h": 12, "z": 4}, rows_per_rank)
    if state:
        probe.load_state_dict(state)
    start = sum(rows_per_rank[: rank()])
    mine = slice(start, start + rows_per_rank[rank()])
    generator = torch.Generator().manual_seed(len(state))
    for _ in range(8):
        h = torch.randn(64, 12, generator=generator)
        labels = torch.randint(-1, 150, (64,), generator=generator)
        labels[:9] = 0  # of equal logits, which all are at first, the first is the answer
        with Count() as count:
            probe.update({"h": 3 * h[mine] + 2, "z": h[mine, :4]}, labels[mine])
    return dict(probe.whole_state()), probe.metrics(), count.collectives, probe.h_weight.shape[1]


@pytest.mark.parametrize("rows", [[40, 24], [30, 1, 33], [16] * 4])
def test_ranks_that_share_classes_learn_what_one_learns(rows):
    size = len(rows)
    alone, metrics, called, _ = _spread_probe([64], {})
    assert called == []
    assert metrics["online_accuracy_h"] > 0.01
    spread, sent = exchange(150, (12, 4), 64, size)
    assert spread
    found = ranks(size).run(_spread_probe, rows, {})
    assert [held for *_, held in found] == [150 * (r + 1) // size - 150 * r // size for r in range(size)]
    for state, told, called, _ in found:
        assert told == pytest.approx(metrics)
        for name, value in alone.items():
            assert torch.allclose(state[name], value, rtol=1e-3, atol=1e-5), name
        assert [name for name, _ in called] == ["allgather_base", "allreduce", "allreduce"]
        padded = (size * max(rows) - 64) * 17 * 4 * (size - 1) / size
        assert wire_bytes(called, size) == pytest.approx(sent + padded)
    # What several ranks saved one goes on with, and the other way round.
    goes_on = _spread_probe([64], found[0][0])[0]
    for state, *_ in ranks(size).run(_spread_probe, rows, alone):
        assert all(torch.allclose(state[name], value, rtol=1e-3, atol=1e-5) for name, value in goes_on.items())


def test_classes_are_shared_where_that_sends_less():
    few, many = (exchange(classes, (2048, 128), 4096, 1024) for classes in (1000, 21_841))
    assert not few[0]
    assert many[0]
    assert few[1] == pytest.approx(17.4e6, rel=0.01)
    assert many[1] == pytest.approx(35.8e6, rel=0.01)  # where the gradients' all-reduce would send 380 MB
    assert not exchange(21_841, (2048, 128), 4096, 1)[0]
    assert not exchange(6, (2048, 128), 8, 8)[0], "a class a rank at least"


def test_online_probe_takes_no_gradient_and_ignores_unlabelled_batches():
    probe = OnlineProbe(3, {"h": 4})
    h = torch.randn(8, 4, requires_grad=True)
    before = {name: value.clone() for name, value in probe.state_dict().items()}
    probe.update({"h": h}, torch.full((8,), -1))
    assert all(torch.equal(value, probe.state_dict()[name]) for name, value in before.items())
    assert probe.metrics() == {}
    probe.update({"h": h}, torch.arange(8) % 3)
    assert h.grad is None
    assert set(probe.metrics()) == {"online_accuracy_h"}
    assert not list(probe.parameters())
