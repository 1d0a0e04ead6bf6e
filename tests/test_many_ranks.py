"""The benchmark of many ranks, on few."""

import pytest

from tests.benchmarks import many_ranks


@pytest.mark.slow
def test_a_rank_is_killed_and_other_ranks_go_on_as_planned(tmp_path):
    holds, said, table = many_ranks.compare(tmp_path, ranks=3, then=2, stages=(1, 3), steps=6)
    assert holds, (said, [list(column.cells) for column in table.columns])
