"""The laboratory's runner: its shards, then cell after cell, each by the ordinary commands in processes of their own.

A cell that is done is not run again, one that was interrupted goes on. A signal to the lab is its cell's,
which commits first.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from dist_ssl import config as configuration
from dist_ssl.config import Config, UserError
from dist_ssl.config.environment import EXIT_RUN_ME_AGAIN
from dist_ssl.evaluation.lab import Cell, cell_config, checked_cells, data_folder, lab_section
from dist_ssl.planning.before_start import has_labels
from launch import child

log = logging.getLogger(__name__)


def run(config: Config, only: int | None = None) -> list[Cell]:
    """Runs the cells that are not done (or the one numbered `only`, for a job array) and returns the whole grid.

    A cell that fails is logged with its log's path and the next one is run; SystemExit(75) passes a request to be
    run again on.
    """
    grid = checked_cells(config)
    if only is not None and not 0 <= only < len(grid):
        raise UserError(f"--cell {only}: expected 0 to {len(grid) - 1}, the lab has {len(grid)} cells")
    _prepare_data(config)
    _check_labels(cell_config(config, grid[0]))
    chosen = grid if only is None else [grid[only]]
    for number, cell in enumerate(chosen):
        if cell.results() is None:
            log.info("cell %d of %d: %s", number + 1, len(chosen), cell.name)
            _run_cell(cell, cell_config(config, cell), lab_section(config).ranks)
    return grid


def _prepare_data(config: Config) -> None:
    """The lab's shards, written from `lab.source` once, unless data.shards names others."""
    lab = lab_section(config)
    if config.data.shards:
        if not (config.evaluation.train_shards and config.evaluation.test_shards):
            raise UserError("lab: with data.shards, evaluation.train_shards and evaluation.test_shards are needed too")
        return
    if lab.source is None:
        raise UserError("lab: expected data.shards, or lab.source to write shards from")
    from dist_ssl.data.manifest import load_manifest
    from dist_ssl.data.shards import write_shards
    from dist_ssl.data.sources import open_source

    folder, described = data_folder(config), lab.source
    if described.startswith("shapes:") and described.count(":") == 1:
        described = f"{described}:{lab.source_image_size}"
    source = open_source(described, config.run.seed, config.storage)
    with _alone(folder):
        if (folder / "test" / "manifest.json").exists():
            details = load_manifest(str(folder / "test"), config.storage).details
            if details.get("test_fraction") != lab.test_fraction:
                raise UserError(
                    f"{folder}: {details['test_fraction']:g} of it is held out, lab.test_fraction is "
                    f"{lab.test_fraction:g}: name another folder by run.dir"
                )
            if (details.get("source"), details.get("files")) != (source.name, source.fingerprint):
                raise UserError(
                    f"{folder}: holds shards of {details['source']}, or of other files than are there now; lab.source "
                    f"is {lab.source}: name another folder by run.dir"
                )
            return
        write_shards(
            source, str(folder), config.storage, seed=config.run.seed, test_fraction=lab.test_fraction, progress=True
        )


def _check_labels(config: Config) -> None:
    """Raises UserError where no probe could say anything of any cell."""
    from dist_ssl.data.manifest import load_manifest

    probes, shards = config.evaluation.probes, str(config.evaluation.train_shards)
    if {"head_information", "geometry"}.isdisjoint(probes) and not has_labels(
        load_manifest(shards, config.storage), config.storage
    ):
        raise UserError(
            f"lab: expected labelled images for evaluation.probes = {', '.join(probes)}, got none in {shards} with a "
            'label; take class folders, or the probe "head_information", which compares heads without labels too'
        )


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Of a job array's cells, which start at once, one writes to `folder` and the others wait for it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("a") as lock:  # the kernel frees it when its holder dies
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("%s: waiting for another cell, which writes it", folder)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _run_cell(cell: Cell, config: Config, ranks: int) -> None:
    file, output = cell.beside(".toml"), cell.beside(".log")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(configuration.dumps(config))
    pretrain = ["dist_ssl.cli", "pretrain", str(file)]
    if ranks > 1:
        pretrain = ["launch.local", "pretrain", str(file), "--ranks", str(ranks)]
    for command in (pretrain, ["dist_ssl.cli", "evaluate", str(cell.folder)]):
        with output.open("a") as stream:
            code = child.run(
                [sys.executable, "-m", *command],
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=os.environ | {"COLUMNS": "120"},
            )
        if code == EXIT_RUN_ME_AGAIN:
            raise SystemExit(EXIT_RUN_ME_AGAIN)
        if code:
            log.error("cell %s: %s ended with code %d; its words are in %s", cell.name, command[1], code, output)
            return
