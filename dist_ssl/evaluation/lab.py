"""The head laboratory's grid: matched projection heads on one set of data, to be pretrained, evaluated, compared.

Everything but the head and the seed is the same in all cells. A cell is a run directory of its own. Cells are ordered
by seed, so that an unfinished grid is a balanced one. `launch.lab` runs them, `lab_summary` compares them.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from dist_ssl import config as configuration
from dist_ssl.config import Config, LabConfig, UserError
from dist_ssl.evaluation.results import stored


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
        own = [one.values for one in stored(self.folder) if one.name == ""]
        return own[-1] if own else None


def cells(config: Config) -> list[Cell]:
    """The grid of `config.lab`, seeds outermost; a head of kind none has no width and no batch norm to vary."""
    lab = lab_section(config)
    grid, seen = [], set()
    for seed, head, batch_norm, dim in product(range(lab.num_seeds), lab.heads, lab.batch_norm, lab.output_dims):
        _head_keys(head)
        parts = [head] if head == "none" else [head, f"d{dim}", "bn" if batch_norm else "nobn"]
        name = "-".join([*parts, f"seed{seed}"])
        if name not in seen:
            seen.add(name)
            grid.append(Cell(head, batch_norm, dim, seed, Path(config.run.dir) / "cells" / name))
    return grid


def cell_config(config: Config, cell: Cell) -> Config:
    """The ordinary config of a cell: the lab's sections, with the cell's head, seed and folder."""
    values, shards = config.model_dump(mode="python", exclude_none=True), data_folder(config)
    values.pop("lab")
    values["run"] |= {"dir": str(cell.folder), "seed": config.run.seed + cell.seed}
    values["model"]["head"] |= _head_keys(cell.head) | {"batch_norm": cell.batch_norm, "output_dim": cell.output_dim}
    values["data"]["shards"] = values["data"]["shards"] or f"{shards}/train"
    values["evaluation"].setdefault("train_shards", f"{shards}/train")
    values["evaluation"].setdefault("test_shards", f"{shards}/test")
    return configuration.validate(values, cell.name)


def checked_cells(config: Config) -> list[Cell]:
    """The grid. Raises UserError where a cell of it was made by another config: they would be compared as if alike."""
    grid = cells(config)
    for cell in grid:
        results = cell.results()
        if results is None:
            continue
        asked = cell_config(config, cell)
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
