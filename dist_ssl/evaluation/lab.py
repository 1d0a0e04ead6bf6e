"""The head laboratory: a matched grid of projection heads on one set of data, pretrained, evaluated, compared.

Everything but the head and the seed is the same in all cells. A cell is a run directory of its own, pretrained and
evaluated by the ordinary commands in processes of their own; one that is done is not run again, one that was
interrupted goes on. Cells are ordered by seed, so that an unfinished grid is a balanced one.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from dist_ssl import config as configuration
from dist_ssl.config import Config, LabConfig, UserError

log = logging.getLogger(__name__)

RUN_ME_AGAIN = 75


@dataclass(frozen=True)
class Cell:
    """One pretraining: a head, its batch norm and width, a seed, and the run directory that holds it."""

    head: str
    batch_norm: bool
    output_dim: int
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    def results(self) -> dict[str, Any] | None:
        """The newest evaluation's results, None where the cell is not done."""
        found = list(self.folder.glob("evaluation/step-*/results.json"))
        newest = max(found, key=lambda path: int(path.parent.name.removeprefix("step-")), default=None)
        return None if newest is None else json.loads(newest.read_text())


def cells(config: Config) -> list[Cell]:
    """The grid of `config.lab`, seeds outermost; a head of kind none has no width and no batch norm to vary."""
    lab = _lab(config)
    grid, seen = [], set()
    for seed, head, batch_norm, dim in product(range(lab.num_seeds), lab.heads, lab.batch_norm, lab.output_dims):
        _head_keys(head)
        parts = [head] if head == "none" else [head, f"d{dim}", "bn" if batch_norm else "nobn"]
        name = "-".join([*parts, f"seed{seed}"])
        if name not in seen:
            seen.add(name)
            grid.append(Cell(head, batch_norm, dim, seed, Path(config.run.dir) / "cells" / name))
    return grid


def cell_config(config: Config, cell: Cell, shards: str) -> Config:
    """The ordinary config of a cell: the lab's sections, with the cell's head, seed and folder."""
    values = config.model_dump(mode="python", exclude_none=True)
    values.pop("lab")
    values["run"] |= {"dir": str(cell.folder), "seed": config.run.seed + cell.seed}
    values["model"]["head"] |= _head_keys(cell.head) | {"batch_norm": cell.batch_norm, "output_dim": cell.output_dim}
    values["data"]["shards"] = values["data"]["shards"] or f"{shards}/train"
    values["evaluation"].setdefault("train_shards", f"{shards}/train")
    values["evaluation"].setdefault("test_shards", f"{shards}/test")
    return configuration.validate(values, cell.name)


def prepare_data(config: Config) -> str:
    """The folder of the lab's shards, written from `lab.source` once; data.shards is used where it is set."""
    lab = _lab(config)
    folder = _data_folder(config)
    if config.data.shards:
        if not (config.evaluation.train_shards and config.evaluation.test_shards):
            raise UserError("lab: with data.shards, evaluation.train_shards and evaluation.test_shards are needed too")
        return str(folder)
    if lab.source is None:
        raise UserError("lab: expected data.shards, or lab.source to write shards from")
    from dist_ssl.data.index import load_manifest
    from dist_ssl.data.shards import write_shards
    from dist_ssl.data.sources import open_source

    described = lab.source
    if described.startswith("shapes:") and described.count(":") == 1:
        described = f"{described}:{lab.source_image_size}"
    source = open_source(described, config.run.seed)
    if (folder / "test" / "manifest.json").exists():
        details = load_manifest(str(folder / "test"), config.storage).details
        if (details.get("source"), details.get("files")) != (source.name, source.fingerprint):
            raise UserError(
                f"{folder}: holds shards of {details['source']}, or of other files than are there now; lab.source is "
                f"{lab.source}: name another folder by run.dir"
            )
    else:
        write_shards(
            source,
            str(folder),
            config.storage,
            seed=config.run.seed,
            test_fraction=lab.test_fraction,
            progress=True,
        )
    return str(folder)


def done(config: Config) -> list[Cell]:
    """The grid. Raises UserError where a cell of it was made by another config: they would be compared as if alike."""
    grid = cells(config)
    for cell in grid:
        results = cell.results()
        if results is None:
            continue
        asked = cell_config(config, cell, str(_data_folder(config)))
        if differing := configuration.resume_diff(configuration.loads(results["config"]), asked):
            raise UserError(
                f"{cell.folder}: was made by another config ({'; '.join(differing)}); name another folder by run.dir, "
                "or remove this one"
            )
    return grid


def _data_folder(config: Config) -> Path:
    return Path(config.run.dir) / "data"


def run(config: Config, only: int | None = None) -> list[Cell]:
    """Runs the cells that are not done (or the one numbered `only`, for a job array) and returns the whole grid.

    A cell that fails is logged with its log's path and the next one is run; SystemExit(75) passes a request to be
    run again on.
    """
    grid = done(config)
    if only is not None and not 0 <= only < len(grid):
        raise UserError(f"--cell {only}: expected 0 to {len(grid) - 1}, the lab has {len(grid)} cells")
    shards = prepare_data(config)
    chosen = grid if only is None else [grid[only]]
    for number, cell in enumerate(chosen):
        if cell.results() is None:
            log.info("cell %d of %d: %s", number + 1, len(chosen), cell.name)
            _run_cell(cell, cell_config(config, cell, shards), _lab(config).ranks)
    return grid


def _run_cell(cell: Cell, config: Config, ranks: int) -> None:
    file, output = cell.folder.with_suffix(".toml"), cell.folder.with_suffix(".log")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(configuration.dumps(config))
    python = [sys.executable, "-m"]
    pretrain = ["dist_ssl.cli", "pretrain", str(file)]
    if ranks > 1:
        pretrain = ["launch.local", "pretrain", str(file), "--ranks", str(ranks)]
    for command in (pretrain, ["dist_ssl.cli", "evaluate", str(cell.folder)]):
        with output.open("a") as stream:
            code = subprocess.run(
                python + command, stdout=stream, stderr=subprocess.STDOUT, env=os.environ | {"COLUMNS": "120"}
            ).returncode
        if code == RUN_ME_AGAIN:
            raise SystemExit(RUN_ME_AGAIN)
        if code:
            log.error("cell %s: %s ended with code %d; its words are in %s", cell.name, command[1], code, output)
            return


def _head_keys(head: str) -> dict[str, Any]:
    if head in ("none", "linear"):
        return {"kind": head}
    if head.startswith("mlp") and head[3:].isdigit() and int(head[3:]) >= 2:
        return {"kind": "mlp", "num_layers": int(head[3:])}
    raise UserError(f"lab.heads: expected none, linear or mlpN with N >= 2 linear layers, got {head!r}")


def _lab(config: Config) -> LabConfig:
    if config.lab is None:
        raise UserError("lab: the config has no [lab] section; see configs/lab_cpu.toml")
    return config.lab
