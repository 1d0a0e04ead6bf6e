"""What a long job says of itself: a bar on a terminal, lines in a log."""

from __future__ import annotations

import logging
import os
import pty
import subprocess
import sys

import pytest

from dist_ssl.data import progress
from dist_ssl.data.progress import Progress, track


def test_a_log_gets_a_line_now_and_then_and_one_at_the_end(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
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
