"""Where a run's checkpoints, incarnations and exports stand: every path and name, once, for ranks and launchers.

    checkpoints/step-00001200/i0007/rank-00003.safetensors   checkpoints/ may be an object store: checkpoint.url
    checkpoints/step-00001200/i0007/state.json
    checkpoints/step-00001200/manifest.json
    incarnations/0007
    export/step-00001200.safetensors

Knows no torch: a supervisor, which outlives the ranks, reads it too.
"""

from __future__ import annotations

import re
from pathlib import Path

from dist_ssl.config import Config, UserError
from dist_ssl.storage.store import Store
from dist_ssl.storage.urls import join

MANIFEST = "manifest.json"  # of a checkpoint: written last


def config_path(run_dir: str | Path) -> Path:
    """A run's own config. Raises UserError where there is no run."""
    path = Path(run_dir, "config.toml")
    if not path.exists():
        raise UserError(f"{run_dir}: not a run directory: it has no config.toml")
    return path


def checkpoint_store(config: Config) -> Store:
    return Store(config.checkpoint.url or join(config.run.dir, "checkpoints"), config.storage)


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def state_name(incarnation: int) -> str:
    return f"i{incarnation:04d}/state.json"


def rank_name(incarnation: int, rank: int) -> str:
    return f"i{incarnation:04d}/rank-{rank:05d}.safetensors"


def committed_steps(store: Store) -> list[int]:
    """Steps that have a manifest, ascending; whether it holds is seen when it is read."""
    return sorted(step for step, committed in steps_in(store).items() if committed)


def steps_in(store: Store) -> dict[int, bool]:
    """Steps of which there is any file -> whether there is a manifest."""
    found: dict[int, bool] = {}
    for name in store.names():
        if match := re.match(r"step-(\d{8})/(.+)", name):
            step = int(match[1])
            found[step] = found.get(step, False) or match[2] == MANIFEST
    return found


def export_path(run_dir: str | Path, step: int) -> Path:
    return Path(run_dir, "export", f"{step_name(step)}.safetensors")


def check_export_name(file: str | Path) -> None:
    """Raises UserError for the name of a format that is not written."""
    if Path(file).suffix != ".safetensors":
        raise UserError(f"{file}: expected a name that ends in .safetensors, which is the format that is written")


def exported_steps(run_dir: str | Path) -> set[int]:
    return {int(path.stem.removeprefix("step-")) for path in Path(run_dir, "export").glob("step-*.safetensors")}


def newest_incarnation(run_dir: str | Path) -> int:
    return max((int(path.name) for path in Path(run_dir, "incarnations").glob("[0-9]*")), default=0)


def take_incarnation(run_dir: str | Path) -> int:
    """The next incarnation number of a run directory, taken by creating its file. Call on rank 0 only."""
    directory = Path(run_dir, "incarnations")
    directory.mkdir(parents=True, exist_ok=True)
    while True:
        number = newest_incarnation(run_dir) + 1
        try:
            (directory / f"{number:04d}").touch(exist_ok=False)
        except FileExistsError:  # another start took it in the same moment
            continue
        return number
