"""Commands that look at runs and at names: status, runs, prune, list, and the page of all keys."""

from __future__ import annotations

import json
import os
import sys
import time
import uuid
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from dist_ssl import config as configuration
from dist_ssl.cli import app
from dist_ssl.config import UserError
from dist_ssl.evaluation.results import write_json
from dist_ssl.report.status import status
from dist_ssl.training.observability import Observer
from dist_ssl.training.run_directory import _set_aside
from tests import template
from tests.terminal import ROOT, dist_ssl


def a_run(folder: Path, step: int, loss: float = 3.25, **train: int) -> Path:
    """A run of 20 steps of 16 images out of 160, as far as it logs itself."""
    values = {
        "run": {"dir": str(folder)},
        "train": {"global_batch_size": 16} | (train or {"steps": 20}),
        "log": {"tensorboard": False},
    }
    config = configuration.validate(values, "test")
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(configuration.dumps(config))
    if step:
        with Observer(config, 20, 0) as observer:
            observer.log(step, {"epoch": step / 10, "samples_seen": 16 * step, "loss": loss}, 0.0, time.monotonic())
    return folder


def test_images_a_second_are_by_when_steps_were_queued(tmp_path: Path) -> None:
    """Lines are written a step late, or at once before a save: the clock at writing had given 11,000 for 150."""
    folder = a_run(tmp_path / "run", 0)
    with Observer(configuration.load(folder / "config.toml", []), 20, 0) as observer:
        for step, at in ((1, 100.0), (2, 100.5), (4, 102.0)):
            observer.log(step, {"loss": 1.0}, 0.0, at)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["images_per_second"] for line in lines[1:]] == [32.0, pytest.approx(32 / 1.5)]


