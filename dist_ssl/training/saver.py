"""When a run is saved, and what of it: the checkpointer's only caller."""

from __future__ import annotations

import logging
import time
from dataclasses import replace

from torch import Tensor

from dist_ssl.checkpoint import Checkpointer, RunState
from dist_ssl.checkpoint.read import PROBE, TEACHER
from dist_ssl.config import Config
from dist_ssl.distributed import rank
from dist_ssl.engine import Engine
from dist_ssl.models import kept_buffers
from dist_ssl.training.online_probe import OnlineProbe
from dist_ssl.training.run_directory import versions
from dist_ssl.training.teacher import Teacher
from dist_ssl.training.verdict import Asked

log = logging.getLogger(__name__)


class Saver:
    """Saves every so many steps, and after so many minutes by rank 0's clock, whose wish travels in the verdict."""

    def __init__(
        self,
        config: Config,
        checkpointer: Checkpointer,
        model: Engine,
        probe: OnlineProbe | None,
        teacher: Teacher | None = None,
    ):
        self._config, self._checkpointer = config, checkpointer
        self._model, self._probe, self._teacher = model, probe, teacher
        self._saved_step, self._saved_at = checkpointer.last_step, time.monotonic()  # of the last save that was started

    @property
    def last_step(self) -> int:
        """The step of the newest checkpoint that holds; after `wait` the same on all ranks."""
        return self._checkpointer.last_step

    def wish(self) -> bool:
        """Whether the clock asks for a save; no other rank's than the first one's is asked."""
        minutes = self._config.checkpoint.every_minutes
        return rank() == 0 and minutes is not None and time.monotonic() - self._saved_at > minutes * 60

    def is_due(self, step: int, heard: Asked) -> bool:
        every = self._config.checkpoint.every_steps
        return heard.save_due or step // every > self._saved_step // every

    def failed(self) -> bool:
        """Whether the last save has failed by now on this rank."""
        return self._checkpointer.failed()

    def seconds_to_save(self) -> float:
        """How long a save from now on would take, by those that there were."""
        return self._checkpointer.seconds_to_save()

    def save(self, state: RunState) -> None:
        """Start a checkpoint; versions are added. Collective."""
        started = time.monotonic()
        replicated = kept_buffers(self._model.model)
        if self._probe is not None:
            for name, tensor in self._probe.whole_state():
                if rank() == 0:  # at once to the host: a device may have no room for all of them
                    replicated[f"{PROBE}{name}"] = tensor.cpu()
        spread: dict[str, Tensor] = {}
        if self._teacher is not None:
            spread = dict(self._teacher.model.named_parameters())
            replicated |= {f"{TEACHER}.{name}": buffer for name, buffer in kept_buffers(self._teacher.model).items()}
        self._checkpointer.save(replace(state, versions=versions()), replicated, spread)
        self._saved_step, self._saved_at = state.step, time.monotonic()
        if rank() == 0:  # `dist-ssl plan --stall-seconds` asks for it
            log.info("checkpoint of step %d: training waited %.2f s", state.step, self._saved_at - started)

    def wait(self) -> None:
        """Until nothing is being written. Raises, on all ranks, what made the last save fail."""
        self._checkpointer.wait()
