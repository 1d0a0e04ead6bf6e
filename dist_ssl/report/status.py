"""How far runs are, read from what they wrote: no torch, no ranks, no scheduler is asked."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

from dist_ssl import config as configuration
from dist_ssl.config import UserError
from dist_ssl.evaluation.results import newest, stored
from dist_ssl.storage.layout import committed_steps, config_path
from dist_ssl.storage.store import Store

SILENT_SECONDS = 300.0  # a run that logged nothing for so long counts as stopped


def status(run: Path) -> dict[str, Any]:
    """One run: what `dist-ssl status RUN --json` prints, its keys as in that command's help. Raises UserError."""
    config = configuration.load(config_path(run))
    metrics = run / "metrics.jsonl"
    last = last_line(metrics)
    step = int(last["step"]) if last else 0
    total, silent = config.train.steps, None
    if last:
        silent = round(time.time() - metrics.stat().st_mtime, 1)
        if total is None and last.get("epoch"):
            total = configuration.total_steps(config, round(last["samples_seen"] / last["epoch"]))
    committed = (
        committed_steps(Store(str(run / "checkpoints"), config.storage)) if config.checkpoint.url is None else []
    )
    # The last step's line is written before its commit. Without any, the checkpoints are elsewhere or were removed.
    state = "complete" if last and step == total and committed[-1:] in ([], [step]) else "running"
    if state == "running" and (silent is None or silent > SILENT_SECONDS):
        state = "stopped" if last else "not begun"
    return {
        "run": str(run),
        "state": state,
        "step": step,
        "steps": total,
        "epoch": last.get("epoch"),
        "loss": last.get("loss"),
        "images_per_second": last.get("images_per_second"),
        "silent_seconds": silent,
        "checkpoint": committed[-1] if committed else None,
        "objective": config.objective.name,
        "encoder": config.model.encoder,
        "accuracy": _accuracy(run),
    }


def runs_below(folder: Path) -> list[Path]:
    """The run directories in a folder, three levels deep at most, those that were set aside left out."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected one with runs in it")
    found = [path.parent for depth in range(1, 4) for path in folder.glob("*/" * depth + "config.toml")]
    return sorted(run for run in found if _set_aside_at(run) is None)


def set_aside(folder: Path) -> list[tuple[Path, int, float]]:
    """(directory, bytes, days of age) of each run in a folder that a --restart set aside, the oldest first."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected one with runs in it")
    found = []
    for path in folder.rglob("*.before-*"):
        began = _set_aside_at(path)
        if path.is_dir() and not path.is_symlink() and (path / "config.toml").exists() and began is not None:
            size = sum(one.lstat().st_size for one in path.rglob("*") if one.is_file())
            found.append((path, size, (time.time() - began) / 86400))
    return sorted(found, key=lambda one: -one[2])


def remove(run: Path) -> None:
    """Remove a run that was set aside, and nothing else."""
    assert _set_aside_at(run) is not None
    shutil.rmtree(run)


def _set_aside_at(run: Path) -> float | None:
    """When a --restart gave a directory its name; None for any other name."""
    match = re.fullmatch(r".+\.before-(\d{8}-\d{6})-\d+", run.name)
    return time.mktime(time.strptime(match[1], "%Y%m%d-%H%M%S")) if match else None


def _accuracy(run: Path) -> dict[str, Any] | None:
    """The newest evaluation's on the run's own data, or on the first of others: of h, or of the first layer."""
    for one in newest(stored(run)):
        for probe, layers in one.values["probes"].items():
            layer = "h" if "h" in layers else next(iter(layers))
            return {"probe": probe, "layer": layer, "top1": layers[layer]["top1"], "step": one.step, "data": one.name}
    return None


def last_line(path: Path) -> dict[str, Any]:
    """The last whole line of a journal, empty where there is none; a run may be writing one."""
    for line in reversed(path.read_text().splitlines() if path.exists() else []):
        try:
            found: dict[str, Any] = json.loads(line)
            return found
        except ValueError:
            continue
    return {}
