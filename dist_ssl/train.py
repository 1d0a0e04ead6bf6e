"""The one training loop.

    data -> augment -> encoder f -> h -> head g -> z -> contrast with all ranks' z -> backward -> step -> checkpoint

`pretrain` builds what the run needs, in that order, resumes it where it was, and loops. One small all-reduce a step
carries everything on which ranks must act alike: the loss, a wish to stop, and what went wrong.
"""

from __future__ import annotations

import logging
import math
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_ssl import checkpoint, diagnostics, distributed, engine, objective, optim
from dist_ssl import config as config_module
from dist_ssl.checkpoint import Checkpointer, Fenced, RunState
from dist_ssl.config import Config, UserError
from dist_ssl.data.augment import augment
from dist_ssl.data.index import load_manifest
from dist_ssl.data.plan import Plan
from dist_ssl.data.quarantine import Quarantine
from dist_ssl.data.stream import plan_of, training_batches
from dist_ssl.distributed import World
from dist_ssl.interrupts import EXIT_RUN_ME_AGAIN, StopRequest, Watchdog
from dist_ssl.models import build_model
from dist_ssl.observability import Observer
from dist_ssl.run_directory import open_run

log = logging.getLogger(__name__)


class NotFinite(RuntimeError):
    """Too many losses in a row that were NaN or infinite."""


def pretrain(config: Config, *, restart: bool = False, extend: bool = False) -> int:
    """Run, or go on with, the pretraining that a config describes. Collective over the ranks of the environment.

    Returns the exit code: 0 when the run is complete, 75 when it was told to stop, has committed, and wants to be run
    again. Raises UserError for a config that can't run or does not go with the run directory.
    """
    world = distributed.initialize(config.engine.hang_minutes)
    with distributed.together():
        _prepare(config, world)
        manifest = load_manifest(config.data.shards, config.storage) if world.rank == 0 else None
    manifest = distributed.broadcast_object(manifest)
    total_steps = config_module.total_steps(config, manifest.num_samples)
    incarnation, found = open_run(config, manifest, restart=restart, extend=extend)
    with distributed.together():
        untrained = build_model(config)
    model = engine.initialize(untrained, config, world)
    checkpointer = Checkpointer(config, model.fragments, model.optimizer, incarnation)
    probe = _online_probe(config, manifest, model, world)
    if found is not None:
        state = checkpoint.load(found, model, probe)
        checkpointer.last_step = state.step
    else:
        state = RunState(0, 0, config_module.dumps(config), manifest.hash, versions=versions())
        checkpointer.save(state, _replicated(model, probe))
        checkpointer.wait()  # from here on the run directory can be resumed
    run = Run(config, world, model, checkpointer, probe, total_steps, plan_of(config, manifest), state)
    batches = training_batches(
        config,
        manifest,
        cursor=state.cursor,
        first_step=state.step,
        num_steps=total_steps - state.step,
        rank=world.rank,
        world_size=world.size,
    )
    try:
        with (
            StopRequest(config.engine.grace_seconds, config.checkpoint.wall_time_minutes) as stop,
            Watchdog(config.engine.hang_minutes) as watchdog,
            Observer(config, total_steps, state.step) as observer,
        ):
            return run.loop(batches, stop, watchdog, observer)
    finally:
        batches.close()


