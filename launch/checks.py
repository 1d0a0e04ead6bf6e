"""What can be wrong with a run before it is submitted, looked for where it can be mended at once."""

from __future__ import annotations

import os
from pathlib import Path

from dist_ssl import config as configuration
from dist_ssl.config import Config, UserError
from dist_ssl.data.manifest import absolute_location
from dist_ssl.planning.before_start import check_config, check_extras
from launch import queue


def with_data(config: Config, data: str | None) -> Config:
    """With the parts of `--data`; images that nobody has indexed are indexed here, once, before the job."""
    if data is None:
        return config
    from dist_ssl.data.given import training_overrides

    return configuration.with_overrides(config, training_overrides(data, config.storage))


def absolute(config: Config) -> Config:
    """Local paths made absolute: the job starts in another directory, and so may the next submission."""
    keys = {
        "run.dir": config.run.dir,
        "data.shards": config.data.shards,
        "data.cache_dir": config.data.cache_dir,
        "model.init": config.model.init,
        "checkpoint.url": config.checkpoint.url,
        "evaluation.train_shards": config.evaluation.train_shards,
        "evaluation.test_shards": config.evaluation.test_shards,
    }
    made = {key: absolute_location(path) for key, path in keys.items() if path}
    return configuration.with_overrides(config, [configuration.override(*one) for one in made.items()])


def check_run(config: Config, num_ranks: int, same_environment: bool) -> None:
    """Raises UserError for what would stop the run on the cluster and can be seen here.

    `same_environment`: the ranks import what this process would, and not what a container holds.
    """
    check_config(config, num_ranks)
    if same_environment:
        check_extras(config)
    directory = Path(config.run.dir)
    existing = next(folder for folder in (directory, *directory.parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK) or not _can_write(existing):
        raise UserError(f"run.dir {directory}: {existing} is not a folder that can be written to; --set run.dir=PATH")
    if (directory / "slurm" / "jobs.jsonl").exists():
        for entry in queue.recorded(directory):
            if entry["kind"] == "pretrain" and not queue.is_over(queue.state(entry["job"])[0]):
                raise UserError(f"{directory}: job {entry['job']} already trains this run; cancel it first, or wait")


def _can_write(folder: Path) -> bool:
    """Tried, because permissions don't tell: root, read-only file systems, quotas."""
    probe = folder / f".dist_ssl-{os.getpid()}"
    try:
        probe.touch()
        probe.unlink()
    except OSError:
        return False
    return True
