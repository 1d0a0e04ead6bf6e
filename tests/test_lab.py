"""The laboratory: its grid, what its paragraph may claim, and a real grid that is interrupted and goes on."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from dist_ssl import config as configuration
from dist_ssl.config import UserError
from dist_ssl.evaluation import lab
from dist_ssl.evaluation.lab_summary import Estimate, Row, paired, paragraph, summarize_lab, to_json, untrained
from dist_ssl.report import lab_page
from launch import lab as laboratory

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


def test_an_objective_is_held_against_the_untrained_encoder():
    before = {("knn", "h_untrained"): Estimate.of({0: 0.40, 1: 0.42, 2: 0.41})}
    after = {("knn", "h"): Estimate.of({0: 0.60, 1: 0.63, 2: 0.61})}
    rows = [Row("byol: mlp2, 8", "byol", "mlp2", True, 8, after | before, {})]
    assert "under byol: mlp2, 8 against the untrained encoder's: better by +20.3 points" in paragraph(rows, 3, 3)
    assert untrained(rows, "knn").mean == pytest.approx(0.41)
    # Heads are compared under one objective only.
    other = Row("vicreg: none", "vicreg", "none", True, 8, {("linear", "h"): Estimate.of({0: 0.1, 1: 0.1, 2: 0.1})}, {})
    mine = Row("byol: mlp2, 8", "byol", "mlp2", True, 8, {("linear", "h"): Estimate.of({0: 0.5, 1: 0.5, 2: 0.6})}, {})
    assert "against h under" not in paragraph([mine, other], 6, 6)


def row(head, h, z, bits=None, dim=8):
    top1 = {("linear", "h"): Estimate.of(dict(enumerate(h))), ("linear", "z"): Estimate.of(dict(enumerate(z)))}
    found = {
        task: {layer: Estimate.of(dict(enumerate(values))) for layer, values in layers.items()}
        for task, layers in (bits or {}).items()
    }
    return Row(head, "", head, True, dim, top1, found)


def test_the_paragraph_claims_only_what_intervals_support():
    none = row("none", [0.50, 0.51, 0.52], [0.50, 0.51, 0.52])
    good = row("mlp2", [0.70, 0.71, 0.72], [0.60, 0.61, 0.62], {"hue": {"h": [1.0, 1.1, 1.2], "z": [0.2, 0.3, 0.4]}})
    text = paragraph([none, good], 6, 6)
    assert "on h against one on z: better by +10.0 points" in text
    assert "h under mlp2 against h under none: better by +20.0 points" in text
    assert "hue (0.80 bits under mlp2)" in text
    noisy = row("mlp2", [0.70, 0.40, 0.60], [0.60, 0.61, 0.52], {"hue": {"h": [1.0, 0.1, 0.2], "z": [0.2, 0.3, 0.4]}})
    text = paragraph([none, noisy], 6, 6)
    assert "better" not in text
    assert text.count("no difference is supported") == 2
    assert "No loss of information from h to z is supported" in text
    worse = row("mlp2", [0.30, 0.31, 0.32], [0.40, 0.41, 0.42])
    assert "worse, -10.0 points" in paragraph([none, worse], 6, 6)
    single = row("mlp2", [0.9], [0.1])
    text = paragraph([row("none", [0.5], [0.5]), single], 6, 2)
    assert "2 of 6 cells are done" in text
    assert "supports nothing yet" in text
    assert "better" not in text
    # Pairing is by seed, not by position.
    assert paired(Estimate.of({1: 0.5, 2: 0.7}), Estimate.of({2: 0.6, 3: 0.1})).values == pytest.approx({2: 0.1})


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
    assert summary["paragraph"] in " ".join((tmp_path / "lab" / "lab.html").read_text().split())
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
    with pytest.raises(UserError, match=r"holds shards of shapes:96:20.*lab.source is shapes:90"):
        laboratory.run(tiny(tmp_path / "lab", num_seeds=1, source="shapes:90"))


def test_an_empty_laboratory_has_a_page(tmp_path):
    summary = summarize_lab(lab.cells(tiny(tmp_path)))
    assert summary["done"] == 0
    assert "No cell" in lab_page.build(summary, "empty", tmp_path / "lab.html").read_text()
