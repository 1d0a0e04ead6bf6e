"""The laboratory: its grid, and a real grid that is interrupted and goes on; what it may claim: test_claims."""

from __future__ import annotations

import fcntl
import json
import logging
import threading
import time

import pytest
from typer.testing import CliRunner

from dist_ssl import config as configuration
from dist_ssl.config import UserError
from dist_ssl.evaluation import lab
from dist_ssl.evaluation.lab_summary import show, summarize_lab, to_json
from dist_ssl.evaluation.results import write_json
from dist_ssl.report import lab_page
from launch import lab as laboratory
from tests.test_report import a_result
from tests.test_shards import photo_folder

TINY = {
    "data": {"num_workers": 0, "streams": 2},
    "augment": {"crop_size": 16},
    "model": {"encoder": "resnet_tiny", "head": {"hidden_dim": 16}},
    "optimizer": {"name": "adamw", "base_learning_rate": 1e-3, "scaling": "none", "warmup_epochs": 0.0},
    "train": {"steps": 2, "global_batch_size": 8},
    "engine": {"precision": "fp32", "threads_per_rank": 1},
    "log": {"tensorboard": False},
    "evaluation": {"num_workers": 0, "probes": ["linear", "knn"]},
}


def tiny(folder, **keys):
    settings = {"source": "shapes:96", "source_image_size": 20, "heads": ["none", "mlp2"], "output_dims": [8]}
    return configuration.validate(TINY | {"run": {"dir": str(folder)}, "lab": settings | keys}, "test")


def test_the_grid_is_matched_and_ordered_by_seed(tmp_path):
    config = tiny(
        tmp_path, heads=["none", "linear", "mlp3"], batch_norm=[True, False], output_dims=[8, 16], num_seeds=2
    )
    grid = lab.cells(config)
    assert len(grid) == 2 * (1 + 2 * 2 * 2)
    assert [cell.seed for cell in grid] == sorted(cell.seed for cell in grid)
    made = [lab.cell_config(config, cell) for cell in grid]
    heads = {
        (c.model.head.kind, c.model.head.num_layers, c.model.head.output_dim, c.model.head.batch_norm) for c in made
    }
    assert ("mlp", 3, 16, False) in heads
    for cell, one in zip(grid, made, strict=True):
        assert one.run.seed == cell.seed
        assert one.lab is None
        same = one.model_copy(update={"run": made[0].run, "model": made[0].model})
        assert same == made[0].model_copy(update={"model": made[0].model})
        assert one.model.head.hidden_dim == 16
        assert one.evaluation.test_shards == f"{tmp_path}/data/test"
    elsewhere = configuration.with_overrides(config, ["checkpoint.url=s3://bucket/lab"])
    urls = [lab.cell_config(elsewhere, cell).checkpoint.url for cell in grid]
    assert urls == [f"s3://bucket/lab/{cell.name}" for cell in grid]
    with pytest.raises(UserError, match="'mlp1'"):
        lab.cells(tiny(tmp_path, heads=["mlp1"]))
    with pytest.raises(UserError, match="no \\[lab\\] section"):
        lab.cells(configuration.validate(TINY, "test"))


def test_objectives_are_an_axis_beside_heads(tmp_path):
    compared = ["byol", "vicreg", {"name": "byol", "teacher_decay": 0.9}]
    config = tiny(tmp_path, objectives=compared, heads=["none", "mlp2"], num_seeds=1)
    grid = lab.cells(config)
    assert [cell.name for cell in grid[:2]] == ["byol-none-seed0", "byol-mlp2-d8-bn-seed0"]
    assert grid[5].name == "byol-teacher_decay=0.9-mlp2-d8-bn-seed0"
    assert grid[5].beside(".log") == grid[5].folder.parent / "byol-teacher_decay=0.9-mlp2-d8-bn-seed0.log"
    made = [lab.cell_config(config, cell).objective for cell in grid]
    assert [one.name for one in made[::2]] == ["byol", "vicreg", "byol"]
    assert (made[0].teacher_decay, made[4].teacher_decay) == (0.996, 0.9)
    assert lab.cell_config(tiny(tmp_path), lab.cells(tiny(tmp_path))[0]).objective == config.objective
    predicting = config.model_dump(exclude_none=True)
    predicting["objective"], predicting["model"]["predictor"] = {"name": "byol"}, {"num_layers": 3}
    predictors = [lab.cell_config(configuration.validate(predicting, ""), cell).model.predictor for cell in grid]
    assert [one and one.num_layers for one in predictors] == [3, 3, None, None, 3, 3]
    predicting["evaluation"]["teacher"] = True
    with pytest.raises(UserError, match="a lab compares students"):
        lab.checked_cells(configuration.validate(predicting, ""))
    with pytest.raises(UserError, match=r"lab.objectives.0.name: expected one of nt_xent, .* got 'bjol'"):
        tiny(tmp_path, objectives=["bjol"])


