"""What TensorBoard and Weights & Biases hold, read back from their own files."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_ssl import config as configuration
from dist_ssl.config import Config
from dist_ssl.training.observability import Observer
from tests import trajectory
from tests.pool import ranks
from tests.trajectory import small_config


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


def wandb_ids(folders: list[Path]) -> list[str]:
    """Those of observers of runs in these. In a rank, since W&B heeds only the mode that its process begins with."""
    ids = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            values = {"run": {"dir": str(folder)}, "log": {"wandb_project": "mine", "tensorboard": False}}
            with Observer(configuration.validate(values, "test"), 20, 0) as observer:
                ids += [board._run.id for board in observer._boards]
    return ids


def test_runs_of_directories_of_one_name_are_two_in_wandb(tmp_path: Path) -> None:
    one, two = tmp_path / "lr1" / "seed=0", tmp_path / "lr2" / "seed=0"
    (ids,) = ranks(1).run(wandb_ids, [one, two, one])
    assert ids[0] == ids[2]
    assert len({*ids, "seed=0"}) == 3


def pretrain(config: Config, extend: bool) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        return trajectory.pretrain(config, extend=extend)


@pytest.mark.parametrize("logged_before", [True, False])
def test_a_run_of_before_goes_on_in_its_wandb_run(tmp_path: Path, small_shards: Path, logged_before: bool) -> None:
    """It has no file that tells the id, and nor has one that begins to log now."""
    config = small_config(tmp_path / "run", str(small_shards), "log.tensorboard=false", "train.steps=2")
    here = configuration.with_overrides(config, ["log.wandb_project=mine", "train.steps=4"])
    file = tmp_path / "run" / "wandb-run-id"
    project = ["log.wandb_project=mine"] if logged_before else []
    assert ranks(1).run(pretrain, configuration.with_overrides(config, project), False) == [0]
    assert file.exists() == logged_before
    file.unlink(missing_ok=True)
    assert ranks(1).run(pretrain, here, True) == [0]
    assert (file.read_text() == "run") == logged_before


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
