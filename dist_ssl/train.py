"""The one training loop.

    data -> augment -> encoder f -> h -> head g -> z -> contrast with all ranks' z -> backward -> step -> checkpoint

`pretrain` builds what the run needs, in that order, resumes it where it was, and loops. One small all-reduce a step
carries everything on which the ranks must act alike: the loss, a wish to stop, and what went wrong.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_ssl import checkpoint, diagnostics, distributed, engine, optim
from dist_ssl import config as config_module
from dist_ssl.checkpoint import RunState
from dist_ssl.checkpoint_writer import Checkpointer
from dist_ssl.config import Config
from dist_ssl.data.index import load_manifest
from dist_ssl.data.quarantine import Quarantine
from dist_ssl.data.stream import Batch, Batches, plan_of, training_batches
from dist_ssl.distributed import World
from dist_ssl.interrupts import EXIT_RUN_ME_AGAIN, StopRequest, Watchdog
from dist_ssl.models import build_model
from dist_ssl.observability import Observer
from dist_ssl.run_directory import open_run, versions
from dist_ssl.step import Statistics, Step, StepResult

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
    incarnation, found = open_run(config, manifest, restart=restart, extend=extend)
    with distributed.together():
        untrained = build_model(config)
    model = engine.initialize(untrained, config, world)
    probe = None
    if config.diagnostics.online_probe and manifest.classes:
        probe = diagnostics.OnlineProbe(len(manifest.classes), model.model.widths).to(world.device)
    checkpointer = Checkpointer(config, model.fragments, model.optimizer, incarnation)
    if found is not None:
        state = checkpoint.load(found, model, probe)
        checkpointer.last_step = state.step
    else:
        state = RunState(0, 0, config_module.dumps(config), manifest.hash, versions=versions())
    run = Run(config, world, model, Step(config, model, rows_per_chunk), checkpointer, probe, total_steps, state)
    run.samples_per_epoch = plan.num_samples
    if found is None:
        run.save()
        checkpointer.wait()  # from here on the run directory can be resumed
    with (
        training_batches(
            config,
            manifest,
            cursor=state.cursor,
            first_step=state.step,
            num_steps=total_steps - state.step,
            rank=world.rank,
            world_size=world.size,
        ) as batches,
        StopRequest(config.engine.grace_seconds, config.checkpoint.wall_time_minutes) as stop,
        Watchdog(config.engine.hang_minutes) as watchdog,
        Observer(config, total_steps, state.step) as observer,
    ):
        return run.loop(batches, stop, watchdog, observer)


class Run:
    """Where a run stands between two steps, and the loop that moves it."""

    def __init__(
        self,
        config: Config,
        world: World,
        model: engine.Engine,
        train_step: Step,
        checkpointer: Checkpointer,
        probe: diagnostics.OnlineProbe | None,
        total_steps: int,
        state: RunState,
    ):
        self.config, self.world, self.model, self.train_step = config, world, model, train_step
        self.checkpointer, self.probe, self.total_steps = checkpointer, probe, total_steps
        self.step, self.cursor, self.skipped = state.step, state.cursor, state.skipped_steps
        self.data_hash, self.samples_per_epoch = state.data_hash, 1
        self.skipped_in_a_row, self.saved_at = 0, time.monotonic()

    def loop(self, batches: Batches, stop: StopRequest, watchdog: Watchdog, observer: Observer) -> int:
        quarantine = Quarantine(self.config.run.dir, self.config.data, self.samples_per_epoch)
        statistics = Statistics(self.model.model)
        batch, error = self._next(batches, quarantine, observer)
        distributed.raise_together(error)
        while self.step < self.total_steps:
            statistics.remember()
            result = self.train_step(batch, self._seed())
            upcoming, error = self._next(batches, quarantine, observer)
            agreed = self._agree(result.loss, bool(stop), error is not None)
            rate = optim.learning_rate(self.config, self.step, self.total_steps, self.samples_per_epoch)
            if not agreed.finite:
                statistics.restore()
            self.model.step(rate, skip=not agreed.finite)
            self._complete(batch, agreed, observer)
            self._report(result, batch, agreed, rate, observer)
            watchdog.beat(self.step)
            if agreed.stop:
                stop.agreed()
            if agreed.stop or agreed.data_failed or self._save_is_due():
                observer.sync()
                self.save()
            if agreed.stop or agreed.data_failed or self.step == self.total_steps:
                self.checkpointer.wait()
            if agreed.data_failed:
                distributed.raise_together(error)
            if agreed.stop and self.step < self.total_steps:
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

    def _agree(self, loss: Tensor, stop: bool, data_failed: bool) -> Agreement:
        """What all ranks know of this step: one all-reduce of four numbers on the host. Collective.

        Reading the loss waits for the forward only: by now backward is queued behind it, so that a GPU stays busy.
        """
        values = torch.tensor([float(loss), stop, data_failed, self.checkpointer.failed()], dtype=torch.float64)
        if self.world.size > 1:
            dist.all_reduce(values)
        loss_sum, stops, data_failures, save_failures = values.tolist()
        if save_failures:
            self.checkpointer.wait()  # raises on all ranks
        return Agreement(loss_sum / self.world.size, stops > 0, data_failures > 0)

    def _complete(self, batch: Batch, agreed: Agreement, observer: Observer) -> None:
        """Count the step; raise, on all ranks alike, where too many in a row were skipped."""
        self.step += 1
        self.cursor += self.config.train.global_batch_size
        if self.config.data.ledger:
            line: dict[str, Any] = {
                "step": self.step,
                "samples": list(zip(batch.epochs.tolist(), batch.keys, strict=True)),
            }
            if batch.replaced_by:
                line["replaced_by"] = {batch.keys[row]: key for row, key in batch.replaced_by.items()}
            observer.ledger(line if agreed.finite else line | {"skipped": True})
        observer.advance(self.step)
        if agreed.finite:
            self.skipped_in_a_row = 0
            return
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.world.rank == 0:
            log.warning("step %d: the loss is %s: skipped, batch-norm statistics put back", self.step, agreed.loss)
        if self.skipped_in_a_row > self.config.train.max_skipped_steps:
            self.checkpointer.wait()
            raise NotFinite(
                f"step {self.step}, rank {self.world.rank}: the loss is {agreed.loss}, in step {self.skipped_in_a_row} "
                f"of a row (train.max_skipped_steps = {self.config.train.max_skipped_steps}); the last good "
                f"checkpoint, of step {self.checkpointer.last_step}, is intact: try a lower learning rate, or fp32"
            )

    def _report(self, result: StepResult, batch: Batch, agreed: Agreement, rate: float, observer: Observer) -> None:
        last = self.step == self.total_steps
        if self.probe is not None and agreed.finite:
            self.probe.update({"h": result.h[0::2], "z": result.z[0::2]}, batch.labels.to(self.world.device))
        if not last and self.step % self.config.log.every_steps:
            return
        values = {
            "epoch": self.cursor / self.samples_per_epoch,
            "samples_seen": self.cursor,
            "loss": agreed.loss,
            "learning_rate": rate,
            "skipped_steps": self.skipped,
        }
        if last or self.step % self.config.diagnostics.every_steps < self.config.log.every_steps:
            values |= diagnostics.diagnose(
                result.h,
                result.z[0::2],
                result.z[1::2],
                loss=agreed.loss,
                temperature=self.config.objective.temperature,
                num_views=2 * self.config.train.global_batch_size,
                sample=self.config.diagnostics.sample,
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


@dataclass(frozen=True)
class Agreement:
    """The mean of the ranks' losses, which is the global loss, and what any rank wants or met."""

    loss: float
    stop: bool
    data_failed: bool

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss)