def test_heads_of_every_kind_stand_in_a_grid(tmp_path):
    heads = [
        "none",
        "direct",
        "fixed_reweight kappa=1.1",
        "shortcut3",
        "discrete levels=5",
        "sae top_k=4",
        "mlp2 l1=0.1",
    ]
    config = tiny(tmp_path, heads=heads, batch_norm=[True, False], output_dims=[8, 16], num_seeds=1)
    names = [cell.name for cell in lab.cells(config)]
    assert names[:3] == ["none-seed0", "direct-d8-seed0", "direct-d16-seed0"]
    assert "fixed_reweight-kappa=1.1-seed0" in names
    assert len(names) == 1 + 2 + 1 + 3 * 4 + 2
    made = {cell.row_name: lab.cell_config(config, cell).model.head for cell in lab.cells(config)}
    assert made["shortcut3, 16, no batch norm"].num_layers == 3
    assert made["discrete levels=5, 8"].levels == 5
    assert (made["mlp2 l1=0.1, 8"].kind, made["mlp2 l1=0.1, 8"].l1, made["mlp2 l1=0.1, 8"].hidden_dim) == (
        "mlp",
        0.1,
        16,
    )
    for wrong in ("mlp", "mlp1", "direct2", "sae top_k", "conv", ""):
        with pytest.raises(UserError, match=f"lab.heads: expected one of none, .* got '{wrong}'"):
            lab.cells(tiny(tmp_path, heads=[wrong]))
    with pytest.raises(UserError, match=r"model.head.levls'; did you mean 'model.head.levels'"):
        lab.checked_cells(tiny(tmp_path, heads=["discrete levls=5"]))


def test_controls_change_one_thing(tmp_path):
    config = tiny(tmp_path, controls=["same_class", "without_jitter"], num_seeds=1)
    config = configuration.with_overrides(config, ["augment.views=[{count=2, jitter_probability=0.5}]"])
    plain, with_head, same_class, no_jitter = (lab.cell_config(config, cell) for cell in lab.cells(config))
    assert [cell.row_name for cell in lab.cells(config)] == ["none", *(f"mlp2, 8{c}" for c in ("", *CONTROLLED))]
    assert lab.cells(config)[3].name == "mlp2-d8-bn-without_jitter-seed0"
    assert same_class.objective.name == "supervised"
    assert same_class.objective.temperature == with_head.objective.temperature
    assert same_class.augment == with_head.augment
    assert {policy.jitter_probability for policy in no_jitter.augment.policies()} == {0.0}
    assert {policy.jitter_probability for policy in with_head.augment.policies()} == {0.5}
    assert no_jitter.objective == plain.objective
    with pytest.raises(UserError, match=r"lab.controls: expected names among same_class, .* got 'no_jitter'"):
        lab.cells(tiny(tmp_path, controls=["no_jitter"]))
    with pytest.raises(UserError, match="same_class is NT-Xent with labels, not of byol"):
        lab.checked_cells(tiny(tmp_path, controls=["same_class"], objectives=["byol"]))


CONTROLLED = (", same_class", ", without_jitter")


