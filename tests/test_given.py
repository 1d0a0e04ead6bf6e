"""`--data DIR`: one option in place of three keys, for shards, for train and test folders, for plain class folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dist_ssl import config as configuration
from dist_ssl.config import Config, StorageConfig, UserError
from dist_ssl.data.given import train_and_test, training_overrides
from dist_ssl.data.manifest import load_manifest
from dist_ssl.data.shards import write_shards
from dist_ssl.data.sources import open_source
from dist_ssl.evaluation.commands import DataSet, _found
from tests.terminal import forked
from tests.test_shards import photo_folder

LOCAL = StorageConfig()


def counts(data: str) -> list[int]:
    return [load_manifest(place, LOCAL).num_samples for place in train_and_test(data, LOCAL) if place is not None]


def test_shards_are_their_two_folders(tmp_path: Path) -> None:
    write_shards(open_source("shapes:40:16"), str(tmp_path), LOCAL, test_fraction=0.25, num_workers=0)
    assert train_and_test(str(tmp_path), LOCAL) == (f"{tmp_path}/train", f"{tmp_path}/test")
    assert counts(f"{tmp_path}/") == [30, 10]
    assert train_and_test(f"{tmp_path}/train", LOCAL) == (f"{tmp_path}/train", None)
    assert train_and_test("s3://bucket/photos", LOCAL) == ("s3://bucket/photos/train", "s3://bucket/photos/test")
    config = configuration.with_overrides(Config(), training_overrides("s3://bucket/📷", LOCAL))
    assert (config.data.shards, config.evaluation.test_shards) == ("s3://bucket/📷/train", "s3://bucket/📷/test")


@pytest.mark.parametrize("test", ["test", "val"])
def test_folders_of_that_name_are_the_parts(tmp_path: Path, test: str) -> None:
    photo_folder(tmp_path / "train", 2)
    photo_folder(tmp_path / test, 2, each=5)
    assert train_and_test(str(tmp_path), LOCAL) == (f"folder:{tmp_path}/train", f"folder:{tmp_path}/{test}")
    assert counts(str(tmp_path)) == [40, 10]
    with pytest.raises(UserError, match=r" are parts, not classes; give folder:.* one by one"):
        open_source(f"folder:{tmp_path}")


def test_of_class_folders_a_tenth_is_held_out_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = photo_folder(tmp_path / "photos")
    assert counts(str(root)) == counts(f"folder:{root}") == [54, 6]
    config = configuration.with_overrides(Config(), training_overrides(str(root), LOCAL))
    assert config.data.shards == config.evaluation.train_shards == f"folder:{root}/train"
    assert config.evaluation.test_shards == f"folder:{root}/test"
    written = (root / ".dist_ssl" / "train" / "000000.idx").stat().st_mtime_ns
    assert not caplog.records
    photo_folder(root / "later", 1)  # a run that goes on has the images that it had, and is told
    assert counts(str(root)) == [54, 6]
    (told,) = {record.getMessage() for record in caplog.records}
    assert told.endswith(f"for a new run on what is there now: dist-ssl shards index folder:{root} --test-fraction 0.1")
    assert (root / ".dist_ssl" / "train" / "000000.idx").stat().st_mtime_ns == written


def test_images_without_labels_are_all_trained_on(tmp_path: Path) -> None:
    root = photo_folder(tmp_path, 1) / "class0"
    assert training_overrides(str(root), LOCAL) == [
        *(f"{key}={json.dumps(f'folder:{root}')}" for key in ("data.shards", "evaluation.train_shards")),
        'evaluation.test_shards=""',  # the config's own is of other images
    ]
    assert counts(str(root)) == [20]


def test_a_part_alone_and_a_class_of_a_parts_name(tmp_path: Path) -> None:
    photo_folder(tmp_path / "train", 2)
    assert train_and_test(str(tmp_path), LOCAL) == (f"folder:{tmp_path}/train", None)
    (tmp_path / "bus").mkdir()
    with pytest.raises(UserError, match=r"its folder train could be a part or a class; .*: rename it"):
        train_and_test(str(tmp_path), LOCAL)


@pytest.mark.parametrize(
    ("data", "expected"), [("none", "no such folder"), ("idx:a:b", "by --set data.shards=idx:a:b")]
)
def test_what_is_no_folder(data: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=expected):
        train_and_test(data, LOCAL)


def test_labels_are_not_asked_of_images_without_any(tmp_path: Path) -> None:
    root = photo_folder(tmp_path, 1) / "class0"
    settings = [f"run.dir={json.dumps(str(tmp_path / 'run'))}", "objective.name=supervised"]
    options = [part for setting in settings for part in ("--set", setting)]
    done = forked("pretrain", "configs/debug_cpu.toml", "--data", str(root), *options)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        f"error: objective.name = supervised: expected labelled images, got none in folder:{root} with a label; take "
        "another objective, or a folder of class folders"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_newcomers_photos(tmp_path: Path) -> None:
    """Two commands from a folder to numbers."""
    root, run_dir = photo_folder(tmp_path / "photos"), tmp_path / "run"
    settings = [
        f"run.dir={json.dumps(str(run_dir))}",
        "train.steps=2",
        "train.global_batch_size=16",
        "data.num_workers=0",
    ]
    options = [part for setting in settings for part in ("--set", setting)]
    done = forked("pretrain", "configs/debug_cpu.toml", "--data", str(root), *options)
    assert done.returncode == 0, done.stderr
    (_, first, second), last = done.stderr.splitlines()[:3], done.stderr.splitlines()[-1]
    assert f"indexing folder:{root}: " in first  # the test part's, before torch is loaded
    assert second.endswith("loading torch, which takes some seconds")
    assert last.endswith(f"next: dist-ssl evaluate {run_dir}")
    done = forked("evaluate", str(run_dir), "--probes", "knn")
    assert done.returncode == 0, done.stderr
    results = json.loads((run_dir / "evaluation" / "step-2" / "results.json").read_text())
    assert (results["data"]["train_images"], results["data"]["test_images"]) == (54, 6)
    planned = forked("plan", "configs/debug_cpu.toml", "--data", str(root), "--gpus-per-node=1", "--simulate", *options)
    assert planned.returncode == 0, planned.stderr
    assert "samples that were on their node" in planned.stdout


def test_an_evaluation_wants_a_test_part_of_the_same_images(tmp_path: Path) -> None:
    root = photo_folder(tmp_path, 1, each=3) / "class0"
    with pytest.raises(UserError, match=r"class0: holds no test part to score probes on; expected folders train and"):
        _found(DataSet(None, str(root)), None, None)
    assert _found(DataSet(None, str(root)), None, "tests").test == "tests"