class Run:
    """The state of a run between steps, and the loop that moves it."""

    def __init__(
        self,
        config: Config,
        world: World,
        model: engine.Engine,
        checkpointer: Checkpointer,
        probe: diagnostics.OnlineProbe | None,
        total_steps: int,
        plan: Plan,
        state: RunState,
    ):
        self.config, self.world, self.model = config, world, model
        self.checkpointer, self.probe = checkpointer, probe
        self.total_steps, self.num_samples = total_steps, plan.num_samples
        self.step, self.cursor, self.skipped = state.step, state.cursor, state.skipped_steps
        self.state, self.skipped_in_a_row, self.saved_at = state, 0, time.monotonic()
        self.quarantine = Quarantine(config.run.dir, config.data, plan.num_samples)
        self.chunk_rows = plan.rows_per_rank(config.train.global_batch_size, world.size, config.objective.chunks)
        self.rows_per_rank = [sum(rows) for rows in zip(*self.chunk_rows, strict=True)]

    def loop(self, batches: Any, stop: StopRequest, watchdog: Watchdog, observer: Observer) -> int:
        statistics = _Statistics(self.model.model)
        batch, error = self._next(batches, observer)
        distributed.raise_together(error)
        while self.step < self.total_steps:
            statistics.remember()
            torch.manual_seed(hash((self.config.run.seed, self.step, self.world.rank)))  # dropout: no state to save
            result = self.train_step(batch)
            upcoming, error = self._next(batches, observer) if self.step + 1 < self.total_steps else (None, None)
            agreed = self._agree(result.loss, bool(stop), error is not None)
            finite = math.isfinite(agreed.loss)
            if not finite:
                statistics.restore()
            rate = optim.learning_rate(self.config, self.step, self.total_steps, self.num_samples)
            self.model.step(rate, skip=not finite)
            self._complete(batch, finite, observer)
            watchdog.beat(self.step)
            self._report(result, agreed.loss, rate, observer)
            if agreed.stop:
                stop.agreed()
            self._judge(agreed, finite, observer)
            if agreed.stop or agreed.data_failed or self._save_is_due():
                self.save(observer)
            if agreed.data_failed:
                self.checkpointer.wait()
                distributed.raise_together(error)
            if agreed.stop and self.step < self.total_steps:
                self.checkpointer.wait()
                log.info("step %d is committed after %s: run the same command again", self.step, stop.reason())
                return EXIT_RUN_ME_AGAIN
            batch = upcoming
        if self.checkpointer.last_step != self.step:
            self.save(observer)
        self.checkpointer.wait()
        return 0

    def train_step(self, batch: Any) -> StepResult:
        """Forward, contrast and backward of one global batch. Collective."""
        views = augment(batch.crops, batch.parameters, self.config.augment).flatten(0, 1)  # (2n, 3, S, S)
        views = views.contiguous(memory_format=torch.channels_last)
        if self.config.objective.chunks > 1:
            return self._train_step_in_chunks(batch, views)
        h, z = self.model(views)
        loss = self._contrast(z, batch)
        self.model.backward(loss)
        return StepResult(loss.detach(), h.detach(), z.detach(), batch.labels)

    def _train_step_in_chunks(self, batch: Any, views: Tensor) -> StepResult:
        """GradCache (Gao et al. 2021): all z without graph, dL/dz exactly, then chunk by chunk with that gradient.

        Chunk j is a slice of the global batch, the same on any number of ranks, so its batch norm is too.
        """
        sizes = [2 * rows[self.world.rank] for rows in self.chunk_rows]
        chunks = views.split(sizes)
        seed = hash((self.config.run.seed, self.step, self.world.rank))
        parts = []
        with torch.no_grad(), distributed.frozen_running_statistics():
            for number, chunk in enumerate(chunks):
                torch.manual_seed(seed + number)
                parts.append(self.model(chunk))
        h, z = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        leaf = z.detach().requires_grad_()
        loss = self._contrast(leaf, batch)
        (gradient,) = torch.autograd.grad(loss, leaf)
        for number, (chunk, chunk_gradient) in enumerate(zip(chunks, gradient.split(sizes), strict=True)):
            torch.manual_seed(seed + number)  # the same dropout as in the first pass
            _, chunk_z = self.model(chunk)
            self.model.backward((chunk_z * chunk_gradient).sum())
        return StepResult(loss.detach(), h, z, batch.labels)

    def _contrast(self, z: Tensor, batch: Any) -> Tensor:
        z1, z2 = z[0::2], z[1::2]
        shared = {"rows_per_rank": self.rows_per_rank, "sample_ids": batch.sample_ids.to(z.device)}
        labels = batch.labels.to(z.device)
        match self.config.objective.name:
            case "nt_xent":
                return objective.nt_xent(z1, z2, self.config.objective.temperature, **shared)
            case "decoupled":
                return objective.decoupled(z1, z2, self.config.objective.temperature, **shared)
            case "supervised":
                return objective.supervised(z1, z2, labels, self.config.objective.temperature, **shared)

    def _next(self, batches: Any, observer: Observer) -> tuple[Any, Exception | None]:
        """This rank's next batch, on its device; an error is handed on, since the others must hear of it."""
        started = time.monotonic()
        try:
            batch = next(batches)
            self.quarantine.record(len(batch.keys), batch.quarantined)
            return batch.to(self.world.device), None
        except Exception as error:
            return None, error
        finally:
            observer.waited(time.monotonic() - started)

    def _agree(self, loss: Tensor, stop: bool, data_failed: bool) -> Agreement:
        """What all ranks know of this step: one all-reduce of four numbers on the host. Collective.

        Reading the loss waits for the forward only: by now backward is queued behind it, so a GPU does not run dry.
        """
        values = torch.tensor([float(loss), stop, data_failed, self.checkpointer.failed()], dtype=torch.float64)
        if self.world.size > 1:
            dist.all_reduce(values)
        loss_sum, stops, data_failures, save_failures = values.tolist()
        return Agreement(loss_sum / self.world.size, stops > 0, data_failures > 0, save_failures > 0)

    def _complete(self, batch: Any, finite: bool, observer: Observer) -> None:
        self.step += 1
        self.cursor += self.config.train.global_batch_size
        self.skipped += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if self.config.data.ledger:
            line = {"step": self.step, "samples": [list(s) for s in zip(batch.epochs.tolist(), batch.keys, strict=True)]}
            if batch.replaced_by:
                line["replaced_by"] = {batch.keys[row]: key for row, key in batch.replaced_by.items()}
            observer.ledger(line if finite else line | {"skipped": True})
        observer.advance(self.step)

    def _report(self, result: StepResult, loss: float, rate: float, observer: Observer) -> None:
        last = self.step == self.total_steps
        if self.probe is not None:
            self.probe.update({"h": result.h[0::2], "z": result.z[0::2]}, result.labels.to(self.world.device))
        if not last and self.step % self.config.log.every_steps:
            return
        values = {
            "epoch": self.cursor / self.num_samples,
            "samples_seen": self.cursor,
            "loss": loss,
            "learning_rate": rate,
            "skipped_steps": self.skipped,
        }
        if last or self.step % self.config.diagnostics.every_steps < self.config.log.every_steps:
            values |= diagnostics.diagnose(
                result.h,
                result.z[0::2],
                result.z[1::2],
                loss=loss,
                temperature=self.config.objective.temperature,
                num_views=2 * self.config.train.global_batch_size,
                sample=self.config.diagnostics.sample,
            )
            if self.world.rank == 0:
                for alarm in diagnostics.alarms(values | {"step": self.step}):
                    log.warning("step %d: %s", self.step, alarm)
            if self.probe is not None:
                values |= self.probe.metrics()
        observer.log(self.step, values)

    def _judge(self, agreed: Agreement, finite: bool, observer: Observer) -> None:
        """Raise, on all ranks, where the run can't go on."""
        if agreed.save_failed:
            try:
                self.checkpointer.wait()
            except Exception as error:
                if isinstance(error, Fenced):
                    raise
                raise RuntimeError(f"step {self.step}: {error}") from error
        if not finite:
            if self.world.rank == 0:
                log.warning("step %d: the loss is %s: skipped, batch-norm statistics put back", self.step, agreed.loss)
            if self.skipped_in_a_row > self.config.train.max_skipped_steps:
                raise NotFinite(
                    f"step {self.step}, rank {self.world.rank}: loss is {agreed.loss}, as it was in the "
                    f"{self.skipped_in_a_row} steps before (train.max_skipped_steps = "
                    f"{self.config.train.max_skipped_steps}); the last good checkpoint, of step "
                    f"{self.checkpointer.last_step}, is intact: try a lower learning rate or fp32"
                )

    def _save_is_due(self) -> bool:
        if self.step % self.config.checkpoint.every_steps == 0 and self.skipped_in_a_row == 0:
            return True
        minutes = self.config.checkpoint.every_minutes
        if minutes is None:
            return False
        # Rank 0's clock decides, since all must save at the same step.
        return bool(distributed.broadcast_object(time.monotonic() - self.saved_at > minutes * 60))

    def save(self, observer: Observer) -> None:
        """Start a checkpoint of this step. Collective."""
        observer.sync()
        self.saved_at = time.monotonic()
        state = RunState(
            step=self.step,
            cursor=self.cursor,
            config=config_module.dumps(self.config),
            data_hash=self.state.data_hash,
            skipped_steps=self.skipped,
            versions=versions(),
        )
        self.checkpointer.save(state, _replicated(self.model, self.probe))


