"""What a run tells while it runs: metrics.jsonl (the source of truth), TensorBoard, W&B, MLflow, the ledger, one line.

JSONL files are opened by replacing them with their lines up to the resumed step: so they read as one run, and an older
incarnation that still lives goes on writing to a file that is no longer there.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from pathlib import Path
from typing import IO, Any

from dist_ssl.config import Config, StorageConfig, UserError, dumps, loads
from dist_ssl.data.progress import Progress
from dist_ssl.distributed import rank, world_size
from dist_ssl.storage import write_bytes

log = logging.getLogger(__name__)
WANDB_ID = "wandb-run-id"


def trim_jsonl(path: Path, last_step: int) -> None:
    """Drop lines past a step, and a last line that a kill cut short. The file is replaced, never written in place."""
    kept = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= last_step:
                    kept.append(line + "\n")
            except (json.JSONDecodeError, KeyError):
                continue
    write_bytes(str(path), "".join(kept).encode(), StorageConfig())


def ledgers_of(run_dir: Path) -> list[str]:
    """Names of the ledgers there, those of ranks that are no more included."""
    return sorted(path.name for path in run_dir.glob("ledger-rank*.jsonl"))


def trim_run(run_dir: Path, last_step: int, ledgers: list[str]) -> None:
    """This rank's share of a run's ledgers, its own among them; on rank 0 its metrics too. Call on every rank."""
    names = [name for name in ledgers if int(name[len("ledger-rank") : -len(".jsonl")]) % world_size() == rank()]
    for name in names + ["metrics.jsonl"] * (rank() == 0):
        trim_jsonl(run_dir / name, last_step)


class Journal:
    """An append-only JSONL file; lines are in the kernel after each write, and on the disk after `sync`."""

    def __init__(self, path: Path):
        self._file: IO[str] = open(path, "a", buffering=1)  # noqa: SIM115  held for the run's length

    def write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line, allow_nan=False) + "\n")

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class Observer:
    """Metrics on rank 0, the ledger on every rank where it is asked for, and the progress line."""

    def __init__(self, config: Config, total_steps: int, step: int):
        run_dir = Path(config.run.dir)
        self._boards = _boards(config) if rank() == 0 else []
        self._ledger = Journal(run_dir / f"ledger-rank{rank()}.jsonl") if config.data.ledger else None
        self._metrics = Journal(run_dir / "metrics.jsonl") if rank() == 0 else None
        self._progress = Progress("pretrain", total_steps, shown=rank() == 0, done=step, stays=True)
        self.total_steps, self._batch = total_steps, config.train.global_batch_size
        self._mark, self._mark_step, self._waited = time.monotonic(), step, 0.0

    def __enter__(self) -> Observer:
        self._progress.__enter__()
        return self

    def __exit__(self, kind: Any, *details: Any) -> None:
        self._progress.__exit__(kind, *details)
        for closable in [*self._boards, self._ledger, self._metrics]:
            if closable is not None:
                closable.close()

    def ledger(self, line: dict[str, Any]) -> None:
        if self._ledger is not None:
            self._ledger.write(line)

    def log(self, step: int, values: dict[str, float], waited_seconds: float, at: float) -> None:
        """One line of metrics; adds images a second and the data wait since the last. Rank 0 writes.

        `waited_seconds` are those in which this rank had no batch, since the start; `at` is when the step was queued,
        by time.monotonic: a line is written a step later, or at once where a checkpoint follows.
        """
        elapsed = max(at - self._mark, 1e-9)
        rate = (step - self._mark_step) * self._batch / elapsed
        values = values | {
            "images_per_second": rate,
            "data_wait_fraction": min(1.0, (waited_seconds - self._waited) / elapsed),
        }
        self._mark, self._mark_step, self._waited = at, step, waited_seconds
        if self._metrics is None:
            return
        # JSON knows no NaN: a loss that is not finite is null.
        finite = {key: value if abs(value) < float("inf") else None for key, value in values.items()}
        self._metrics.write({"step": step, **finite})
        for board in self._boards:
            board.log(step, values)
        self._progress.advance(0, note=f"loss {values['loss']:.4f}, {rate:,.0f} images/s")

    def advance(self) -> None:
        """A step is completed."""
        self._progress.advance()

    def sync(self) -> None:
        """Everything written so far is on the disk: call before a checkpoint that counts on it."""
        for journal in (self._ledger, self._metrics):
            if journal is not None:
                journal.sync()


class _TensorBoard:
    def __init__(self, run_dir: Path):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run_dir / "tensorboard"))

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


def keep_wandb_id(run_dir: Path, saved: str) -> None:
    """A run that logged when the directory's name was the id goes on there; `saved` is the config that it had."""
    file = run_dir / WANDB_ID
    if not file.exists() and loads(saved, "the checkpoint's config").log.wandb_project:
        file.write_text(run_dir.name)


class _WeightsAndBiases:
    """The run's id is kept in RUN_DIR/wandb-run-id, since directories of other runs have the same name."""

    def __init__(self, config: Config):
        import wandb  # `planning.before_start` has looked for it

        file, name = Path(config.run.dir, WANDB_ID), Path(config.run.dir).name
        known = file.read_text() if file.exists() else None
        self._run = wandb.init(project=config.log.wandb_project, name=name, id=known, resume="allow")
        file.write_text(self._run.id)

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    """The run's id is kept in RUN_DIR/mlflow-run-id: a run that goes on goes on there too.

    Metrics leave by a thread of MLflow's, so that no step waits for a server; what a server refuses is told at the end.
    """

    def __init__(self, config: Config):
        from mlflow import MlflowClient  # `planning.before_start` has looked for it
        from mlflow.exceptions import MlflowException

        file = Path(config.run.dir) / "mlflow-run-id"
        self._last: Any = None
        try:
            self._client = MlflowClient()
            if file.exists():
                self._id = file.read_text()
                self._client.update_run(self._id, status="RUNNING")
                return
            named = str(config.log.mlflow_experiment)
            experiment = self._client.get_experiment_by_name(named)
            place = experiment.experiment_id if experiment else self._client.create_experiment(named)
            self._id = self._client.create_run(place, run_name=Path(config.run.dir).name).info.run_id
            self._client.log_text(self._id, dumps(config), "config.toml")
        except MlflowException as error:
            raise UserError(
                f"log.mlflow_experiment = {config.log.mlflow_experiment}: MLflow, at what MLFLOW_TRACKING_URI names, "
                f"said: {error}; set the variable right, or leave the key out"
            ) from error
        file.write_text(self._id)

    def log(self, step: int, values: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [Metric(name, float(value), now, step) for name, value in values.items() if math.isfinite(value)]
        self._last = self._client.log_batch(self._id, metrics, synchronous=False)

    def close(self) -> None:
        from mlflow.exceptions import MlflowException

        try:
            if self._last is not None:
                self._last.wait()
            self._client.set_terminated(self._id)
        except MlflowException as error:
            log.warning("MLflow did not take all metrics, which are in metrics.jsonl: %s", error)


def _boards(config: Config) -> list[Any]:
    boards: list[Any] = [_TensorBoard(Path(config.run.dir))] if config.log.tensorboard else []
    boards += [_WeightsAndBiases(config)] if config.log.wandb_project else []
    return boards + ([_MLflow(config)] if config.log.mlflow_experiment else [])
