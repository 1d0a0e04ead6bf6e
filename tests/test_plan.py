"""The plan, held against a naive one that lays out whole epochs, for any sizes."""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_ssl.config import UserError
from dist_ssl.data.plan import Plan, check_batch_size
from dist_ssl.data.random import key_of, permutation, permuted, words
from tests.pool import RankFailed, ranks
from tests.trajectory import pretrain, pretrain_warnings, small_config

COUNTS = st.lists(st.integers(0, 12), min_size=1, max_size=9).filter(lambda counts: sum(counts) > 0)
SEEDS, STREAMS, BLOCKS = st.integers(0, 2**63 - 1), st.integers(1, 9), st.integers(1, 5)
FAST = settings(max_examples=150, deadline=None)


def naive_place(key: tuple[int, int], place: int, size: int, block: int, epoch: int, stream: int) -> int:
    """One place of the permutation inside a block, by Python's whole numbers and numpy's own Philox."""
    counter = (block << 64 | epoch << 128 | (1 + stream) << 192) - 1
    generator = np.random.Philox(key=key[0] | key[1] << 64, counter=counter % 2**256)
    keys = [int(word) for word in generator.random_raw(8)]
    a = math.ceil(math.sqrt(size))
    b = math.ceil(size / a)

    def mixed(word: int, value: int, limit: int) -> int:
        x = (word + value * 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return ((x ^ x >> 31) >> 32) * limit >> 32

    while size > 1:
        row, column = divmod(place, b)
        for i in range(0, 8, 2):
            row = (row + mixed(keys[i], column, a)) % a
            column = (column + mixed(keys[i + 1], row, b)) % b
        place = row * b + column
        if place < size:
            break
    return place


def naive_epoch(counts: list[int], seed: int, streams: int, block_shards: int, epoch: int) -> list[tuple[int, int]]:
    """(shard, member) of every position of an epoch, by building the line, the streams and the blocks as lists."""
    key = key_of("plan", seed, "hash")
    order = permutation(key, len(counts), 0, epoch, 0).tolist()
    line = [(slot, shard, member) for slot, shard in enumerate(order) for member in range(counts[shard])]
    quotient, remainder = divmod(len(line), streams)
    parts, start = [], 0
    for stream in range(streams):
        part = line[start : start + quotient + (stream < remainder)]
        start += len(part)
        blocks: dict[int, list[tuple[int, int, int]]] = {}
        for item in part:
            blocks.setdefault((item[0] - part[0][0]) // block_shards, []).append(item)
        shuffled = []
        for number, block in blocks.items():
            size = len(block)
            shuffled += [block[naive_place(key, i, size, number, epoch, stream)] for i in range(size)]
        parts.append(shuffled)
    rows = [[part[row] for part in parts if row < len(part)] for row in range(quotient + 1)]
    return [(shard, member) for row in rows for _, shard, member in row]


@FAST
@given(COUNTS, SEEDS, STREAMS, BLOCKS)
def test_plan_is_the_naive_one(counts: list[int], seed: int, streams: int, block_shards: int) -> None:
    plan = Plan(counts, seed, "hash", streams, block_shards)
    for epoch in (0, 3):
        positions = np.arange(plan.num_samples) + epoch * plan.num_samples
        epochs, shards, members = plan.locate(positions)
        assert (epochs == epoch).all()
        located = list(zip(shards.tolist(), members.tolist(), strict=True))
        assert located == naive_epoch(counts, seed, streams, block_shards, epoch)
        assert sorted(located) == [(shard, m) for shard, count in enumerate(counts) for m in range(count)]


@FAST
@given(COUNTS, SEEDS, STREAMS, BLOCKS, st.data())
def test_one_order_whatever_the_ranks_and_batches(
    counts: list[int], seed: int, streams: int, block_shards: int, data: st.DataObject
) -> None:
    """A run that changes its world size and chunks at every step consumes each sample once an epoch, in one order."""
    cursor, length = 0, 2 * sum(counts) + 3
    consumed: list[int] = []
    while cursor < length:
        batch_size = data.draw(st.integers(1, length))
        world_size = data.draw(st.integers(1, batch_size))
        chunks = data.draw(st.integers(1, batch_size // world_size))
        plan = Plan(counts, seed, "hash", streams, block_shards)  # a resumed run has a new one
        batch = plan.batch(cursor, batch_size)
        parts = [plan.rank_batch(cursor, batch_size, r, world_size, chunks) for r in range(world_size)]
        sizes = plan.rows_per_rank(batch_size, world_size, chunks)
        assert [len(part) for part in parts] == np.sum(sizes, axis=0).tolist()
        assert min(map(min, sizes)) >= 1
        for j in range(chunks):  # chunk j is rows j::chunks, whatever the ranks
            of_chunk = [part[sum(s[r] for s in sizes[:j]) :][: sizes[j][r]] for r, part in enumerate(parts)]
            assert np.concatenate(of_chunk).tolist() == batch[j::chunks].tolist()
        consumed += sorted(batch.tolist())
        cursor += batch_size
    assert consumed == list(range(cursor))


@FAST
@given(COUNTS, SEEDS, STREAMS, BLOCKS, st.integers(0, 500))
def test_upcoming_shards_hold_what_comes(
    counts: list[int], seed: int, streams: int, block_shards: int, cursor: int
) -> None:
    plan = Plan(counts, seed, "hash", streams, block_shards)
    cursor %= 2 * plan.num_samples
    current, following = plan.upcoming_shards(cursor, range(streams), 2)
    remaining = plan.num_samples - cursor % plan.num_samples  # a stream's next row is within the epoch, if it has one
    positions = np.arange(cursor, cursor + min(streams, remaining))
    assert set(plan.locate(positions)[1].tolist()) <= {*current, *following}
    assert len({*current, *following}) == len(current) + len(following)


def test_batch_is_sorted_by_stream_so_that_ranks_keep_to_theirs() -> None:
    plan = Plan([100] * 64, 0, "hash", 16, 2)
    shards_of = [set(), set()]  # type: ignore[var-annotated]
    for step in range(6):
        for rank in range(2):
            positions = plan.rank_batch(step * 64, 64, rank, 2)
            assert set(positions % plan.num_samples % 16) <= set(range(8 * rank, 8 * rank + 8))
            shards_of[rank] |= set(plan.locate(positions)[1].tolist())
    assert len(shards_of[0] & shards_of[1]) <= 2


def test_epochs_seeds_and_data_sets_differ() -> None:
    def order(seed: int = 0, data: str = "hash", epoch: int = 0) -> list[tuple[int, int]]:
        plan = Plan([50] * 8, seed, data, 4, 2)
        _, shards, members = plan.locate(np.arange(400) + epoch * 400)
        return list(zip(shards.tolist(), members.tolist(), strict=True))

    orders = [order(), order(epoch=1), order(seed=1), order(data="other")]
    assert order() == orders[0]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert sum(a == b for a, b in zip(one, other, strict=True)) < 20


def test_the_order_never_changes() -> None:
    """Golden: a run that resumes on another version must read the same samples."""
    plan = Plan([5, 3, 7, 2], 11, "hash", 3, 2)
    _, shards, members = plan.locate(np.arange(17, 27))
    assert list(zip(shards.tolist(), members.tolist(), strict=True)) == GOLDEN
    assert plan.batch(17, 10).tolist() == [17, 20, 23, 26, 18, 21, 24, 19, 22, 25]


GOLDEN = [(2, 0), (2, 1), (3, 0), (0, 3), (2, 2), (1, 2), (0, 0), (2, 4), (1, 0), (0, 1)]


def test_a_batch_smaller_than_the_world_is_refused() -> None:
    plan = Plan([10], 0, "hash", 2, 1)
    with pytest.raises(UserError, match="global batch of 5 for 3 ranks and 2 chunks"):
        plan.rows_per_rank(5, 3, 2)
    with pytest.raises(UserError, match="shards that hold samples"):
        Plan([0, 0], 0, "hash", 2, 1)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 64, 1000, 40_000])
def test_a_block_is_permuted_evenly(size: int) -> None:
    """Each place goes once, and to everywhere alike: under many keys, counts are those of a fair draw."""
    times = 4000 if size < 100 else 40
    keys = words(key_of("even", size), 8 * times, 0).reshape(times, 1, 8)
    places = np.broadcast_to(np.arange(size), (times, size))
    found = permuted(
        np.broadcast_to(keys, (times, size, 8)).reshape(-1, 8), places.ravel(), np.full(times * size, size)
    ).reshape(times, size)
    assert (np.sort(found, axis=1) == np.arange(size)).all()
    if size in (3, 4):  # every permutation, and evenly: chi-square within 5 standard deviations
        counts = np.unique(found, axis=0, return_counts=True)[1]
        free = math.factorial(size) - 1
        assert len(counts) == free + 1
        assert ((counts - times / (free + 1)) ** 2).sum() / (times / (free + 1)) < free + 5 * math.sqrt(2 * free)
    elif size > 4:
        # Of two places, neighbours before: how far they are apart after is as for a random pair, |i - j| ~ size / 3.
        apart = np.abs(np.diff(found, axis=1)) / size
        assert abs(apart.mean() - (1 + 1 / size) / 3) < 5 * 0.24 / math.sqrt(apart.size / 2)
        for part in np.array_split(found, min(size, 16), axis=1):
            assert abs(part.mean() / (size - 1) - 0.5) < 5 * 0.29 / math.sqrt(part.size)


@pytest.mark.parametrize("counts", [[10_000] * 10_000, [1_000] * 100_000])
def test_a_hundred_million_samples_take_milliseconds(counts: list[int]) -> None:
    """Setting up, and seeking to any position: under 50 ms each of CPU time, since others use this machine."""
    array = np.array(counts)
    setting_up, seeking = [], []
    for attempt in range(7):
        started = time.process_time()
        plan = Plan(array, attempt, "hash", 64, 4)
        plan.locate(np.arange(1) + attempt * 10**9)
        setting_up.append(time.process_time() - started)
        started = time.process_time()
        plan.locate(plan.rank_batch(123_456_789 + attempt * 10**9, 4096, 0, 1))
        seeking.append(time.process_time() - started)
    print(f"set-up {min(setting_up) * 1e3:.1f} ms, seek {min(seeking) * 1e3:.1f} ms")
    assert min(setting_up) < 0.05
    assert min(seeking) < 0.05


def test_a_batch_larger_than_the_data_is_told_of_and_refused_beyond_twice(caplog: pytest.LogCaptureFixture) -> None:
    check_batch_size(90, 90, rank=0)
    check_batch_size(180, 90, rank=1)
    assert caplog.records == []
    check_batch_size(180, 90, rank=0)
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.startswith(
        "train.global_batch_size = 180, but data.shards holds 90 samples: each batch holds some images"
    )
    with pytest.raises(
        UserError, match=r"global_batch_size = 181, but data.shards holds 90 samples: expected at most 90"
    ):
        check_batch_size(181, 90, rank=1)


def test_a_run_asks_before_it_makes_its_directory(tmp_path: Path, small_shards: Path) -> None:
    with pytest.raises(RankFailed, match=r"UserError: train.global_batch_size = 181, but data.shards holds 90"):
        ranks(2).run(pretrain, small_config(tmp_path / "run", small_shards, "train.global_batch_size=181"))
    assert not (tmp_path / "run").exists()
    warnings = ranks(2).run(
        pretrain_warnings,
        small_config(tmp_path / "run", small_shards, "train.global_batch_size=91", "train.steps=1"),
    )
    assert [sum("holds 90 samples" in said for said in of_rank) for of_rank in warnings] == [1, 0]
