"""What a report is made from: a run's directory, read without the training data and without torch."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_ssl import config as configuration
from dist_ssl.config import Config, UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """One run: curves {metric: (steps, values)}, results {(step, name): results.json} (name "": on its own data)."""

    name: str
    folder: Path
    config: Config
    curves: dict[str, tuple[list[float], list[float]]]
    results: dict[tuple[int, str], dict[str, Any]]

    def latest(self) -> dict[str, Any] | None:
        """The newest checkpoint's results on the run's own data."""
        own = [step for step, name in self.results if name == ""]
        return self.results[max(own), ""] if own else None

    def pictures(self) -> Path | None:
        """The newest evaluation's pictures."""
        own = sorted((step for step, name in self.results if name == ""), reverse=True)
        files = (self.folder / "evaluation" / f"step-{step}" / "pictures.npz" for step in own)
        return next((file for file in files if file.exists()), None)


def read_run(folder: Path) -> Run:
    """Reads a run's directory; UserError where it is none. What is damaged is left out with a warning."""
    if not (folder / "config.toml").exists():
        raise UserError(f"{folder}: expected a run's directory (with config.toml); name the folder that run.dir was")
    return Run(
        folder.resolve().name,
        folder,
        configuration.load(folder / "config.toml"),
        _curves(folder / "metrics.jsonl"),
        _results(folder / "evaluation"),
    )


def _curves(path: Path) -> dict[str, tuple[list[float], list[float]]]:
    curves: dict[str, tuple[list[float], list[float]]] = {}
    lines = path.read_text().splitlines() if path.exists() else []
    for position, line in enumerate(lines):
        try:
            record = json.loads(line)
            step = float(record["step"])
        except (ValueError, KeyError, TypeError):
            if position < len(lines) - 1:  # a last line may be half written by a run that is still going
                log.warning("%s: line %d is not a metrics record; left out", path, position + 1)
            continue
        for name, value in record.items():
            if name != "step" and isinstance(value, (int, float)) and math.isfinite(value):
                steps, values = curves.setdefault(name, ([], []))
                steps.append(step)
                values.append(float(value))
    return curves


def _results(folder: Path) -> dict[tuple[int, str], dict[str, Any]]:
    found = {}
    for path in [*folder.glob("step-*/results.json"), *folder.glob("step-*/*/results.json")]:
        name = "" if path.parent.parent == folder else path.parent.name
        step_folder = path.parent if name == "" else path.parent.parent
        try:
            found[int(step_folder.name.removeprefix("step-")), name] = json.loads(path.read_text())
        except ValueError as error:
            log.warning("%s: not readable, left out: %s", path, error)
    return dict(sorted(found.items()))
