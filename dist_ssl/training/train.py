"""The one training loop.

    data -> augment -> encoder f -> h -> head g -> z -> contrast with all ranks' z -> backward -> step -> checkpoint

`pretrain` builds what the run needs, in that order, resumes it where it was, and loops. One small all-reduce a step
carries everything on which the ranks must act alike: the loss, a wish to stop, and what went wrong.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass, field
from typing import Any

from dist_ssl import checkpoint, distributed, engine
from dist_ssl import config as config_module
from dist_ssl.checkpoint import RunState
from dist_ssl.checkpoint.write import Checkpointer
from dist_ssl.config import Config
from dist_ssl.data.index import load_manifest
from dist_ssl.data.quarantine import Quarantine
from dist_ssl.data.stream import Batch, Batches, plan_of, training_batches
from dist_ssl.distributed import World
from dist_ssl.engine import optimizers
from dist_ssl.models import build_model
from dist_ssl.training import diagnostics
from dist_ssl.training.interrupts import EXIT_RUN_ME_AGAIN, StopRequest, Watchdog
from dist_ssl.training.observability import Observer
from dist_ssl.training.run_directory import open_run, versions
from dist_ssl.training.step import Statistics, Step, StepResult

log = logging.getLogger(__name__)


class NotFinite(RuntimeError):
    """Too many losses in a row that were NaN or infinite."""


def pretrain(config: Config, *, restart: bool = False, extend: bool = False) -> int:
    """Run, or go on with, the pretraining that a config describes. Collective over the ranks of the environment.

    Returns the exit code: 0 when the run is complete, 75 when it was told to stop, has committed, and wants to be run
    again. Raises UserError for a config that can't run or does not go with the run directory.
    """
    # Longer than the watchdog's patience, so that it, and not a time-out of some collective, says who hangs.
    world = distributed.initialize(2 * config.engine.hang_minutes)
    with distributed.together():
        engine.prepare(config, world)
        manifest = load_manifest(config.data.shards, config.storage) if world.rank == 0 else None
    manifest = distributed.broadcast_object(manifest)
    plan = plan_of(config, manifest)
    total_steps = config_module.total_steps(config, plan.num_samples)
    rows_per_chunk = plan.rows_per_rank(config.train.global_batch_size, world.size, config.objective.chunks)
    with distributed.together():
        untrained = build_model(config)
    incarnation, found = open_run(config, manifest, restart=restart, extend=extend)
    model = engine.initialize(untrained, config, world)
    probe = None
    if config.diagnostics.online_probe and manifest.classes:
        probe = diagnostics.OnlineProbe(len(manifest.classes), model.model.widths).to(world.device)
    state = RunState(0, 0, "", manifest.hash) if found is None else checkpoint.load(found, model, probe)
    last_step = -1 if found is None else found.step
    store = checkpoint.checkpoint_store(config)
    checkpointer = Checkpointer(store, config.run.dir, config.checkpoint, model, incarnation, last_step=last_step)
    run = Run(
        config,
        world,
        model,
        Step(config, model, rows_per_chunk),
        checkpointer,
        probe,
        manifest.hash,
        plan.num_samples,
        total_steps,
        state.step,
        state.cursor,
        state.skipped_steps,
    )
    if run.step >= total_steps:
        log.info("already complete at step %d of %d; --extend makes it longer", run.step, total_steps)
        return 0
    if found is None:
        run.save()
        checkpointer.wait()  # from here on the run directory can be resumed
    place = {"cursor": state.cursor, "first_step": state.step, "num_steps": total_steps - state.step}
    with (
        training_batches(config, manifest, **place, rank=world.rank, world_size=world.size) as batches,
        StopRequest(config.engine.grace_seconds, config.checkpoint.wall_time_minutes) as stop,
        Watchdog(config.engine.hang_minutes) as watchdog,
        Observer(config, total_steps, state.step) as observer,
    ):
        return run.loop(batches, stop, watchdog, observer)


@dataclass
class Run:
    """Where a run stands between two steps, and the loop that moves it."""

    config: Config
    world: World
    model: engine.Engine
    train_step: Step
    checkpointer: Checkpointer
    probe: diagnostics.OnlineProbe | None
    data_hash: str
    samples_per_epoch: int
    total_steps: int
    step: int  # completed steps
    cursor: int  # samples that they consumed
    skipped: int  # steps among them whose loss was not finite
    skipped_in_a_row: int = 0
    saved_at: float = field(default_factory=time.monotonic)

    def loop(self, batches: Batches, stop: StopRequest, watchdog: Watchdog, observer: Observer) -> int:
        quarantine = Quarantine(self.config.run.dir, self.config.data, self.samples_per_epoch)
        statistics = Statistics(self.model.model)
        batch, error = self._next(batches, quarantine, observer)
        distributed.raise_together(error)
        while self.step < self.total_steps:
            statistics.remember()
            result = self.train_step(batch, self._seed())
            upcoming, error = self._next(batches, quarantine, observer)
            loss, (stopping, data_failed, save_failed) = distributed.agree(
                result.loss, [bool(stop), error is not None, self.checkpointer.failed()]
            )
            if save_failed:
                self.checkpointer.wait()  # raises on all ranks
            rate = optimizers.learning_rate(self.config, self.step, self.total_steps, self.samples_per_epoch)
            if not math.isfinite(loss):
                statistics.restore()
            measured = self._is_due(self.step + 1, self.config.diagnostics.every_steps)
            self.model.step(rate, skip=not math.isfinite(loss), measure=measured)
            self._complete(batch, loss, observer)
            self._report(result, batch, loss, rate, observer)
            watchdog.beat(self.step)
            if stopping:
                stop.agreed()
            if stopping or data_failed or self._save_is_due():
                observer.sync()
                self.save()
            if stopping or data_failed or self.step == self.total_steps:
                self.checkpointer.wait()
            if data_failed:
                distributed.raise_together(error)
            if stopping and self.step < self.total_steps:
                log.info("step %d is committed after %s: run the same command again", self.step, stop.reason())
                return EXIT_RUN_ME_AGAIN
            batch = upcoming
        return 0

    def save(self) -> None:
        """Start a checkpoint of this step. Collective."""
        replicated = dict(self.model.model.named_buffers())
        if self.probe is not None:
            replicated |= {f"probe.{name}": tensor for name, tensor in self.probe.state_dict().items()}
        config = config_module.dumps(self.config)
        state = RunState(self.step, self.cursor, config, self.data_hash, {}, self.skipped, versions())
        self.checkpointer.save(state, replicated)
        self.saved_at = time.monotonic()

    def _seed(self) -> int:
        """Of this step on this rank: dropout then needs no generator in the checkpoint."""
        return (self.config.run.seed * 1_000_003 + self.step) * 65_537 + self.world.rank & 0x7FFF_FFFF_FFFF

    def _next(self, batches: Batches, quarantine: Quarantine, observer: Observer) -> tuple[Any, Exception | None]:
        """This rank's next batch, on its device; an error is handed on, since the others must hear of it first."""
        started = time.monotonic()
        try:
            batch = next(batches, None)
            if batch is None:
                return None, None  # the run's last step is under way
            quarantine.record(len(batch.keys), batch.quarantined)
            return batch.to(self.world.device), None
        except Exception as error:
            return None, error
        finally:
            observer.waited(time.monotonic() - started)

    def _complete(self, batch: Batch, loss: float, observer: Observer) -> None:
        """Count the step; raise, on all ranks alike, where too many in a row were skipped."""
        finite = math.isfinite(loss)
        self.step += 1
        self.cursor += self.config.train.global_batch_size
        if self.config.data.ledger:
            line: dict[str, Any] = {
                "step": self.step,
                "samples": list(zip(batch.epochs.tolist(), batch.keys, strict=True)),
            }
            if batch.replaced_by:
                line["replaced_by"] = {batch.keys[row]: key for row, key in batch.replaced_by.items()}
            observer.ledger(line if finite else line | {"skipped": True})
        observer.advance(self.step)
        if finite:
            self.skipped_in_a_row = 0
            return
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.world.rank == 0:
            log.warning("step %d: the loss is %s: skipped, batch-norm statistics put back", self.step, loss)
        if self.skipped_in_a_row > self.config.train.max_skipped_steps:
            self.checkpointer.wait()
            raise NotFinite(
                f"step {self.step}, rank {self.world.rank}: the loss is {loss}, in step {self.skipped_in_a_row} "
                f"of a row (train.max_skipped_steps = {self.config.train.max_skipped_steps}); the last good "
                f"checkpoint, of step {self.checkpointer.last_step}, is intact: try a lower learning rate, or fp32"
            )

    def _is_due(self, step: int, every: int = 1) -> bool:
        """Whether a step is logged; with `every`, whether it is the first that is logged of so many steps."""
        logged = self.config.log.every_steps
        return step == self.total_steps or (step % logged == 0 and step % every < logged)

    def _report(self, result: StepResult, batch: Batch, loss: float, rate: float, observer: Observer) -> None:
        if self.probe is not None and math.isfinite(loss):
            self.probe.update({"h": result.h[0::2], "z": result.z[0::2]}, batch.labels.to(self.world.device))
        if not self._is_due(self.step):
            return
        values = {
            "epoch": self.cursor / self.samples_per_epoch,
            "samples_seen": self.cursor,
            "loss": loss,
            "learning_rate": rate,
            "skipped_steps": self.skipped,
        }
        if self._is_due(self.step, self.config.diagnostics.every_steps):
            values |= diagnostics.diagnose(
                result.h,
                result.z[0::2],
                result.z[1::2],
                loss=loss,
                temperature=self.config.objective.temperature,
                num_views=2 * self.config.train.global_batch_size,
                sample=self.config.diagnostics.sample,
                gradient_norm=self.model.gradient_norm,
            )
            if self.world.rank == 0:
                for alarm in diagnostics.alarms(values | {"step": self.step}):
                    log.warning("step %d: %s", self.step, alarm)
            values |= self.probe.metrics() if self.probe is not None else {}
        observer.log(self.step, values)

    def _save_is_due(self) -> bool:
        if self.skipped_in_a_row:
            return False
        if self.step == self.total_steps or self.step % self.config.checkpoint.every_steps == 0:
            return True
        minutes = self.config.checkpoint.every_minutes
        # Rank 0's clock decides, since all must save at the same step.
        return minutes is not None and bool(
            distributed.broadcast_object(time.monotonic() - self.saved_at > minutes * 60)
        )
