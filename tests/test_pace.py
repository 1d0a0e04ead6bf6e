"""A straggler is named: per-rank seconds in metrics.jsonl, a warning with rank and node, curves in the report."""

import json
import platform
import time
from unittest import mock

import pytest

from dist_ssl import distributed
from dist_ssl.report.curves import curves
from dist_ssl.report.runs import read_run
from dist_ssl.training import step as step_module
from tests.counting import Count
from tests.pool import ranks
from tests.trajectory import pretrain_warnings, small_config


def with_a_slow_rank(config, slow_rank: int) -> tuple[list[str], int]:
    """(warnings, collectives called) of this rank, in a run where making the views takes one rank 0.4 s more."""
    real = step_module.augment

    def slow(*arguments):
        if distributed.rank() == slow_rank:
            time.sleep(0.4)
        return real(*arguments)

    with mock.patch.object(step_module, "augment", slow), Count() as count:
        said = pretrain_warnings(config)
    return said, len(count.collectives)


@pytest.mark.slow
def test_a_straggler_is_named_by_a_gather_when_a_step_is_logged(small_shards, tmp_path):
    overrides = ["train.steps=6", "log.every_steps=2", "checkpoint.every_steps=6", "diagnostics.online_probe=false"]
    config = small_config(tmp_path / "run", small_shards, *overrides)
    (said, often), *others = ranks(2).run(with_a_slow_rank, config, 1)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert "slowest_rank" not in lines[0]  # warming up
    for line in lines[1:]:
        assert line["slowest_rank"] == 1
        assert line["rank_seconds_max"] > 0.4 > line["rank_seconds_median"] >= line["rank_seconds_min"]
    slow = [one for one in said if "is slow" in one]
    assert len(slow) == 2
    assert f"rank 1 on {platform.node()} is slow" in slow[0]
    assert not any("is slow" in one for warnings, _ in others for one in warnings)
    html = curves([read_run(tmp_path / "run")])
    assert "own seconds a step" in html
    assert "Slowest rank" in html
    seldom = small_config(tmp_path / "seldom", small_shards, *overrides, "log.every_steps=6")
    fewer = ranks(2).run(with_a_slow_rank, seldom, 1)[0][1]
    assert 0 < often - fewer <= 2 * 3  # a gather and the names, of the two logged steps that there are more
