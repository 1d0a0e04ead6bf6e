"""The head laboratory's grid: matched objectives, heads and controls on one set of data, to be run and compared.

Everything but those and the seed is the same in all cells. A cell is a run directory of its own.
Cells are ordered by seed, so that an unfinished grid is a balanced one. `launch.lab` runs them, `lab_summary` compares
them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from dist_ssl import config as configuration
from dist_ssl.config import (
    AS_WIDE_AS_H,
    HEADS,
    OF_AN_MLP,
    WITH_PREDICTOR,
    WITHOUT_BATCH_NORM,
    Config,
    LabConfig,
    ObjectiveConfig,
    UserError,
)
from dist_ssl.evaluation.results import stored
from dist_ssl.storage.urls import join

# Keys of [evaluation] that change no number: where its data is, which has a hash, and how it is read.
MAY_DIFFER = {"train_shards", "test_shards", "batch_size_per_rank", "num_workers", "keep_features"}
# Keys of [augment] that a control sets, for every view. `same_class` takes the labels instead: SupCon's loss.
CONTROLS: dict[str, dict[str, float]] = {
    "same_class": {},
    "without_crop": {"min_scale": 1.0, "max_scale": 1.0},
    "without_flip": {"flip_probability": 0.0},
    "without_jitter": {"jitter_probability": 0.0},
    "without_grey": {"grey_probability": 0.0},
    "without_blur": {"blur_probability": 0.0},
    "always_grey": {"grey_probability": 1.0},
    "small_crops": {"min_scale": 0.05, "max_scale": 0.25},
}


@dataclass(frozen=True)
class Cell:
    """One pretraining: an objective, a head with its batch norm and width, a control, a seed, and its run directory."""

    objective: ObjectiveConfig | None  # None: the config's own, which all cells have
    head: str
    batch_norm: bool
    output_dim: int
    control: str  # empty: none
    seed: int
    folder: Path

    @property
    def row_name(self) -> str:
        """Without the seed."""
        kind = kind_of(self.head)
        parts = [self.head] if kind in AS_WIDE_AS_H else [self.head, str(self.output_dim)]
        parts += [] if self.batch_norm or kind in WITHOUT_BATCH_NORM else ["no batch norm"]
        name = ", ".join([*parts, self.control] if self.control else parts)
        return f"{self.method}: {name}" if self.method else name

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
    """The grid of `config.lab`, seeds outermost; some heads have no width or batch norm to vary, none no control."""
    lab = lab_section(config)
    grid: dict[Path, Cell] = {}
    objectives: list[ObjectiveConfig | None] = [*lab.objectives] or [None]
    axes = (range(lab.num_seeds), objectives, ["", *lab.controls], lab.heads, lab.batch_norm, lab.output_dims)
    for seed, objective, control, head, batch_norm, dim in product(*axes):
        _head_keys(head)
        if control not in ("", *CONTROLS):
            raise UserError(f"lab.controls: expected names among {', '.join(CONTROLS)}, got {control!r}")
        cell = Cell(objective, head, batch_norm, dim, control, seed, Path(config.run.dir) / "cells")
        kind = kind_of(head)
        parts = [*(cell.method.split() or []), *head.split()]
        parts += [] if kind in AS_WIDE_AS_H else [f"d{dim}"]
        parts += [] if kind in WITHOUT_BATCH_NORM else ["bn" if batch_norm else "nobn"]
        parts += [control] if control else []
        folder = cell.folder / "-".join([*parts, f"seed{seed}"])
        if not (control and head == "none"):  # h is z
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
    if config.checkpoint.url:
        values["checkpoint"]["url"] = join(config.checkpoint.url, cell.name)
    _control(values, cell.control)
    values["model"]["head"] |= _head_keys(cell.head) | {"batch_norm": cell.batch_norm, "output_dim": cell.output_dim}
    values["data"]["shards"] = values["data"]["shards"] or f"{shards}/train"
    values["evaluation"].setdefault("train_shards", f"{shards}/train")
    values["evaluation"].setdefault("test_shards", f"{shards}/test")
    changed = [f"model.head.{setting}" for setting in cell.head.split()[1:]]
    return configuration.with_overrides(configuration.validate(values, cell.name), changed)


def _control(values: dict[str, Any], control: str) -> None:
    """Lay a control over a cell's values."""
    objective = values["objective"]
    if control == "same_class":
        if objective["name"] not in ("nt_xent", "supervised"):
            raise UserError(
                f"lab.controls: same_class is NT-Xent with labels, not of {objective['name']}; leave it out"
            )
        values["objective"] = objective | {"name": "supervised"}
    for key, value in CONTROLS.get(control, {}).items():
        values["augment"][key] = value
        for views in values["augment"]["views"]:
            views.pop(key, None)  # of a set of views: what it leaves unset is as [augment] says


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
        made = configuration.loads(results["config"])
        if differing := configuration.resume_diff(made, asked):
            raise UserError(
                f"{cell.folder}: was made by another config ({'; '.join(differing)}); name another folder by run.dir, "
                "or remove this one"
            )
        before, now = (one.evaluation.model_dump(exclude=MAY_DIFFER) for one in (made, asked))
        if differing := [
            f"evaluation.{key}: {before[key]!r} -> {now[key]!r}" for key in now if before[key] != now[key]
        ]:
            raise UserError(
                f"{cell.folder}: was evaluated otherwise ({'; '.join(differing)}); name another folder by run.dir, or "
                f"remove {cell.folder / 'evaluation'}, which is then made again"
            )
    return grid


def data_folder(config: Config) -> Path:
    """Where the lab's own shards stand, `train` and `test`."""
    return Path(config.run.dir) / "data"


def kind_of(head: str) -> str:
    """The kind of a head of `lab.heads`: "mlp" of "mlp2 l1=0.1"."""
    return head.split()[0].rstrip("0123456789")


def variant_of(head: str) -> str:
    """Its kind and the names of the keys that it changes: "mlp l1" of "mlp2 l1=0.1"."""
    return " ".join([kind_of(head), *(setting.partition("=")[0] for setting in head.split()[1:])])


def _head_keys(head: str) -> dict[str, Any]:
    """What the first word of a head says: its kind, and of an MLP how many layers it has."""
    found = re.fullmatch(r"([a-z_]+?)(\d*)((?: \w+=\S+)*)", head)
    kind, layers, _ = found.groups() if found else ("", "", "")
    if kind in HEADS and (not layers if kind not in OF_AN_MLP else int(layers or (0 if kind == "mlp" else 2)) >= 2):
        return {"kind": kind} | ({"num_layers": int(layers)} if layers else {})
    raise UserError(
        f"lab.heads: expected one of {', '.join(name for name in HEADS if name != 'mlp')} or mlpN with N >= 2 linear "
        f"layers, and key=value of [model.head] after it, got {head!r}"
    )


def lab_section(config: Config) -> LabConfig:
    if config.lab is None:
        raise UserError("lab: the config has no [lab] section; see configs/lab_cpu.toml")
    return config.lab