def said(*arguments: str) -> str:
    # A process of its own: rich keeps the width that the first of all tests saw.
    done = dist_ssl(*arguments, COLUMNS="200")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_status_is_one_line_of_json(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", 7)
    (line,) = said("status", str(run), "--json").splitlines()
    found = json.loads(line)
    expected = {"state": "running", "step": 7, "steps": 20, "epoch": 0.7, "loss": 3.25, "accuracy": None}
    assert expected.items() <= found.items()
    assert found["silent_seconds"] < 60
    told = app.registered_commands[[c.name or c.callback.__name__ for c in app.registered_commands].index("status")]
    assert all(key in told.callback.__doc__ for key in found)  # the help says what each key is
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "los')  # a line that is being written
    assert status(run)["step"] == 7
    os.utime(run / "metrics.jsonl", (time.time() - 400, time.time() - 400))
    assert status(run)["state"] == "stopped"


def test_states_and_lengths(tmp_path: Path) -> None:
    assert status(a_run(tmp_path / "new", 0))["state"] == "not begun"
    assert status(a_run(tmp_path / "over", 20))["state"] == "complete"
    for step, state in ((10, "running"), (20, "complete")):  # the last commit follows its step's line, if it does
        (tmp_path / "over" / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
        (tmp_path / "over" / "checkpoints" / f"step-{step:08d}" / "manifest.json").touch()
        assert status(tmp_path / "over")["state"] == state
    by_epochs = status(a_run(tmp_path / "epochs", 7, epochs=2))
    assert (by_epochs["steps"], by_epochs["state"]) == (20, "running")
    assert status(a_run(tmp_path / "lost", 7, float("nan")))["loss"] is None
    with pytest.raises(UserError, match="not a run directory"):
        status(tmp_path)


def test_runs_of_a_folder_with_their_accuracy(tmp_path: Path) -> None:
    run = a_run(tmp_path / "sweep" / "a", 20)
    a_run(tmp_path / "b", 3)
    values = {"data": {}, "probes": {"linear": {"h": {"top1": 0.625}, "z": {"top1": 0.5}}}}
    write_json(run / "evaluation" / "step-10" / "results.json", values)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.toml").write_text("[run\n")
    shown = said("runs", str(tmp_path)).splitlines()
    (line,) = [line for line in shown if "sweep/a" in line]
    assert [cell.strip() for cell in line.split("│")[1:6]] == [
        "sweep/a", "complete", "20/20", "3.2500", "linear h 62.5% (step 10)",
    ]  # fmt: skip
    assert any("damaged" in line and "not readable" in line for line in shown)
    assert any("3/20" in line for line in shown)


def test_only_what_a_restart_set_aside_is_pruned(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", 7)
    _set_aside(run)
    a_run(run, 9)
    (aside,) = tmp_path.glob("run.before-*")
    mine = a_run(tmp_path / "run.before-breakfast", 1)
    assert f"{aside}: 0.00 GB, 0 days old" in said("prune", str(tmp_path))
    assert "nothing was set aside" in said("prune", str(tmp_path), "--older-than-days", "1", "--delete")
    assert aside.exists()
    assert "run.before-2" not in said("runs", str(tmp_path))
    assert "1 set aside" in said("prune", str(tmp_path), "--delete")
    assert not aside.exists()
    assert run.exists()
    assert mine.exists()


def test_the_page_of_keys_is_current() -> None:
    page = (ROOT / "docs" / "config.md").read_text()
    assert page == configuration.explain_page(), "run dist-ssl config --markdown > docs/config.md"
    for key in configuration.known_keys():
        assert f"| `{key.name}`" in page.split(f"## [{key.section}]\n")[1].split("\n## ")[0]


def without(tmp_path: Path, *modules: str) -> dict[str, str]:
    """The environment of a Python in which these can't be imported."""
    lines = [f"sys.modules[{name!r}] = None" for name in modules]
    (tmp_path / "sitecustomize.py").write_text("\n".join(["import sys", *lines]))
    return {"PYTHONPATH": f"{tmp_path}:{ROOT}"}


def test_what_only_looks_imports_neither_torch_nor_a_store(tmp_path: Path) -> None:
    environment = without(tmp_path, "torch", "torchvision", "timm", "deepspeed", "fsspec", "aiohttp", "botocore")
    for arguments in (["--help"], ["config", "configs/quickstart.toml"], ["list"]):
        done = dist_ssl(*arguments, **environment)
        assert done.returncode == 0, done.stderr
    listed = done.stdout
    for name in ("resnet50", "vit_s_16", "barlow_twins", "head_information", "mlp", "folder:DIR", "idx:IMAGES"):
        assert f"\n  {name}" in listed


def _has_mlflow(connection: Connection) -> None:
    connection.send("mlflow" in sys.modules)


def test_training_imports_no_mlflow_that_nobody_asked_for() -> None:
    """DeepSpeed would, wherever it is installed: 1.3 s of a core a rank."""
    assert template.fork(_has_mlflow).connection.recv() is False


MISTAKES = {
    "export none x.safetensors": "none: not a run",
    "evaluate none": "none: not a run",
    "status none": "none: not a run",
    "runs none": "none: no such folder",
    "pretrain configs/quickstart.toml --set data.shards=": "data.shards: expected where",
    "pretrain configs/quickstart.toml --set run.dir=": "--set: run.dir: ",
    "pretrain configs/quickstart.toml --set model.encoder=resnet51": "model.encoder: expected one of resnet_tiny,",
    "pretrain configs/quickstart.toml --set model.encoder=timm/convnext_ato": (
        "model.encoder: expected timm/ and the name of a model of the timm that is installed, got 'timm/convnext_ato'; "
        "did you mean 'timm/convnext_atto'?"
    ),
    "plan configs/quickstart.toml --set model.encoder=timm/convnext_ato": "model.encoder: expected timm/ and the name",
    "plan configs/quickstart.toml --set data.shards=none": "none: no manifest.json there",
    "plan configs/quickstart.toml --num-images 9 --at-ranks 8,x": "--at-ranks 8,x: expected numbers of ranks",
    "pretrain configs/debug_cpu.toml --data none": "--data none: no such folder; expected one of images",
    "evaluate --weights none --encoder resnet50 --data none": "--data none: no such folder; expected one of images",
    "pretrain configs/debug_cpu.toml --set objective.chunks=65": "train.global_batch_size: 64 is less than",
}


@pytest.mark.parametrize("arguments", MISTAKES)
def test_a_mistake_that_needs_no_model_imports_no_torch(arguments: str, tmp_path: Path) -> None:
    done = dist_ssl(*arguments.split(), **without(tmp_path, "torch"))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {MISTAKES[arguments]}")


@pytest.mark.parametrize("store", ["files", "server"])
def test_mlflow_gets_the_metrics_of_one_run_over_all_its_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str
) -> None:
    """The store of the package that is installed, and a server of the whole one, which is large, where one is named."""
    from mlflow import MlflowClient

    if store == "server" and "DIST_SSL_TEST_MLFLOW" not in os.environ:
        pytest.skip("needs `mlflow server`, and its URL in DIST_SSL_TEST_MLFLOW")
    place = os.environ["DIST_SSL_TEST_MLFLOW"] if store == "server" else (tmp_path / "mlflow").as_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", place)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    heads = f"heads-{uuid.uuid4()}"
    settings = [f"log.mlflow_experiment={heads}"]
    config = configuration.with_overrides(configuration.load(a_run(tmp_path / "run", 0) / "config.toml"), settings)
    for step in (5, 10):
        with Observer(config, 20, step - 5) as observer:
            observer.log(step, {"loss": 7.0 - step / 5, "gradient_norm": float("nan")}, 0.0, time.monotonic())
    client = MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name(heads).experiment_id])
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(one.step, one.value) for one in history] == [(5, 6.0), (10, 5.0)]
    assert "gradient_norm" not in run.data.metrics
    assert client.list_artifacts(run.info.run_id)[0].path == "config.toml"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere://at-all")
    with pytest.raises(
        UserError, match=rf"log\.mlflow_experiment = {heads}: MLflow, at what MLFLOW_TRACKING_URI names"
    ):
        Observer(config, 20, 10)
