"""The head laboratory's grid: matched objectives and heads on one set of data, to be pretrained, evaluated, compared.

Everything but the objective, the head and the seed is the same in all cells. A cell is a run directory of its own.
Cells are ordered by seed, so that an unfinished grid is a balanced one. `launch.lab` runs them, `lab_summary` compares
them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from dist_ssl import config as configuration
from dist_ssl.config import WITH_PREDICTOR, Config, LabConfig, ObjectiveConfig, UserError
from dist_ssl.evaluation.results import stored


@dataclass(frozen=True)
class Cell:
    """One pretraining: an objective, a head, its batch norm and width, a seed, and the run directory that holds it."""

    objective: ObjectiveConfig | None  # None: the config's own, which all cells have
    head: str
    batch_norm: bool
    output_dim: int
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def method(self) -> str:
        """The objective's name with the keys that are not its paper's; empty where all cells have one."""
        if self.objective is None:
            return ""
        changed = self.objective.model_dump(exclude_defaults=True)
        return " ".join([self.objective.name, *(f"{key}={value}" for key, value in changed.items() if key != "name")])

    def beside(self, ending: str) -> Path:
        """A file of this cell's next to its folder, whose name has dots where an objective's key has a fraction."""
        return self.folder.with_name(self.name + ending)

    def results(self) -> dict[str, Any] | None:
        """The newest evaluation's results, None where the cell is not done."""
        own = [one.values for one in stored(self.folder) if one.name == ""]
        return own[-1] if own else None


def cells(config: Config) -> list[Cell]:
    """The grid of `config.lab`, seeds outermost; a head of kind none has no width and no batch norm to vary."""
    lab = lab_section(config)
    grid: dict[Path, Cell] = {}
    objectives: list[ObjectiveConfig | None] = [*lab.objectives] or [None]
    axes = (range(lab.num_seeds), objectives, lab.heads, lab.batch_norm, lab.output_dims)
    for seed, objective, head, batch_norm, dim in product(*axes):
        _head_keys(head)
        cell = Cell(objective, head, batch_norm, dim, seed, Path(config.run.dir) / "cells")
        parts = [cell.method.replace(" ", "-")] if cell.method else []
        parts += [head] if head == "none" else [head, f"d{dim}", "bn" if batch_norm else "nobn"]
        folder = cell.folder / "-".join([*parts, f"seed{seed}"])
        grid.setdefault(folder, replace(cell, folder=folder))
    return list(grid.values())


def cell_config(config: Config, cell: Cell) -> Config:
    """The ordinary config of a cell: the lab's sections, with the cell's objective, head, seed and folder."""
    values, shards = config.model_dump(mode="python", exclude_none=True), data_folder(config)
    values.pop("lab")
    if cell.objective is not None:
        values["objective"] = {"chunks": config.objective.chunks} | cell.objective.model_dump(exclude_unset=True)
        if cell.objective.name not in WITH_PREDICTOR:
            values["model"].pop("predictor", None)
    values["run"] |= {"dir": str(cell.folder), "seed": config.run.seed + cell.seed}
    values["model"]["head"] |= _head_keys(cell.head) | {"batch_norm": cell.batch_norm, "output_dim": cell.output_dim}
    values["data"]["shards"] = values["data"]["shards"] or f"{shards}/train"
    values["evaluation"].setdefault("train_shards", f"{shards}/train")
    values["evaluation"].setdefault("test_shards", f"{shards}/test")
    return configuration.validate(values, cell.name)


def checked_cells(config: Config) -> list[Cell]:
    """The grid. Raises UserError where a cell can't be, or was made by another config, so that they are not alike."""
    if config.evaluation.teacher:
        raise UserError(
            "evaluation.teacher: a lab compares students; leave it out, and probe a cell's teacher by itself"
        )
    grid = cells(config)
    for cell in grid:
        asked, results = cell_config(config, cell), cell.results()
        if results is None:
            continue
        if differing := configuration.resume_diff(configuration.loads(results["config"]), asked):
            raise UserError(
                f"{cell.folder}: was made by another config ({'; '.join(differing)}); name another folder by run.dir, "
                "or remove this one"
            )
    return grid


def data_folder(config: Config) -> Path:
    """Where the lab's own shards stand, `train` and `test`."""
    return Path(config.run.dir) / "data"


def _head_keys(head: str) -> dict[str, Any]:
    if head in ("none", "linear"):
        return {"kind": head}
    if head.startswith("mlp") and head[3:].isdigit() and int(head[3:]) >= 2:
        return {"kind": "mlp", "num_layers": int(head[3:])}
    raise UserError(f"lab.heads: expected none, linear or mlpN with N >= 2 linear layers, got {head!r}")


def lab_section(config: Config) -> LabConfig:
    if config.lab is None:
        raise UserError("lab: the config has no [lab] section; see configs/lab_cpu.toml")
    return config.lab
