"""Saving: training waits for a copy to host memory; a thread writes; rank 0 commits when all ranks' files are there.

Every start of a run takes a new incarnation number; one that is no longer the newest commits nothing.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from isal import isal_zlib
from torch import Tensor

from dist_ssl.checkpoint.export import write_export
from dist_ssl.checkpoint.file import HostBuffer
from dist_ssl.checkpoint.read import PROBE, TEACHER, RunState, open_checkpoint
from dist_ssl.checkpoint.table import FORMAT, Piece, entries, key_of
from dist_ssl.config import CheckpointConfig, UserError
from dist_ssl.distributed import patience, rank, world_size
from dist_ssl.storage import Store
from dist_ssl.storage.layout import (
    MANIFEST,
    export_path,
    newest_incarnation,
    rank_name,
    state_name,
    step_name,
    steps_in,
)

log = logging.getLogger(__name__)
REQUESTS = 4  # that a rank may wait for another's: its file, the state, the manifest, a removal


class NotFiniteCheckpoint(UserError):
    """The state that was to be saved holds a NaN or an infinity: it was not committed. The same on all ranks."""


class Fenced(RuntimeError):
    """A newer incarnation of this run has started: this one must not write any more. Not to be started again."""


class Checkpointer:
    """Saves an engine's state: training waits for one copy to host memory, a thread does the rest.

    At most one save is under way. The thread talks to the other ranks by a process group of its own. `last_step` and
    `num_commits` are those of the checkpoint that the run goes on from, `first_guess_seconds` what a save may take
    before any was made.
    """

    def __init__(
        self,
        store: Store,
        run_dir: str | Path,
        config: CheckpointConfig,
        engine: Any,
        incarnation: int,
        *,
        last_step: int = -1,
        num_commits: int = 0,
        first_guess_seconds: float = 0.0,
    ):
        self._store, self._run_dir, self._config, self._incarnation = store, run_dir, config, incarnation
        self._fragments, self._optimizer = engine.fragments, engine.optimizer
        self._buffer = HostBuffer()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._resumed, self._committed = last_step, set[int]()
        self._num_commits = num_commits  # of the run, over all its starts, that of step 0 left out
        self._told = False  # that nothing can be removed
        self._began, self._seconds, self._first_guess = 0.0, deque[float](maxlen=16), first_guess_seconds
        self.last_step = last_step  # the newest that is known to hold: resumed from, or committed since; -1 for none
        longer = patience() + timedelta(seconds=REQUESTS * store.config.retry_seconds)
        self._group: Any = dist.new_group(backend="gloo", timeout=longer) if world_size() > 1 else None

    def save(self, state: RunState, replicated: dict[str, Tensor], teacher: Mapping[str, Tensor] | None = None) -> None:
        """Start a save. Collective. `replicated` tensors are the same on all ranks; rank 0 writes them. So are the
        teacher's parameters, of which each rank writes its share.

        Waits for the save before it; raises on all ranks where that one failed.
        """
        self.wait()
        self._began = time.monotonic()
        tensors, table = self._held()
        for name, tensor in (teacher or {}).items():
            _take_share(
                tensors, table, (name, TEACHER, tuple(tensor.shape)), 0, tensor.detach().reshape(-1), replicated=True
            )
        if rank() == 0:
            tensors |= {f"{name}/replicated": tensor for name, tensor in replicated.items()}
            table += [(name, "replicated", tuple(t.shape), 0, t.numel()) for name, t in replicated.items()]
        scalars = _scalars(self._optimizer)
        self._buffer.fill(tensors)
        state = RunState(**(asdict(state) | {"optimizer_scalars": scalars}))
        self._thread = threading.Thread(target=self._write, args=(state, table), name="checkpoint", daemon=True)
        self._thread.start()
        if not self._config.asynchronous:
            self.wait()

    def failed(self) -> bool:
        """Whether the last save has failed by now; `wait` raises it. Not collective."""
        return self._failure is not None

    def seconds_to_save(self) -> float:
        """How long this rank would wait for a save from now on: as for the slowest of the last, and for one under way.

        Not collective.
        """
        slowest = max(self._seconds, default=self._first_guess)
        under_way = self._thread is not None and self._thread.is_alive()
        left = slowest - (time.monotonic() - self._began) if under_way else 0.0
        return slowest + max(left, 0.0)

    def wait(self) -> None:
        """Return when nothing is being written. Raises, on all ranks, what made the last save fail."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _held(self) -> tuple[dict[str, Tensor], list[Piece]]:
        tensors: dict[str, Tensor] = {}
        table: list[Piece] = []
        for f in self._fragments:
            kinds = {"master": f.of(f.flat)}
            for key, value in self._optimizer.state.get(f.flat, {}).items():
                if _is_per_element(key, value, f.flat):
                    kinds[key] = f.of(value)
            for kind, values in kinds.items():
                _take_share(tensors, table, (f.name, kind, f.shape), f.offset, values, f.replicated)
        return tensors, table

    def _write(self, state: RunState, table: list[Piece]) -> None:
        """In the thread: this rank's file, then, when all ranks' files are durable, the commit by rank 0."""
        answer: dict[str, Any] = {"table": table}
        directory = self._store.at(step_name(state.step))
        try:
            self._check_finite()
            name = rank_name(self._incarnation, rank())
            answer["files"] = {name: _put(directory, name, self._buffer.view())}
        except BaseException as error:
            answer |= {"error": f"rank {rank()}: {error}", "kind": type(error)}
        try:
            answers = self._gathered(answer)
            errors = [a["error"] for a in answers if "error" in a]
            outcome: BaseException | None = None
            if errors:
                said = f"checkpoint of step {state.step} not written: {'; '.join(errors)}"
                if any(a.get("kind") is NotFiniteCheckpoint for a in answers):
                    outcome = NotFiniteCheckpoint(f"{said}; the one of step {self.last_step} is the last good one")
                else:
                    outcome = OSError(said)
            elif rank() == 0:
                try:
                    self._commit(directory, state, answers)
                except BaseException as error:
                    outcome = error
            self._failure = self._of_rank_0(outcome)
            if self._failure is None:
                self.last_step = state.step
                self._seconds.append(time.monotonic() - self._began)
        except BaseException as error:
            self._failure = error

    def _check_finite(self) -> None:
        # The probe is only a diagnostic: nothing is computed from it.
        if names := [name for name in self._buffer.not_finite() if not name.startswith(PROBE)]:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise NotFiniteCheckpoint(f"NaN or infinite: {', '.join(names[:3])}{more}")

    def _gathered(self, value: Any) -> list[Any]:
        """Of all ranks on rank 0, of none on the others: nobody else commits, and tables are long. Collective."""
        if self._group is None:
            return [value]
        gathered: list[Any] | None = [None] * world_size() if rank() == 0 else None
        dist.gather_object(value, gathered, group=self._group)
        return gathered or []

    def _of_rank_0(self, value: Any) -> Any:
        """Collective."""
        box = [value]
        if self._group is not None:
            dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def _commit(self, directory: Store, state: RunState, answers: list[dict[str, Any]]) -> None:
        newest = newest_incarnation(self._run_dir)
        if newest != self._incarnation:
            raise Fenced(
                f"incarnation {newest} of {self._run_dir} has started while this one, {self._incarnation}, was "
                "alive: stopping without writing, the newer one goes on"
            )
        files = {name: described for answer in answers for name, described in answer["files"].items()}
        name = state_name(self._incarnation)
        files[name] = _put(directory, name, json.dumps(asdict(state), indent=1).encode())
        num_commits = self._num_commits + (state.step > 0)
        manifest = {
            "format": FORMAT,
            "step": state.step,
            "num_commits": num_commits,
            "world_size": world_size(),
            "state": name,
            "files": files,
            "files_of_ranks": [next(iter(answer["files"])) for answer in answers],
            "tensors": entries([answer["table"] for answer in answers]),
        }
        body = json.dumps(manifest)
        directory.write(MANIFEST, json.dumps({"crc32": isal_zlib.crc32(body.encode()), "manifest": body}).encode())
        self._committed.add(state.step)
        self._num_commits = num_commits
        if state.step and (every := self._config.export_every_commits) and num_commits % every == 0:
            write_export(open_checkpoint(self._store, state.step), export_path(self._run_dir, state.step))
        try:
            self._clean_up(state.step)
        except (OSError, UserError) as error:  # the commit stands; credentials may well be for writing alone
            if not self._told:
                said = "step %d is committed, but older files can't be removed (tried again at the next): %s"
                log.warning(said, state.step, error)
            self._told = True

    def _clean_up(self, newest: int) -> None:
        """Remove what retention lets go, what was never committed, and what was damaged; only ever after a commit."""
        directory = self._store.at(step_name(newest))
        for folder in {name.partition("/")[0] for name in directory.names()}:
            if re.fullmatch(r"i\d+", folder) and int(folder[1:]) < self._incarnation:
                directory.remove(folder, recursive=True)  # of one that was killed while it saved this step
        present, every = steps_in(self._store), self._config.keep_every_steps
        # Those between the one that was resumed from and our own were passed over on resume: they don't hold.
        known = {step for step in present if step <= self._resumed} | self._committed
        committed = sorted(step for step in known if present.get(step))
        kept = {0, *committed[-self._config.keep_last :]} | {step for step in committed if every and step % every == 0}
        for step in sorted(present.keys() - kept):
            if step < newest:
                # Without its manifest a half-removed checkpoint is none.
                self._store.at(step_name(step)).remove(MANIFEST)
                self._store.remove(step_name(step), recursive=True)


