"""Where a run's checkpoints and incarnations stand: every path and name, once.

checkpoints/step-00001200/i0007/rank-00003.safetensors
checkpoints/step-00001200/i0007/state.json
checkpoints/step-00001200/manifest.json
incarnations/0007
"""

from __future__ import annotations

import re
from pathlib import Path

from dist_ssl import storage
from dist_ssl.config import Config, StorageConfig


def checkpoint_url(config: Config) -> str:
    return config.checkpoint.url or storage.join(config.run.dir, "checkpoints")


def step_url(url: str, step: int) -> str:
    return storage.join(url, f"step-{step:08d}")


def committed_steps(url: str, config: StorageConfig) -> list[int]:
    """Steps that have a manifest, ascending; whether it holds is seen when it is read."""
    return sorted(steps_in(url, config, "manifest.json"))


def steps_in(url: str, config: StorageConfig, name: str = "") -> set[int]:
    found = (re.search(r"step-(\d{8})/(?:.*/)?([^/]+)$", file) for file in storage.list_files(url, config))
    return {int(match[1]) for match in found if match and (not name or match[2] == name)}


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
