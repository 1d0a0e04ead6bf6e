"""The one training loop.

    data -> augment -> encoder f -> h -> head g -> z -> loss over all ranks' z -> backward -> step -> checkpoint

`pretrain` builds what the run needs, in that order, resumes it where it was, and loops. One small all-reduce a step
carries everything on which the ranks must act alike. It decides on the device whether a step is applied; what else it
says the host hears one step later, so that a device never waits for the host, nor the host for other ranks.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

from dist_ssl import checkpoint, distributed, engine
from dist_ssl import config as config_module
from dist_ssl.checkpoint import Checkpointer, RunState
from dist_ssl.config import WITH_TEACHER, Config
from dist_ssl.config.environment import EXIT_RUN_ME_AGAIN
from dist_ssl.data.manifest import load_manifest
from dist_ssl.data.plan import check_batch_size
from dist_ssl.data.quarantine import Quarantine
from dist_ssl.data.stream import plan_of, training_batches
from dist_ssl.engine import Engine
from dist_ssl.engine.optimizers import learning_rate
from dist_ssl.models import build_model
from dist_ssl.models.encoders import check_image_size
from dist_ssl.models.weights import start_from
from dist_ssl.training.announce import Announcement, next_command
from dist_ssl.training.feed import Feed
from dist_ssl.training.interrupts import StopRequest, Watchdog
from dist_ssl.training.monitor import Monitor, Taken
from dist_ssl.training.observability import Observer
from dist_ssl.training.online_probe import OnlineProbe
from dist_ssl.training.run_directory import open_run
from dist_ssl.training.saver import Saver
from dist_ssl.training.step import Step
from dist_ssl.training.teacher import Teacher
from dist_ssl.training.verdict import Asked, agree

log = logging.getLogger(__name__)


def pretrain(config: Config, *, restart: bool = False, extend: bool = False) -> int:
    """Run, or go on with, the pretraining that a config describes. Collective over the ranks of the environment.

    Returns the exit code: 0 when the run is complete, 75 when it was told to stop, has committed, and wants to be run
    again. Raises UserError for a config that can't run or does not go with the run directory.
    """
    started = time.monotonic()
    # Longer than the watchdog's patience, so that it, and not a time-out of some collective, says who hangs.
    world = distributed.initialize(2 * config.engine.hang_minutes)
    engine.prepare(config, world)
    with distributed.together():
        manifest = load_manifest(config.data.shards, config.storage) if world.rank == 0 else None
    manifest = distributed.broadcast_object(manifest)
    plan = plan_of(config, manifest)
    check_batch_size(config.train.global_batch_size, plan.num_samples, world.rank)
    total_steps = config_module.total_steps(config, plan.num_samples)
    rows_per_chunk = plan.rows_per_rank(config.train.global_batch_size, world.size, config.objective.chunks)
    with distributed.together():
        untrained = build_model(config)
        check_image_size(untrained.encoder, config.evaluated_size, "evaluation.image_size")
        store = checkpoint.checkpoint_store(config)
        if config.model.init and (restart or not checkpoint.committed_steps(store)):
            start_from(untrained.encoder, config.model.init, config.storage)
    reading_since = time.monotonic()
    incarnation, found = open_run(config, manifest, restart=restart, extend=extend)
    state = found.state() if found is not None else RunState(0, 0, config_module.dumps(config), manifest.hash)
    if state.step >= total_steps:
        if world.rank == 0:
            said = "already complete at step %d of %d; --extend makes it longer; next: %s"
            log.info(said, state.step, total_steps, next_command(config))
        return 0
    announcement = Announcement(config, world, manifest, untrained, state.step)  # ZeRO 3 takes the weights apart
    model = engine.initialize(untrained, config, world)
    teacher = Teacher(config, world.device) if config.objective.name in WITH_TEACHER else None
    probe = None
    if config.diagnostics.online_probe and manifest.classes:
        rows = [sum(rows) for rows in zip(*rows_per_chunk, strict=True)]
        probe = OnlineProbe(len(manifest.classes), model.model.widths, rows).to(world.device)
    if found is not None:
        checkpoint.load(found, model, probe, teacher.model if teacher is not None else None)
    elif teacher is not None:
        teacher.start_as(model.model)
    checkpointer = Checkpointer(
        store,
        config.run.dir,
        config.checkpoint,
        model,
        incarnation,
        last_step=state.step if found is not None else -1,
        num_commits=found.num_commits if found is not None else 0,
        first_guess_seconds=time.monotonic() - reading_since,
    )
    saver = Saver(config, checkpointer, model, probe, teacher)
    run = Run(
        config=config,
        model=model,
        train_step=Step(config, model, rows_per_chunk, teacher),
        start=state,
        total_steps=total_steps,
        num_samples=plan.num_samples,
    )
    if found is None:
        saver.save(state)
        saver.wait()  # from here on the run directory can be resumed
    place = {"cursor": state.cursor, "first_step": state.step, "num_steps": total_steps - state.step}
    with (
        training_batches(config, manifest, **place, rank=world.rank, world_size=world.size) as batches,
        StopRequest(config.engine.grace_seconds, config.checkpoint.wall_time_minutes, started) as stop,
        Watchdog(config.engine.hang_minutes) as watchdog,
        Observer(config, total_steps, state.step) as observer,
    ):
        feed = Feed(batches, Quarantine(config.run.dir, config.data, plan.num_samples), world.device)
        monitor = Monitor(config, observer, probe, plan.num_samples, state.skipped_steps, run.train_step.pace)
        code = run.loop(feed, monitor, saver, stop, watchdog)
    if code == 0:
        announcement.over()
    return code


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run is made of, where it begins, and the loop that moves it."""

    config: Config
    model: Engine
    train_step: Step
    start: RunState
    total_steps: int
    num_samples: int

    def loop(self, feed: Feed, monitor: Monitor, saver: Saver, stop: StopRequest, watchdog: Watchdog) -> int:
        step, batch = self.start.step, feed.next()
        distributed.raise_together(feed.error)  # of the first two batches: nobody has heard of it yet
        while step < self.total_steps:
            assert batch is not None  # all ranks have heard of an error a step before
            result = self.train_step(batch, step)
            upcoming = feed.next()
            stops = stop.is_due(saver.seconds_to_save())
            asked = Asked(stops, feed.error is not None, saver.failed(), saver.wish())
            rate = learning_rate(self.config, step, self.total_steps, self.num_samples)
            verdict = self.model.step(rate, agree(result.loss, asked))
            self.train_step.settle(verdict.finite, step / self.total_steps)
            step += 1
            taken = Taken(
                step=step,
                batch=batch,
                result=result,
                learning_rate=rate,
                waited_seconds=feed.waited_seconds,
                at=time.monotonic(),
                verdict=verdict,
            )
            heard = monitor.record(taken)
            watchdog.beat(step)
            over = step == self.total_steps
            if over or heard.end or saver.is_due(step, heard):
                heard = heard.either(monitor.settle())
                if heard.end or over:
                    stop.agreed()
                if not monitor.in_a_streak:  # else what was taken before the streak stays the newest
                    monitor.sync()
                    with watchdog.paused():
                        saver.save(self._state(step, monitor.skipped_steps))
            lost = monitor.is_lost(over)
            if over or heard.end or heard.save_failed or lost:
                with watchdog.paused():
                    saver.wait()  # raises on all ranks where a save has failed
            if lost:
                raise monitor.not_finite(saver.last_step)
            if heard.data_failed:
                distributed.raise_together(feed.error)
            if heard.stop and not over:
                return self._stopped(saver.last_step, stop)
            batch = upcoming
        return 0

    def _stopped(self, committed: int, stop: StopRequest) -> int:
        if distributed.rank() == 0:
            log.info("step %d is committed after %s: run the same command again", committed, stop.reason())
        return EXIT_RUN_ME_AGAIN

    def _state(self, step: int, skipped_steps: int) -> RunState:
        cursor = self.start.cursor + (step - self.start.step) * self.config.train.global_batch_size
        return RunState(step, cursor, config_module.dumps(self.config), self.start.data_hash, {}, skipped_steps)
