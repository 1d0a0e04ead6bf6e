"""Opening a run directory: fresh or where it was, fenced against older incarnations, refused for another config."""

from __future__ import annotations

import logging
import os
import platform
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from dist_ssl import checkpoint
from dist_ssl import config as config_module
from dist_ssl.checkpoint import Checkpoint, RunState
from dist_ssl.config import Config, UserError
from dist_ssl.distributed import broadcast_object, rank, together
from dist_ssl.engine.optimizers import learning_rate
from dist_ssl.storage import Store
from dist_ssl.storage.layout import checkpoint_store, committed_steps, take_incarnation
from dist_ssl.training.observability import keep_wandb_id, ledgers_of, trim_run

log = logging.getLogger(__name__)


def open_run(config: Config, manifest: Any, *, restart: bool, extend: bool) -> tuple[int, Checkpoint | None]:
    """(incarnation, the checkpoint to go on from or None for a fresh start). Collective; errors reach all ranks.

    Raises UserError where the directory can't be written, holds a run of another config or other data, or has lost its
    checkpoints.
    """
    run_dir = Path(config.run.dir)
    with together():
        if rank() == 0:
            _make(config, run_dir, restart)
    store = checkpoint_store(config)
    found = checkpoint.newest_valid(store)
    state, incarnation = None, 0
    with together():
        if found is None and (run_dir / "metrics.jsonl").exists():
            raise UserError(
                f"{store.root}: {run_dir} has been trained but no checkpoint is there; "
                "put it back, or begin anew with --restart"
            )
        if found is not None:
            state = found.state()
            _check_goes_on(config, manifest, state, extend)
    # Only now, when nothing refuses this start any more: taking the number stops whoever runs here.
    with together():
        if rank() == 0:
            incarnation = take_incarnation(run_dir)
            if state is not None and state.step:
                keep_wandb_id(run_dir, state.config)
            Store(str(run_dir), config.storage).write("config.toml", config_module.dumps(config).encode())
    incarnation = broadcast_object(incarnation)
    if rank() == 0 and state is not None:
        log.info("%s: going on from step %d as incarnation %d", run_dir, state.step, incarnation)
    if state is not None:
        ledgers = broadcast_object(ledgers_of(run_dir) if rank() == 0 else None)
        with together():
            trim_run(run_dir, state.step, ledgers)
    return incarnation, found


def _make(config: Config, run_dir: Path, restart: bool) -> None:
    if restart:
        _check_restart(config, run_dir)  # before anything is moved
    try:
        if restart:
            _set_aside(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as cause:
        raise UserError(f"run.dir = {run_dir}: expected a directory that can be written: {cause}") from None


def _check_restart(config: Config, run_dir: Path) -> None:
    """Raises UserError where checkpoints would stay behind: those in the run directory go with it."""
    store = checkpoint_store(config)
    path = store.local_path()
    moves = path is not None and Path(path).is_relative_to(os.path.abspath(run_dir))
    if not moves and committed_steps(store):
        raise UserError(
            f"checkpoint.url = {store.root}: expected it empty for a restart, but a run's checkpoints are there; "
            "give another one or remove them"
        )


def _set_aside(run_dir: Path) -> None:
    """--restart deletes nothing: the old run keeps its files under another name."""
    if run_dir.exists() and any(run_dir.iterdir()):
        aside = run_dir.with_name(f"{run_dir.name}.before-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
        os.rename(run_dir, aside)
        log.info("the run that was in %s is now in %s", run_dir, aside)


def _check_goes_on(config: Config, manifest: Any, state: RunState, extend: bool) -> None:
    saved = config_module.loads(state.config, "the checkpoint's config")
    if manifest.hash != state.data_hash:
        raise UserError(
            f"data.shards = {config.data.shards}: not what this run was trained on (manifest {manifest.hash[:12]}, "
            f"expected {state.data_hash[:12]}); give the same shards (indexed as they were, with or without "
            "--checksums), another run.dir, or --restart"
        )
    differences = config_module.resume_diff(saved, config)
    length = [line for line in differences if line.startswith(("train.steps", "train.epochs"))]
    if extend:
        differences = [line for line in differences if line not in length]
    if differences:
        hint = "; --extend makes a run longer" if length else ""
        if any(line.startswith(("data.streams", "data.block_shards")) for line in differences):
            streams, block = saved.data.streams, saved.data.block_shards
            hint += (
                f"; data.streams and data.block_shards are the samples' order, on any number of ranks: to go on, --set "
                f"data.streams={streams} --set data.block_shards={block}"
            )
        raise UserError(
            f"{config.run.dir} holds a run whose config differs in what may not change on resume: "
            f"{'; '.join(differences)}; use its config, another run.dir, or --restart{hint}"
        )
    if not length:
        return
    before = config_module.total_steps(saved, manifest.num_samples)
    after = config_module.total_steps(config, manifest.num_samples)
    if after < before:
        raise UserError(f"--extend: expected a longer run than its {before} steps; got {after}")
    if rank() == 0:
        log.warning(
            "extended from %d to %d steps: the schedule is stretched, the next learning rate is %.3g instead of %.3g",
            before,
            after,
            learning_rate(config, state.step, after, manifest.num_samples),
            learning_rate(saved, state.step, before, manifest.num_samples),
        )


def versions() -> dict[str, str]:
    """What the run was computed with, for the checkpoint and the report."""
    packages = ("dist_ssl", "torch", "torchvision", "deepspeed", "webdataset", "numpy")
    found = {name: metadata.version(name) for name in packages}
    return found | {"python": platform.python_version(), "host": platform.node()}
