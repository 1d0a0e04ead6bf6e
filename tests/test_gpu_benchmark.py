"""`tests.benchmarks.gpu`, which is for a machine that is rarely at hand, runs: on a CPU, all but `compiled`."""

import json
import subprocess
import sys

import pytest

from tests.benchmarks.gpu import Report, augmentation, objectives
from tests.faults.harness import ROOT


@pytest.mark.slow
def test_every_part_writes_its_results(tmp_path):
    command = [sys.executable, "-m", "tests.benchmarks.gpu", "--tiny", "--out", str(tmp_path / "out.jsonl"), "--parts"]
    command += ["step", "objective", "augment", "stream"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert {row["part"] for row in rows} == {"machine", "step", "objective", "augment", "stream"}
    ours = [row for row in rows if row.get("of") == "dist_ssl" and row["part"] == "step"]
    assert [row["encoder"] for row in ours] == ["resnet_tiny", "vit_s_16"]
    for row in ours:
        assert row["parts_ms"].keys() == {"augment", "forward", "loss", "backward", "optimizer"}
    (stream,) = (row for row in rows if row["part"] == "stream")
    assert 0 <= stream["data_ms"] <= stream["ms"]
    assert {row["of"] for row in rows if "error" in row} <= {"open_clip"}  # which is not installed for tests


def test_what_has_not_begun_in_time_is_left_out(tmp_path):
    with (tmp_path / "out.jsonl").open("w") as file:
        report = Report(file, minutes=0)
        objectives(report, tiny=True)
        augmentation(report, tiny=True)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["left_out"] for row in rows] == ["the time was up"] * 2
