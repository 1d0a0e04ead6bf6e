"""What a long job says of itself: a bar on a terminal, lines in a log."""

from __future__ import annotations

import logging
import os
import pty
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dist_ssl import config as configuration
from dist_ssl.data import progress
from dist_ssl.data.manifest import Manifest, Shard
from dist_ssl.data.progress import Progress, track
from dist_ssl.distributed import World
from dist_ssl.models import build_model
from dist_ssl.training.announce import Announcement


def test_a_log_gets_a_line_now_and_then_and_one_at_the_end(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "FIRST_SECONDS", 0.0)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    with caplog.at_level(logging.INFO):
        assert list(track(range(3), 3, "reading")) == [0, 1, 2]
        with Progress("probes", 2) as shown:
            shown.advance(0, "linear on h")
        with Progress("pretrain", 9, done=4) as shown:
            shown.advance(note="loss 2.5, 90 images/s")
            shown.advance(4)
    resumed, trained = [record.getMessage() for record in caplog.records][-2:]
    del caplog.records[-2:]
    assert resumed == "pretrain: 5 of 9, loss 2.5, 90 images/s"
    assert trained.startswith("pretrain: 9 done in ")
    assert trained.endswith(" s, loss 2.5, 90 images/s")
    first, second, end, doing, last = [record.getMessage() for record in caplog.records]
    assert (first, second, doing) == ("reading: 1 of 3", "reading: 2 of 3", "probes: linear on h: 0 of 2")
    assert end.startswith("reading: 3 done in ")
    assert last.startswith("probes: 0 done in ")


def test_seldom_and_not_where_it_is_not_shown(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert len(list(track(range(1000), 1000, "reading"))) == 1000
        assert len(caplog.records) == 1
        assert len(list(track(range(1000), 1000, "reading", shown=False))) == 1000
        with pytest.raises(ValueError, match="broken"), Progress("reading", 9):
            raise ValueError("broken")
    assert len(caplog.records) == 1, "a job that failed is not done"


def test_the_time_left_is_told_early_and_counts_no_start(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with caplog.at_level(logging.INFO), Progress("pretrain", 1000, done=100) as shown:
        for clock[0] in (60.0, 62.0, 64.0, 90.0, 92.0):  # workers start for a minute, then a step takes two seconds
            shown.advance(1 if clock[0] < 90 else 13)
    told = [record.getMessage() for record in caplog.records[:-1]]
    assert told == ["pretrain: 101 of 1000", "pretrain: 116 of 1000, 29 min 28 s left"]
    assert [progress.duration(s) for s in (0.4, 59, 60, 185, 7800, 3600 * 76)] == [
        "0 s",
        "59 s",
        "1 min 00 s",
        "3 min 05 s",
        "2 h 10 min",
        "3 d 4 h",
    ]


def test_a_run_says_what_it_is_and_what_comes_next(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    values = {"run": {"dir": str(tmp_path)}, "model": {"encoder": "resnet_tiny"}, "augment": {"crop_size": 16}}
    values |= {"train": {"steps": 40, "global_batch_size": 16}, "objective": {"name": "byol"}}
    config = configuration.validate(values, "test")
    manifest = Manifest("data", (Shard("a.tar", "a.idx", 1, 160, 0),), ("disc", "star"))
    model, world = build_model(config), World(0, 2, 0, 2, torch.device("cpu"))
    with caplog.at_level(logging.INFO):
        for done, device in ((0, 0), (10, 0), (0, 1)):
            Announcement(config, replace(world, rank=device), manifest, model, done).over()
    fresh, resumed = caplog.messages[:6], caplog.messages[6:]  # rank 1 says nothing
    assert fresh[0] == f"run: {tmp_path}, new"
    assert resumed[0] == f"run: {tmp_path}, going on from step 10"
    assert fresh[1] == "data: 160 images in 1 shards, 2 classes for the probes"
    assert "resnet_tiny (0.31M parameters), head mlp" in fresh[2]
    assert fresh[3].startswith("ranks: 2 (CPU")
    assert fresh[4].startswith("steps: 40, 4.0 epochs of 10.0 steps")
    assert resumed[4].startswith("steps: 40, 10 of them done, 4.0 epochs of 10.0 steps")
    end = "30 steps in 0 s; next: dist-ssl evaluate {} --data DIR, with labelled images"
    assert resumed[5] == f"{tmp_path}: complete, {end.format(tmp_path)}"


def test_a_terminal_gets_a_bar() -> None:
    code = "from dist_ssl.data.progress import Progress\nwith Progress('reading', 7, done=3, stays=True) as progress:\n"
    code += "    progress.advance(4, note='loss 2.5')"
    ours, theirs = pty.openpty()
    with subprocess.Popen([sys.executable, "-c", code], stderr=theirs, stdout=subprocess.DEVNULL) as process:
        os.close(theirs)
        said = b""
        try:
            while piece := os.read(ours, 4096):
                said += piece
        except OSError:  # what Linux says once the other side is closed
            pass
    os.close(ours)
    assert process.returncode == 0
    for part in (b"reading", b"7/7", b"loss 2.5"):
        assert part in said