def _put(store: Store, name: str, data: bytes | memoryview) -> dict[str, int]:
    described = {"bytes": len(data), "crc32": isal_zlib.crc32(data)}
    store.write(name, data)
    return described


def _take_share(
    tensors: dict[str, Tensor],
    table: list[Piece],
    what: tuple[str, str, tuple[int, ...]],
    offset: int,
    values: Tensor,
    replicated: bool,
) -> None:
    """Add what this rank writes of a flat tensor `what` = (name, kind, shape) whose part from `offset` on it holds.

    Where every rank holds it all, each writes its share.
    """
    size, index = (world_size(), rank()) if replicated else (1, 0)
    start, stop = (len(values) * edge // size for edge in (index, index + 1))
    if stop > start:
        tensors[key_of(*what[:2], offset + start)] = values[start:stop]
        table.append((*what, offset + start, stop - start))


def _is_per_element(key: str, value: Any, flat: Tensor) -> bool:
    # By its shape alone AdamW's step would be a state of each element of a parameter that is one number.
    return key != "step" and isinstance(value, Tensor) and value.shape == flat.shape


def _scalars(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """State that is one number a parameter and the same for all: AdamW's `step`."""
    for flat, state in optimizer.state.items():
        return {key: float(v) for key, v in state.items() if not _is_per_element(key, v, flat)}
    return {}
