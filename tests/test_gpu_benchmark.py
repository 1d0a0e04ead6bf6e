"""`tests.benchmarks.gpu`, which is for a machine that is rarely at hand, runs: every part of it, on a CPU."""

import json
import subprocess
import sys

import pytest

from tests.faults.harness import ROOT


@pytest.mark.slow
def test_every_part_writes_its_results(tmp_path):
    command = [sys.executable, "-m", "tests.benchmarks.gpu", "--tiny", "--out", str(tmp_path / "out.jsonl")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert {row["part"] for row in rows} == {"machine", "step", "objective", "augment"}
    (ours,) = (row for row in rows if row.get("of") == "dist_ssl" and row["part"] == "step")
    assert ours["parts_ms"].keys() == {"augment", "forward", "loss", "backward", "optimizer"}
    assert not any("error" in row for row in rows)
