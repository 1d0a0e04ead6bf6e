"""What the objectives beside NT-Xent send and how large their tensors get; and the input that they refuse."""

from __future__ import annotations

import functools

import pytest
import torch

from dist_ssl import distributed, objective
from dist_ssl.objective import covariance, gaussian, tiles
from tests.counting import Count
from tests.pool import ranks
from tests.reference_objectives import NAMES, SLICES, call, inputs

# --- cost: collectives, bytes, memory --------------------------------------------------------------------------


def counted(case, n, d, dtype):
    z1, z2, k1, k2 = inputs(4, n, d, dtype, seed=distributed.rank())
    z1.requires_grad_()
    z2.requires_grad_()
    loss = getattr(objective, case.split()[0])
    with Count() as forward:
        value = call(case, loss, z1, z2, k1, k2, rows_per_rank=[n] * distributed.world_size())
    with Count() as backward:
        value.backward()
    sent = forward.wire_bytes(distributed.world_size())
    return forward.collectives, sent, backward.collectives, max(forward.largest, backward.largest)


@pytest.mark.parametrize(
    ("n", "d", "dtype"), [(20, 16, torch.float32), (20, 96, torch.float32), (8, 40, torch.bfloat16)]
)
@pytest.mark.parametrize("name", ["vicreg", "barlow_twins"])
def test_z_or_sums_travel_whichever_is_less(name, n, d, dtype):
    width = dtype.itemsize
    for collectives, sent, backward, _ in ranks(3).run(counted, name, n, d, dtype):
        gathered, promised = covariance.exchange(name, [n] * 3, d, dtype)
        z, small = ("allgather_base", 2 * n * d * width), ("allreduce", 2 * d * 4)
        by_gather, by_sums = [z, small][: 1 + (name == "barlow_twins")], [small, ("allreduce", (d + 2) * d * 4)]
        assert collectives == (by_gather if gathered else by_sums)
        assert gathered == (3 * n <= d)
        assert abs(sent - promised) <= 1
        assert backward == []


def test_the_exchange_is_the_lesser_of_both():
    for name in ("vicreg", "barlow_twins"):
        for rows, d, dtype in [
            ([128] * 8, 8192, torch.bfloat16),
            ([256] * 8, 128, torch.float32),
            ([9, 8], 12, torch.float64),
        ]:
            _, sent = covariance.exchange(name, rows, d, dtype)
            share, wide = (len(rows) - 1) / len(rows), max(4, dtype.itemsize)
            z = share * len(rows) * max(rows) * 2 * d * dtype.itemsize + (name == "barlow_twins") * share * 4 * d * wide
            assert abs(sent - min(z, 2 * share * (d + 4) * d * wide)) <= 1
    assert covariance.exchange("vicreg", [64], 128, torch.float32) == (True, 0)


@pytest.mark.parametrize(
    ("case", "collectives"),
    [
        ("moco_v3", [("allgather_base", 2 * 20 * 16 * 4)]),
        ("byol", []),
        ("simsiam", []),
        ("sigreg", [("allreduce", 2 * SLICES * 8 * 8)]),
        ("sigreg 8", [("allreduce", 8 * 2 * SLICES * 8 * 8)]),
    ],
)
def test_what_is_sent_forward_and_nothing_backward(case, collectives):
    for forward, _, backward, _ in ranks(3).run(counted, case, 20, 16, torch.float32):
        assert (forward, backward) == (collectives, [])


def test_no_tensor_grows_with_a_square():
    _, _, _, largest = counted("moco_v3", 2048, 8, torch.float32)
    assert largest <= max(tiles.TILE_ENTRIES_CPU, 2 * 2048 * 8)
    _, _, _, largest = counted("sigreg 2", 2**15, 2, torch.float32)  # n K alone would be 2^18
    assert largest <= 2 * gaussian.TILE_ENTRIES_CPU
    for name in ("vicreg", "barlow_twins"):
        _, _, _, largest = counted(name, 8, 1024, torch.float32)
        assert largest <= 2 * 8 * 1024


# --- bad input -------------------------------------------------------------------------------------------------


def bad_calls():
    """The error of each objective, for each kind of bad input on rank 1."""
    second, answers = distributed.rank() == 1, {}

    def message(function):
        try:
            function()
        except ValueError as error:
            return str(error)
        return None

    for case in ("right", "d", "dtype", "empty", "shapes", "integer"):
        d, n, dtype = 6 + (case == "d" and second), 4 * (case != "empty" or not second), torch.float32
        if second and case in ("dtype", "integer"):
            dtype = {"dtype": torch.float64, "integer": torch.int64}[case]
        z1, z2, k1, k2 = (x.to(dtype) for x in torch.ones(4, n, d))
        if second and case == "shapes":
            z2 = z2[:-1]
        for name in NAMES if case != "shapes" else [x for x in NAMES if x != "sigreg"]:
            loss, target = getattr(objective, name), functools.partial(torch.ones, n, d, dtype=dtype)
            if name == "simsiam":
                answers[case, name] = message(functools.partial(loss, z1, z2, target(), target()))
            else:
                answers[case, name] = message(functools.partial(call, name, loss, z1, z2, k1, k2))
    z = torch.ones(4, 6)
    answers["step", "sigreg"] = message(lambda: objective.sigreg(z, 0, 7 + second))
    answers["temperature", "moco_v3"] = message(lambda: objective.moco_v3(z, z, z, z, 0.1 * (1 - second)))
    answers["weight", "vicreg"] = message(lambda: objective.vicreg(z, z, variance=1.0 - 2 * second))
    return answers


def test_bad_input_is_the_same_error_on_every_rank():
    first, second = ranks(2).run(bad_calls, timeout=30)
    assert first == second
    words = {
        "d": "rank 1: expected the same as on rank 0",
        "dtype": "rank 1: expected the same as on rank 0",
        "empty": "rank 1: expected ",
        "shapes": "and (3, 6)",
        "integer": "of one dtype among",
        "step": "'step': 7",
        "temperature": "moco_v3: rank 1: expected a temperature of at least 0.002, got 0.0",
        "weight": "vicreg: rank 1: expected a variance of at least 0.0, got -1.0",
    }
    for (case, name), message in first.items():
        if case == "right":
            assert message is None
        else:
            assert message.startswith(f"{name}: rank 1: expected"), (case, name, message)
            assert words[case] in message, (case, name)


def test_input_that_one_rank_sees():
    z = torch.ones(5, 3)
    for name in NAMES:
        with pytest.raises(ValueError, match=rf"{name}: expected rows_per_rank of 1 ranks with 5 at 0, got \[4\]"):
            call(name, getattr(objective, name), z, z, z, z, rows_per_rank=[4])
        with pytest.raises(ValueError, match=f"{name}: expected at least two images"):
            call(name, getattr(objective, name), *[z[:1]] * 4)
    with pytest.raises(ValueError, match="odd num_points"):
        objective.sigreg(z, 0, 0, num_points=16)
    with pytest.raises(ValueError, match=r"expected z of one shape \(n, d\)"):
        objective.sigreg(z[0], 0, 0)
    with pytest.raises(ValueError, match=r"got torch.float32 and torch.float64"):
        objective.byol(z, z, z.double(), z.double())
