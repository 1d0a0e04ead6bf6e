"""Saving: training waits for a copy to host memory; a thread writes; rank 0 commits when all ranks' files are there.

Every start of a run takes a new incarnation number; one that is no longer the newest commits nothing.
"""

from __future__ import annotations

import json
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from isal import isal_zlib
from torch import Tensor

from dist_ssl import storage
from dist_ssl.checkpoint.export import write_export
from dist_ssl.checkpoint.file import HostBuffer
from dist_ssl.checkpoint.layout import checkpoint_url, committed_steps, newest_incarnation, step_url, steps_in
from dist_ssl.checkpoint.read import FORMAT, RunState
from dist_ssl.config import Config
from dist_ssl.distributed import rank, world_size


class Fenced(RuntimeError):
    """A newer incarnation of this run has started: this one must not write any more. Not to be started again."""


class Checkpointer:
    """Saves an engine's state: training waits for one copy to host memory, a thread does the rest.

    At most one save is under way. The thread talks to the other ranks by a process group of its own.
    """

    def __init__(self, config: Config, fragments: list[Any], optimizer: torch.optim.Optimizer, incarnation: int):
        self._config, self._incarnation = config, incarnation
        self._fragments, self._optimizer = fragments, optimizer
        self._url = checkpoint_url(config)
        self._buffer = HostBuffer()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._commits = 0
        self.last_step = -1  # of the last save that was started
        self._group: Any = dist.new_group(backend="gloo") if world_size() > 1 else None

    def save(self, state: RunState, replicated: dict[str, Tensor]) -> None:
        """Start a save. Collective. `replicated` tensors are the same on all ranks; rank 0 writes them.

        Waits for the save before it; raises on all ranks where that one failed.
        """
        self.wait()
        tensors, table = self._held()
        if rank() == 0:
            tensors |= {f"{name}/replicated": tensor for name, tensor in replicated.items()}
            table += [_entry(name, "replicated", t.shape, 0, t.numel()) for name, t in replicated.items()]
        scalars = _scalars(self._optimizer)
        self._buffer.fill(tensors)
        self.last_step = state.step
        state = RunState(**(asdict(state) | {"optimizer_scalars": scalars}))
        self._thread = threading.Thread(target=self._write, args=(state, table), name="checkpoint", daemon=True)
        self._thread.start()
        if not self._config.checkpoint.asynchronous:
            self.wait()

    def failed(self) -> bool:
        """Whether the last save has failed by now; `wait` raises it. Not collective."""
        return self._failure is not None

    def wait(self) -> None:
        """Return when nothing is being written. Raises, on all ranks, what made the last save fail."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _held(self) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        tensors, table = {}, []
        for f in self._fragments:
            kinds = {"master": f.of(f.flat)}
            for key, value in self._optimizer.state.get(f.flat, {}).items():
                if value.numel() == f.flat.numel() and value.dim() == f.flat.dim():
                    kinds[key] = f.of(value)
            # Where every rank holds it all, each writes its share.
            start, stop = (
                (f.length * rank() // world_size(), f.length * (rank() + 1) // world_size())
                if f.replicated
                else (0, f.length)
            )
            for kind, values in kinds.items():
                if stop > start:
                    entry = _entry(f.name, kind, f.shape, f.offset + start, stop - start)
                    tensors[entry["key"]] = values[start:stop]
                    table.append(entry)
        return tensors, table

    def _write(self, state: RunState, table: list[dict[str, Any]]) -> None:
        """In the thread: this rank's file, then, when all ranks' files are durable, the commit by rank 0."""
        answer: dict[str, Any] = {"table": table}
        directory = step_url(self._url, state.step)
        try:
            name = f"i{self._incarnation:04d}/rank-{rank():05d}.safetensors"
            answer["files"] = {name: self._put(storage.join(directory, name), self._buffer.view())}
        except BaseException as error:
            answer["error"] = f"rank {rank()}: {error}"
        try:
            answers = self._gather(answer)
            errors = [a["error"] for a in answers if "error" in a]
            outcome: BaseException | None = None
            if errors:
                outcome = OSError(f"checkpoint of step {state.step} not written: {'; '.join(errors)}")
            elif rank() == 0:
                try:
                    self._commit(directory, state, answers)
                except BaseException as error:
                    outcome = error
            # Rank 0's outcome is everybody's.
            self._failure = self._gather(outcome)[0]
        except BaseException as error:
            self._failure = error

    def _put(self, url: str, data: memoryview) -> dict[str, int]:
        described = {"bytes": len(data), "crc32": isal_zlib.crc32(data)}
        storage.write_bytes(url, data if storage.is_local(url) else bytes(data), self._config.storage)  # type: ignore[arg-type]
        return described

    def _gather(self, value: Any) -> list[Any]:
        if self._group is None:
            return [value]
        gathered: list[Any] = [None] * world_size()
        dist.all_gather_object(gathered, value, group=self._group)
        return gathered

    def _commit(self, directory: str, state: RunState, answers: list[dict[str, Any]]) -> None:
        newest = newest_incarnation(self._config.run.dir)
        if newest != self._incarnation:
            raise Fenced(
                f"incarnation {newest} of {self._config.run.dir} has started while this one, {self._incarnation}, was "
                "alive: stopping without writing, the newer one goes on"
            )
        files = {name: described for answer in answers for name, described in answer["files"].items()}
        name = f"i{self._incarnation:04d}/state.json"
        text = json.dumps(asdict(state), indent=1).encode()
        files[name] = self._put(storage.join(directory, name), memoryview(text))
        manifest = {
            "format": FORMAT,
            "step": state.step,
            "world_size": world_size(),
            "state": name,
            "files": files,
            "fragments": [
                entry | {"file": next(iter(answer["files"]))} for answer in answers for entry in answer["table"]
            ],
        }
        body = json.dumps(manifest)
        signed = json.dumps({"crc32": isal_zlib.crc32(body.encode()), "manifest": body})
        storage.write_bytes(storage.join(directory, "manifest.json"), signed.encode(), self._config.storage)
        self._commits += 1
        if state.step and (every := self._config.checkpoint.export_every_commits) and self._commits % every == 0:
            target = Path(self._config.run.dir, "export", f"step-{state.step:08d}.safetensors")
            write_export(self._config, state.step, target)
        self._clean_up(state.step)

    def _clean_up(self, newest: int) -> None:
        """Remove what retention lets go and what was never committed; only ever after a commit."""
        config, present = self._config.checkpoint, steps_in(self._url, self._config.storage)
        committed = [step for step in committed_steps(self._url, self._config.storage) if step <= newest]
        kept = {0, *committed[-config.keep_last :]}
        if config.keep_every_steps:
            kept |= {step for step in committed if step % config.keep_every_steps == 0}
        for step in sorted(present - kept):
            if step < newest:
                directory = step_url(self._url, step)
                # Without its manifest a half-removed checkpoint is none.
                storage.remove(storage.join(directory, "manifest.json"), self._config.storage)
                storage.remove(directory, self._config.storage, recursive=True)


def _entry(name: str, kind: str, shape: Any, offset: int, length: int) -> dict[str, Any]:
    key = f"{name}/{kind}" if kind == "replicated" else f"{name}/{kind}@{offset}"
    return {"name": name, "kind": kind, "shape": list(shape), "offset": offset, "length": length, "key": key}


def _scalars(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """State that is one number a parameter and the same for all: AdamW's `step`."""
    for state in optimizer.state.values():
        return {key: float(v) for key, v in state.items() if not isinstance(v, Tensor) or v.dim() == 0}
    return {}