@dataclass(frozen=True)
class StepResult:
    """This rank's part of a step, detached: h (2n, D) and z (2n, d), rows 2i and 2i + 1 the views of image i."""

    loss: Tensor
    h: Tensor
    z: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Agreement:
    """The mean loss over ranks, which is the global loss, and what any rank wants or met."""

    loss: float
    stop: bool
    data_failed: bool
    save_failed: bool


class _Statistics:
    """Buffers as they were before a step: a loss that is not finite has poisoned batch norm's by then."""

    def __init__(self, model: torch.nn.Module):
        self._buffers = list(model.buffers())
        self._saved = [buffer.clone() for buffer in self._buffers]

    def remember(self) -> None:
        if self._buffers:
            torch._foreach_copy_(self._saved, self._buffers)

    def restore(self) -> None:
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._saved)


def _replicated(model: engine.Engine, probe: torch.nn.Module | None) -> dict[str, Tensor]:
    held = dict(model.model.named_buffers())
    return held | ({f"probe.{name}": t for name, t in probe.state_dict().items()} if probe is not None else {})


def _online_probe(config: Config, manifest: Any, model: engine.Engine, world: World) -> diagnostics.OnlineProbe | None:
    if not config.diagnostics.online_probe or not manifest.classes:
        return None
    widths = {"h": int(model.model.encoder.output_dim), "z": int(model.model.head.output_dim)}  # type: ignore[union-attr,arg-type]
    return diagnostics.OnlineProbe(len(manifest.classes), widths).to(world.device)


def _prepare(config: Config, world: World) -> None:
    if config.train.global_batch_size < world.size * config.objective.chunks:
        raise UserError(
            f"train.global_batch_size: expected at least one image a rank and chunk, {world.size} x "
            f"{config.objective.chunks}; got {config.train.global_batch_size}"
        )
    if world.device.type == "cpu":
        threads = config.engine.threads_per_rank or max(1, (os.cpu_count() or 1) // world.local_size)
        torch.set_num_threads(threads)
    else:
        torch.set_float32_matmul_precision("high" if config.engine.precision == "bf16" else "highest")
        torch.backends.cudnn.benchmark = not config.engine.deterministic
    if config.engine.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def versions() -> dict[str, str]:
    import deepspeed

    from dist_ssl import __version__

    found = {"dist_ssl": __version__, "torch": torch.__version__, "deepspeed": deepspeed.__version__}
    return found | {"python": platform.python_version(), "host": platform.node(), "directory": str(Path.cwd())}
