"""What is told of each step once its verdict is read: ledger, metrics, skipped steps, alarms, online probes."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import torch

from dist_ssl.config import Config, UserError
from dist_ssl.data.stream import Batch
from dist_ssl.distributed import Verdict, rank
from dist_ssl.training import diagnostics, method, verdict
from dist_ssl.training.observability import Observer
from dist_ssl.training.online_probe import OnlineProbe
from dist_ssl.training.pace import Pace
from dist_ssl.training.step import StepResult
from dist_ssl.training.verdict import Asked, Outcome

log = logging.getLogger(__name__)


class NotFinite(UserError):
    """Too many steps in a row whose loss or gradient was NaN or infinite: another start would end in the same one."""


@dataclass(frozen=True, kw_only=True)
class Taken:
    """A step that is queued on the device, its verdict not read."""

    step: int  # with this one, so many are completed
    batch: Batch
    result: StepResult
    learning_rate: float
    waited_seconds: float  # for batches, since the start
    at: float  # by time.monotonic, when it was queued
    verdict: Verdict


class Monitor:
    """Hears of each step when the next one is queued, so that a GPU never waits for the host.

    A logged step reads its metrics from the device; any other one only its verdict, which has long been there.
    """

    def __init__(
        self,
        config: Config,
        observer: Observer,
        probe: OnlineProbe | None,
        num_samples: int,
        skipped_steps: int,
        pace: Pace,
    ):
        self._config, self._observer, self._probe, self._num_samples = config, observer, probe, num_samples
        self._pace = pace
        self._waiting: Taken | None = None
        self._last_skip, self._exceeded = "", False
        self.skipped_steps, self._in_a_row = skipped_steps, 0

    def record(self, taken: Taken) -> Asked:
        """Take a step in; returns what was asked of all ranks in the one before.

        Collective where there is an online probe.
        """
        heard = self.settle()
        if self._probe is not None:
            self._learn(taken)
        self._waiting = taken
        return heard

    def settle(self) -> Asked:
        """Read the verdict of the last step that was taken in, and tell of it. Collective where it is a logged one."""
        taken, self._waiting = self._waiting, None
        if taken is None:
            return Asked()
        outcome = verdict.read(taken.verdict)
        self._count(taken, outcome)
        if self._is_due(taken.step):
            self._log(taken, outcome)
        return outcome.asked

    def sync(self) -> None:
        """All that was told is on the disk: call before a checkpoint that counts on it."""
        self._observer.sync()

    def _learn(self, taken: Taken) -> None:
        assert self._probe is not None
        finite, result = taken.verdict.finite, taken.result
        # A step that is thrown away teaches the probe nothing: its rows become zeros without a label.
        features = {"h": result.h[:, 0], "z": result.z[:, 0]}
        features = {name: torch.where(finite, values, 0.0) for name, values in features.items()}
        self._probe.update(features, torch.where(finite, taken.batch.labels, -1))

    def _count(self, taken: Taken, outcome: Outcome) -> None:
        batch, step = taken.batch, taken.step
        if self._config.data.ledger:
            line: dict[str, Any] = {"step": step, "samples": list(zip(batch.epochs.tolist(), batch.keys, strict=True))}
            if batch.replaced_by:
                line["replaced_by"] = {batch.keys[row]: key for row, key in batch.replaced_by.items()}
            self._observer.ledger(line if outcome.finite else line | {"skipped": True})
        self._observer.advance()
        if outcome.finite:
            self._in_a_row = 0
            return
        self.skipped_steps += 1
        self._in_a_row += 1
        # Kept, since a save may have settled a good step after it before anybody asks.
        self._exceeded |= self._in_a_row > self._config.train.max_skipped_steps
        self._last_skip = f"step {step}, rank {rank()}: {_what_was_wrong(outcome)}, in step {self._in_a_row} of a row"
        if rank() == 0:
            log.warning("%s: skipped, batch-norm statistics put back", self._last_skip)

    @property
    def in_a_streak(self) -> bool:
        """Whether the last step that was settled was skipped, or too many before it. The same on all ranks."""
        return self._in_a_row > 0 or self._exceeded

    def is_lost(self, over: bool) -> bool:
        """Whether too many steps in a row were skipped, or the last ones of the run. The same on all ranks."""
        return self._exceeded or (over and self._in_a_row > 0)

    def not_finite(self, saved_step: int) -> NotFinite:
        """The error of a run that is lost."""
        return NotFinite(
            f"{self._last_skip} "
            f"(train.max_skipped_steps = {self._config.train.max_skipped_steps}); the last good "
            f"checkpoint, of step {saved_step}, is intact; try a lower optimizer.base_learning_rate, which a run that "
            "goes on can't take: start anew by --restart"
        )

    def _is_due(self, step: int, every: int = 1) -> bool:
        """Whether a step is logged; with `every`, whether it is the first that is logged of so many steps."""
        logged = self._config.log.every_steps
        return step == self._observer.total_steps or (step % logged == 0 and step % every < logged)

    def _log(self, taken: Taken, outcome: Outcome) -> None:
        config, result, step = self._config, taken.result, taken.step
        seen = step * config.train.global_batch_size
        values = {
            "epoch": seen / self._num_samples,
            "samples_seen": seen,
            "loss": outcome.loss,
            "learning_rate": taken.learning_rate,
            "skipped_steps": self.skipped_steps,
        }
        if outcome.finite and self._is_due(step, config.diagnostics.every_steps):
            num_views = result.z.shape[1] * config.train.global_batch_size
            values |= diagnostics.diagnose(
                result.h,
                result.z,
                loss=outcome.loss,
                temperature=getattr(config.objective, "temperature", None),
                num_views=num_views if config.objective.name in method.WITH_CHANCE else None,
                sample=config.diagnostics.sample,
                gradient_norm=outcome.gradient_norm,
                more=method.measure(config, result.loss, result.z, result.p, result.target),
            )
            if rank() == 0:
                at_step = values | {"step": step}
                for alarm in diagnostics.alarms(at_step) + method.alarms(at_step):
                    log.warning("step %d: %s", step, alarm)
            values |= self._probe.metrics() if self._probe is not None else {}
        values |= self._pace.compare(step, taken.waited_seconds, taken.at)
        self._observer.log(step, values, taken.waited_seconds, taken.at)


def _what_was_wrong(outcome: Outcome) -> str:
    if not math.isfinite(outcome.loss):
        return f"the loss is {outcome.loss}"
    return f"the gradient's norm is {outcome.gradient_norm}"
