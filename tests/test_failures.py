"""dist-ssl plan --mtbf-hours: the formulas against runs that fail by a random generator's clock."""

import math

import numpy as np
import pytest

from dist_ssl.planning import failures
from dist_ssl.planning.failures import Reliability

HOUR = 3600.0


def simulated(interval: float, stall: float, between: float, lost: float, segments: int = 20_000) -> float:
    """Wall time over work, of a run that goes through its segments one by one and fails meanwhile."""
    generator = np.random.default_rng(0)
    wall, next_failure = 0.0, generator.exponential(between)
    for _ in range(segments):
        begin = wall
        while next_failure < begin + interval + stall:  # in the work, in the save, or in the restart before them
            begin = next_failure + lost
            next_failure += generator.exponential(between)
        wall = begin + interval + stall
    return wall / (segments * interval)


@pytest.mark.parametrize(("stall", "between", "lost"), [(5.0, 2 * HOUR, 300.0), (60.0, 0.5 * HOUR, 600.0)])
def test_what_is_lost_is_what_a_failing_run_loses_and_the_best_interval_loses_least(stall, between, lost):
    best = failures.best_interval(stall, between)
    assert best == pytest.approx(math.sqrt(2 * stall * between), rel=0.2)  # Young's
    found = {}
    for factor in (0.25, 1.0, 4.0):
        found[factor] = failures.wall_over_work(factor * best, stall, between, lost)
        assert simulated(factor * best, stall, between, lost) == pytest.approx(found[factor], rel=0.02)
    assert found[1.0] < min(found[0.25], found[4.0])
    near = [failures.wall_over_work(best * factor, stall, between, lost) for factor in (0.9, 1.0, 1.1)]
    assert near[1] < min(near[0], near[2])


def test_spares_suffice_as_often_as_they_say():
    nodes, away, mtbf = 128, 24 * HOUR, 2000 * HOUR
    reliability = Reliability(mtbf_seconds=mtbf, restart_seconds=0.0, replacement_seconds=away)
    enough = failures.spares(nodes, reliability)
    drawn = np.random.default_rng(0).binomial(nodes, away / (mtbf + away), size=100_000)
    assert np.mean(drawn <= enough) > 0.99 > np.mean(drawn <= enough - 1)


def test_estimates_of_a_thousand_gpus():
    reliability = Reliability(mtbf_seconds=5000 * HOUR, restart_seconds=300.0, replacement_seconds=1800.0)
    told = failures.failures(reliability, 128, 1024, 3e8, step_seconds=0.25, hours=100.0)
    found = {one.name: one.value for one in told}
    assert found["between failures of the job"] == pytest.approx(5000 / 128)
    assert found["best checkpoint.every_steps"] == pytest.approx(found["best checkpoint interval"] / 0.25, abs=0.5)
    per_failure = (300 + 1800) / (5000 * HOUR / 128)  # most of what is lost, where saves cost nearly nothing
    assert found["expected lost hours"] == pytest.approx(100 * per_failure, rel=0.1)
    assert found["hours that hot spares save"] == pytest.approx(100 * 1800 / (5000 * HOUR / 128), rel=0.1)
    assert all(one.formula for one in told)
    measured = Reliability(**{**vars(reliability), "stall_seconds": 20.0})
    longer = failures.failures(measured, 128, 1024, 3e8)[3].value
    assert longer == pytest.approx(math.sqrt(2 * 20 * 5000 * HOUR / 128), rel=0.05)
    hopeless = Reliability(mtbf_seconds=HOUR, restart_seconds=3600.0, replacement_seconds=1e6)
    assert math.isinf(next(one.value for one in failures.failures(hopeless, 128, 1024, 3e8) if "lost" in one.name))
