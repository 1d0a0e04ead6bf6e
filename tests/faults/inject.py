"""Faults that only the inside of a rank can make: importable functions for `tests.pool`."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from dist_ssl import distributed, engine
from dist_ssl.augment.parameters import BRIGHTNESS, JITTER
from dist_ssl.checkpoint import Checkpointer, RunState
from dist_ssl.config import Config, UserError, with_overrides
from dist_ssl.data.stream import Batch, Batches
from dist_ssl.models import ContrastiveModel
from dist_ssl.storage import Store
from dist_ssl.training import train
from dist_ssl.training.run_directory import open_run
from tests.faults.harness import last_step


class Disturbed(Batches):
    """Batches of which rank 1 has a `disturb(step, batch)` called before each is handed out."""

    def __init__(self, batches: Batches, disturb: Callable[[int, Batch], None]):
        self._batches, self._disturb, self._step = batches, disturb, 0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = next(self._batches)
        self._step += 1
        if distributed.rank() == 1:
            self._disturb(self._step, batch)
        return batch

    def close(self) -> None:
        self._batches.close()


def _pretrain(config: Config, disturb: Callable[[int, Batch], None]) -> int:
    real = train.training_batches
    train.training_batches = lambda *arguments, **keywords: Disturbed(real(*arguments, **keywords), disturb)
    try:
        return train.pretrain(config)
    finally:
        train.training_batches = real


def pretrain_with_poison(config: Config, steps: list[int], send: tuple[int, int] | None = None) -> int:
    """Rank 1's first image has a brightness of NaN in the given steps; `send`: in which step it gets which signal."""

    def poison(step: int, batch: Batch) -> None:
        if step in steps:
            batch.parameters[0, :, JITTER] = 1.0
            batch.parameters[0, :, BRIGHTNESS] = float("nan")

    with at_each_step(lambda step, _: _send(step, send)):
        return _pretrain(config, poison)


def pretrain_with_bad_gradients(config: Config, steps: list[int], send: tuple[int, int] | None = None) -> int:
    """Rank 1's gradient is infinite in the given steps, and its loss is not; `send` as above."""

    def spoil(step: int, z: Tensor) -> None:
        if step in steps and distributed.rank() == 1:
            z.register_hook(lambda gradient: gradient * float("inf"))
        _send(step, send)

    with at_each_step(spoil):
        return train.pretrain(config)


def error_with_bad_gradients(config: Config, steps: list[int]) -> str:
    """What `pretrain_with_bad_gradients` raised on this rank."""
    try:
        pretrain_with_bad_gradients(config, steps)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def _send(step: int, what: tuple[int, int] | None) -> None:
    if what is not None and step == what[0] and distributed.rank() == 1:
        os.kill(os.getpid(), what[1])


@contextlib.contextmanager
def at_each_step(act: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Call `act(step of this start, z)` after each training forward."""
    real = train.build_model

    def build(config: Config) -> ContrastiveModel:
        model, counter = real(config), itertools.count(1)
        model.register_forward_hook(lambda module, inputs, outputs: act(next(counter), outputs[1]))
        return model

    train.build_model = build
    try:
        yield
    finally:
        train.build_model = real


def pretrain_with_poisoned_momentum(config: Config, at_step: int) -> int:
    """Rank 1's optimizer state gets a NaN before a step is applied: loss and gradients are finite, the weights not."""
    built: list[engine.Engine] = []
    real = engine.initialize
    engine.initialize = lambda *arguments: built.append(real(*arguments)) or built[0]

    def poison(step: int, batch: Batch) -> None:
        if step == at_step + 2:  # which is fetched while the step before it is under way
            f = built[0].fragments[0]
            f.of(built[0].optimizer.state[f.flat]["exp_avg"])[0] = float("nan")

    try:
        return _pretrain(config, poison)
    finally:
        engine.initialize = real


def error_of_a_bad_batch(config: Config, at_step: int) -> str:
    """What is raised on this rank where rank 1 can't make a step's batch."""

    def refuse(step: int, batch: Batch) -> None:
        if step == at_step:
            raise UserError(f"batch {step} is bad")

    try:
        _pretrain(config, refuse)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def pretrain_with_signal(config: Config, at_step: int, number: int) -> int:
    """Rank 1 is sent a signal while it fetches a step's batch."""
    return _pretrain(config, lambda step, batch: os.kill(os.getpid(), number) if step == at_step else None)


def pretrain_with_long_saves(config: Config) -> int:
    """What is measured of saves is taken for a billion times as long."""
    real = Checkpointer.seconds_to_save
    Checkpointer.seconds_to_save = lambda self: real(self) * 1e9  # type: ignore[method-assign]
    try:
        return train.pretrain(config)
    finally:
        Checkpointer.seconds_to_save = real  # type: ignore[method-assign]


def pretrain_with_a_signal_in_the_last_commit(config: Config, seconds: float) -> int:
    """SIGTERM comes while the last step is committed, which takes so long."""
    real = Checkpointer._commit

    def slowly(self: Checkpointer, directory: Store, state: RunState, answers: list[dict[str, Any]]) -> None:
        if state.step == config.train.steps:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(seconds)
        real(self, directory, state, answers)

    Checkpointer._commit = slowly  # type: ignore[method-assign]
    try:
        return train.pretrain(config)
    finally:
        Checkpointer._commit = real  # type: ignore[method-assign]


def error_of_a_run_seen_by_one_rank(config: Config, elsewhere: Path) -> str:
    """What opening a run raises on this rank where it is another folder on rank 1."""
    if distributed.rank() == 1:
        config = with_overrides(config, [f"run.dir={json.dumps(str(elsewhere))}"])
    try:
        open_run(config, None, restart=False, extend=False)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def pretrain_with_a_signal_and_a_lost_peer(config: Config, at_step: int) -> int:
    """Rank 1 makes no further step, and rank 0 is sent SIGTERM."""

    def stay_away(step: int, batch: Batch) -> None:
        if step == at_step:
            time.sleep(5)

    if distributed.rank() == 0:
        threading.Thread(target=_signal_at, args=(config, at_step - 4), daemon=True).start()
    return _pretrain(config, stay_away)


def _signal_at(config: Config, step: int) -> None:
    while last_step(Path(config.run.dir)) < step:
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGTERM)
