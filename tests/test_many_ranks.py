"""What must not grow on one rank with their number; and the benchmark of many ranks, on few."""

import json
import os
from pathlib import Path

import pytest

from dist_ssl import distributed
from dist_ssl.training.observability import ledgers_of, trim_run
from tests.benchmarks import many_ranks
from tests.pool import ranks


def trimmed_by_this_rank(run_dir: Path) -> list[str]:
    """Names of the files that were replaced, each by one that was on the disk."""
    ledgers = distributed.broadcast_object(ledgers_of(run_dir))
    mine, synced, replace, fsync = [], set(), os.replace, os.fsync
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: (synced.add(os.readlink(f"/proc/self/fd/{file}")), fsync(file)))
        patch.setattr(os, "replace", lambda *names: (mine.append(names), replace(*names)))
        trim_run(run_dir, 3, ledgers)
    assert {os.path.realpath(source) for source, _ in mine} <= synced
    return sorted(Path(target).name for _, target in mine)


def test_each_rank_trims_its_own_ledger_and_a_share_of_those_left_over(tmp_path):
    names = ["metrics.jsonl", *(f"ledger-rank{number}.jsonl" for number in range(5))]
    for name in names:
        (tmp_path / name).write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 6)))
    of_0, of_1 = ranks(2).run(trimmed_by_this_rank, tmp_path)
    assert of_0 == ["ledger-rank0.jsonl", "ledger-rank2.jsonl", "ledger-rank4.jsonl", "metrics.jsonl"]
    assert of_1 == ["ledger-rank1.jsonl", "ledger-rank3.jsonl"]
    assert all(len((tmp_path / name).read_text().splitlines()) == 3 for name in names)


@pytest.mark.slow
def test_a_rank_is_killed_and_other_ranks_go_on_as_planned(tmp_path):
    said: list[str] = []
    holds, table = many_ranks.compare(tmp_path, ranks=3, then=2, stages=(1, 3), steps=6, say=said.append)
    assert holds, (said, [list(column.cells) for column in table.columns])