@pytest.mark.slow
def test_a_real_grid_goes_on_where_it_stopped_and_is_summed_up(tmp_path):
    config = tiny(tmp_path / "lab", num_seeds=1)
    file = tmp_path / "lab.toml"
    file.write_text(configuration.dumps(config))
    laboratory.run(config, only=0)  # as one task of a job array
    first, second = lab.cells(config)
    assert first.results() is not None
    assert second.results() is None
    stamp = (first.folder / "config.toml").stat().st_mtime_ns
    from launch.command import app

    done = CliRunner().invoke(app, ["lab", str(file)])
    assert done.exit_code == 0, done.output + second.beside(".log").read_text()
    assert (first.folder / "config.toml").stat().st_mtime_ns == stamp
    summary = json.loads((tmp_path / "lab" / "lab.json").read_text())
    assert (summary["done"], summary["cells"]) == (2, 2)
    assert {one["name"] for one in summary["rows"]} == {"none", "mlp2, 8"}
    page = " ".join((tmp_path / "lab" / "lab.html").read_text().split())
    assert [one["outcome"] for one in summary["verdicts"]] == ["not supported"] * 3  # of one seed
    assert all(one["claim"] in page for one in summary["verdicts"])
    assert to_json(summarize_lab(lab.cells(config)))["paragraph"] == summary["paragraph"]
    assert "linear" in done.output
    # A look at a cell on other data, here with the splits exchanged, does not become the cell's result.
    shards = [f"{tmp_path}/lab/data/{split}" for split in ("test", "train")]
    arguments = ["--train-shards", shards[0], "--test-shards", shards[1], "--probes", "knn"]
    other = CliRunner().invoke(app, ["evaluate", str(first.folder), *arguments])
    assert other.exit_code == 0, other.output
    assert "step-2/data-" in other.output.replace("\n", "")
    assert set(first.results()["probes"]) == {"linear", "knn"}
    # Cells that are not alike are not compared.
    for keys in (["train.steps=3"], ["train.steps=3", "--summary"]):
        other = CliRunner().invoke(app, ["lab", str(file), "--set", *keys])
        assert isinstance(other.exception, UserError)
        assert "was made by another config (train.steps: 2 -> 3); name another folder" in str(other.exception)
    other = CliRunner().invoke(app, ["lab", str(file), "--set", "evaluation.knn_k=5"])
    assert "was evaluated otherwise (evaluation.knn_k: 20 -> 5); name another" in str(other.exception)
    with pytest.raises(UserError, match=r"holds shards of shapes:96:20.*lab.source is shapes:90"):
        laboratory.run(tiny(tmp_path / "lab", num_seeds=1, source="shapes:90"))
    with pytest.raises(UserError, match=r"0.25 of it is held out, lab.test_fraction is 0.5: name another folder"):
        laboratory.run(tiny(tmp_path / "lab", num_seeds=1, test_fraction=0.5))
    # Of a job array's tasks one that failed says so.
    assert CliRunner().invoke(app, ["lab", str(file), "--cell", "0"]).exit_code == 0
    too_wide = ["--set", 'lab.heads=["direct"]', "--set", "lab.output_dims=[4096]"]
    assert CliRunner().invoke(app, ["lab", str(file), "--cell", "0", *too_wide]).exit_code == 1


def test_a_signal_to_the_lab_is_its_cells_and_ends_both(tmp_path, monkeypatch):
    (tmp_path / "python").write_text("#!/bin/sh\ntrap 'echo told; exit 0' USR1\nkill -USR1 $PPID\nsleep 9 & wait\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    config = tiny(tmp_path / "lab")
    cell = lab.cells(config)[0]
    with pytest.raises(SystemExit, match="75"):
        laboratory._run_cell(cell, lab.cell_config(config, cell), 1)
    assert cell.beside(".log").read_text() == "told\n"


@pytest.mark.slow
def test_of_the_cells_of_a_job_array_one_writes_the_data_and_the_others_wait(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    config = tiny(tmp_path / "lab", source="shapes:8:8")
    (tmp_path / "lab").mkdir()
    cell = threading.Thread(target=laboratory._prepare_data, args=[config])
    with (tmp_path / "lab" / "data.lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        cell.start()
        while cell.is_alive() and "waiting for another cell" not in caplog.text:
            time.sleep(0.01)
        assert not lab.data_folder(config).exists()
    cell.join()
    assert (lab.data_folder(config) / "test" / "manifest.json").exists()


def test_images_without_labels_are_summed_up_by_what_the_head_keeps(tmp_path):
    grid, said = lab.cells(tiny(tmp_path)), []
    results = a_result(2, 0.5, "") | {"probes": {}, "data": {"num_classes": 0, "test_images": 9}}
    for cell in grid:
        write_json(cell.folder / "evaluation" / "step-2" / "results.json", results)
    summary = summarize_lab(grid)
    show(summary, said.append)
    assert (summary["done"], summary["chance"]) == (len(grid), 0.0)
    page = lab_page.build(summary, "mine", tmp_path / "lab.html")
    assert "What each head keeps" in page.read_text()
    assert "h holds more transformations than z: supported" in said[-1]


def test_probes_that_need_labels_are_refused_before_the_first_cell(tmp_path):
    root = photo_folder(tmp_path / "photos", 1, each=3) / "class0"
    with pytest.raises(UserError, match=r"lab: expected labelled images for evaluation.probes = linear, knn, got none"):
        laboratory.run(tiny(tmp_path / "lab", source=f"folder:{root}", test_fraction=0.4))
    assert not (tmp_path / "lab" / "cells").exists()


def test_an_empty_laboratory_has_a_page(tmp_path):
    summary = summarize_lab(lab.cells(tiny(tmp_path)))
    assert summary["done"] == 0
    assert "No cell" in lab_page.build(summary, "empty", tmp_path / "lab.html").read_text()
