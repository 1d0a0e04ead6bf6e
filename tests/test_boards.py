"""What TensorBoard and Weights & Biases hold, read back from their own files."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_ssl import config as configuration
from dist_ssl.training.observability import Observer


def of_tensorboard(folder: Path) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {name: {one.step: one.value for one in events.Scalars(name)} for name in events.Tags()["scalars"]}


def records(file: Path) -> Iterator[bytes]:
    """Those of W&B's file: LevelDB's log format, blocks of 32 KiB of pieces (crc, length, kind) behind a header."""
    data, at, record = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 2**15 - at % 2**15) < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


def of_wandb(file: Path) -> dict[str, dict[int, float]]:
    """The history in an offline run's file, without W&B's own `_step` and clock."""
    from wandb.proto.wandb_internal_pb2 import Record

    found: dict[str, dict[int, float]] = {}
    for data in records(file):
        history = Record.FromString(data).history
        values = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in history.item}
        for name, value in values.items():
            if not name.startswith("_"):
                found.setdefault(name, {})[history.step.num] = value
    return found


@pytest.mark.slow
def test_both_hold_the_same_names_and_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    values = {"run": {"dir": str(tmp_path / "run")}, "log": {"wandb_project": "mine"}}
    (tmp_path / "run").mkdir()
    with Observer(configuration.validate(values, "test"), 20, 0) as observer:
        for step in (10, 20):
            observer.log(step, {"loss": 5.0 / step, "positive/similarity": 0.5, "lr": 1e-3}, 0.0, time.monotonic())
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    board, wandb = of_tensorboard(tmp_path / "run" / "tensorboard"), of_wandb(file)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    expected = {name: {line["step"]: line[name] for line in lines} for name in lines[0] if name != "step"}
    assert set(expected) >= {"loss", "positive/similarity", "lr", "images_per_second", "data_wait_fraction"}
    assert wandb == expected
    assert board == {name: pytest.approx(steps, rel=1e-6) for name, steps in expected.items()}
