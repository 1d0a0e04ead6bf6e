"""Curves and a run of earlier code: a change of the mathematics is seen at once, and what was saved then goes on now.

`tests/golden/*.json` hold the losses of configs on two CPU ranks, with the versions and the commit that made them. The
first steps are compared to rounding; training amplifies it, so of the rest the test says how far it is.
`quickstart.json` was made anew when a pixel of 17 of its images changed, and with the shards' checksum the order of
samples; on the old images that code gave the old losses. `run-0.1.0.tar.xz` is the run directory of `debug_lars.json`,
as it stood after step 10.
"""

import json
import signal
import tarfile
from functools import partial
from pathlib import Path

import pytest

from dist_ssl import config as config_module
from dist_ssl.config import StorageConfig
from dist_ssl.data.shards import write_shards
from dist_ssl.data.sources import open_source
from tests import trajectory
from tests.faults import inject
from tests.pool import ranks

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"
FIRST_STEPS, ROUNDING = 3, 1e-5
DRIFT = 0.02  # of later steps, on another processor or version of torch


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """(source, test fraction) -> the folder that the quickstart's command writes."""
    written = {}

    def write(source, test_fraction):
        if source not in written:
            written[source] = tmp_path_factory.mktemp("golden")
            write_shards(open_source(source), str(written[source]), StorageConfig(), test_fraction=test_fraction)
        return written[source] / "train"

    return write


def golden(name):
    kept = json.loads((GOLDEN / f"{name}.json").read_text())
    return kept, {int(step): loss for step, loss in kept["losses"].items()}


def losses(run_dir):
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines}


def compare(got, expected, name):
    """The first steps to rounding; how far the others are is said, and bounded."""
    shared = sorted(got.keys() & expected.keys())
    off = {step: abs(got[step] / expected[step] - 1) for step in shared}
    print(f"{name}: {sum(got[s] == expected[s] for s in shared)} of {len(shared)} losses are the same bits; "
          f"the furthest is {max(off.values()):.1e} off, at step {max(off, key=off.get)}")  # fmt: skip
    assert max(off[step] for step in shared[:FIRST_STEPS]) < ROUNDING
    assert max(off.values()) < DRIFT


def here(folder, shards):
    """Overrides for a rank of a pool, which may not have workers of its own."""
    places = {"run.dir": str(folder), "data.shards": str(shards), "data.num_workers": 0, "engine.threads_per_rank": 1}
    return [f"{key}={json.dumps(value)}" for key, value in places.items()]


def run(name, folder, shards, *overrides, pretrain=trajectory.pretrain):
    kept, expected = golden(name)
    config = config_module.load(
        ROOT / kept["config"], [*kept["set"], *here(folder, shards(*kept["shards"])), *overrides]
    )
    return ranks(kept["ranks"]).run(pretrain, config), expected


def test_the_debug_curve(tmp_path, shards):
    codes, expected = run("debug", tmp_path / "run", shards)
    assert codes == [0, 0]
    got = losses(tmp_path / "run")
    assert got.keys() == expected.keys()
    compare(got, expected, "debug")


@pytest.mark.slow
def test_the_first_steps_of_the_quickstart(tmp_path, shards):
    stop = partial(inject.pretrain_with_signal, at_step=FIRST_STEPS + 1, number=signal.SIGTERM)
    codes, expected = run("quickstart", tmp_path / "run", shards, "log.every_steps=1", pretrain=stop)
    assert codes == [75, 75]
    got = losses(tmp_path / "run")
    assert len(got) >= FIRST_STEPS
    compare(got, expected, "quickstart")


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.slow), 1])
def test_a_run_of_earlier_code_goes_on(tmp_path, shards, size):
    kept, expected = golden("debug_lars")
    with tarfile.open(GOLDEN / "run-0.1.0.tar.xz") as archive:
        archive.extractall(tmp_path / "run", filter="data")
    config = config_module.load(tmp_path / "run" / "config.toml", here(tmp_path / "run", shards(*kept["shards"])))
    assert ranks(size).run(trajectory.pretrain, config) == [0] * size
    got = losses(tmp_path / "run")
    assert got.keys() == expected.keys()
    compare({step: loss for step, loss in got.items() if step > 10}, expected, f"step 10 on, on {size} ranks")
