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
from dist_ssl.evaluation.results import Stored, stored, stored_in
from dist_ssl.report.status import status

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """One run, or one file of weights: its curves {metric: (steps, values)} and its results in the order of steps."""

    name: str
    folder: Path
    config: Config
    curves: dict[str, tuple[list[float], list[float]]]
    results: list[Stored]
    ranks: int | None  # of the pretraining; None where that is not known
    progress: dict[str, Any]  # as `status` tells it; empty for a file of weights

    def data(self) -> list[tuple[str, ...]]:
        """The data sets that it was evaluated on: its own first, then by their names."""
        return list(dict.fromkeys(one.data for one in sorted(self.results, key=lambda one: one.name)))

    def on(self, data: tuple[str, ...]) -> list[Stored]:
        """Its results on one data set, in the order of steps; of one step those without a name last."""
        found = [one for one in self.results if one.data == data]
        return sorted(found, key=lambda one: (one.step or 0, one.name == ""))

    def latest(self) -> Stored | None:
        """The newest checkpoint's results on its own data, or on the first of others."""
        return self.on(self.data()[0])[-1] if self.results else None

    def pictures(self) -> Stored | None:
        """The newest results that have pictures, those on its own data first."""
        shown = (one for data in self.data() for one in reversed(self.on(data)))
        return next((one for one in shown if (one.folder / "pictures.npz").exists()), None)


def read_run(folder: Path) -> Run:
    """Reads a run's directory, or the folder of the results of a file of weights; UserError where it is neither.

    What is damaged is left out with a warning.
    """
    name = folder.resolve().name
    if (folder / "config.toml").exists():
        config = configuration.load(folder / "config.toml")
        return Run(
            name, folder, config, _curves(folder / "metrics.jsonl"), stored(folder), _ranks(folder), status(folder)
        )
    if results := stored_in(folder):
        return Run(name, folder, configuration.loads(results[0].values["config"]), {}, results, None, {})
    raise UserError(
        f"{folder}: expected a run's directory (with config.toml), or the folder that the evaluation of a file of "
        "weights wrote; name the folder that run.dir was"
    )


def _ranks(folder: Path) -> int | None:
    """How many ranks wrote the newest checkpoint: a file each."""
    newest = max(folder.glob("checkpoints/step-*/manifest.json"), default=None)
    files = {path.name for path in newest.parent.rglob("rank-*.safetensors")} if newest else set()
    return len(files) or None


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
