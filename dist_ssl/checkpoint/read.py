"""Checkpoints: fragments of named parameters, committed as one transaction, read back at any world size and ZeRO stage.

A step has a file of each rank (masters and optimizer state; rank 0's has the buffers too), a state (step, cursor,
config, hash of the data, versions) and, written last, a manifest: sizes, checksums, and where each fragment stands.
Without a manifest that holds there is no checkpoint. Files of two incarnations never share a name, so an older one that
is still alive can't damage what a newer one writes; it sees the newer one's number before it commits.
Nothing is ever unpickled. Reading needs neither DeepSpeed nor a process group.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from isal import isal_zlib
from torch import Tensor

from dist_ssl.checkpoint.file import FileReader
from dist_ssl.checkpoint.table import Table
from dist_ssl.config import UserError
from dist_ssl.distributed import broadcast_object, gather_objects, rank, together, world_size
from dist_ssl.models import kept_buffers
from dist_ssl.storage import Store
from dist_ssl.storage.layout import MANIFEST, committed_steps, step_name

log = logging.getLogger(__name__)
PROBE = "probe."  # the names of the online probe's tensors, which are no part of the model
MISSING = (FileNotFoundError, IsADirectoryError, NotADirectoryError)  # what a file that is not there is told by
TEACHER = "teacher"  # the kind of its parameters, under the student's names; its buffers are replicated as teacher.*


class DamagedCheckpoint(UserError):
    """A checkpoint that can't be read; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class RunState:
    """What a run is, beside its tensors, after `step` completed steps."""

    step: int
    cursor: int
    config: str  # TOML
    data_hash: str
    optimizer_scalars: dict[str, float] = field(default_factory=dict)  # AdamW's count of its own steps
    skipped_steps: int = 0
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint whose manifest holds."""

    store: Store
    manifest: dict[str, Any]
    table: Table
    _readers: dict[str, FileReader] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return self.store.root

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    @property
    def num_commits(self) -> int:
        """Of the run up to this one, that of step 0 left out; 0 where an older version did not count them."""
        return int(self.manifest.get("num_commits", 0))

    def verify(self, name: str, keep: bool = False) -> str | None:
        """What is wrong with one of its files, or None. With `keep` what was fetched is there for `read`.

        Raises what keeps it from being read, which is no damage: StorageError, PermissionError, UserError.
        """
        described = self.manifest["files"][name]
        try:
            size = self.store.size(name)
            if size != described["bytes"]:
                return f"{name}: expected {described['bytes']} bytes, found {size}"
            reader = self._reader(name)
            if reader.checksum(keep) != described["crc32"]:
                return f"{name}: its checksum does not match: damaged"
            if name.endswith(".safetensors"):
                _ = reader.header
        except UserError:  # no credentials, say
            raise
        except (*MISSING, ValueError) as error:
            return f"{name}: {error}"
        return None

    def state(self) -> RunState:
        return RunState(**json.loads(self.store.read(self.manifest["state"])))

    def kinds(self) -> set[str]:
        """Of what is held of the student's parameters: "master" and the optimizer's state."""
        return {kind for _, kind in self.table.shapes} - {"replicated", TEACHER}

    def read(self, name: str, kind: str, offset: int, length: int, into: Tensor) -> int:
        """Elements [offset, offset + length) of a parameter's flat `kind`, copied to `into`; returns how many were."""
        copied = 0
        for file, key, first, size in self.table.fragments(name, kind):
            start, stop = max(offset, first), min(offset + length, first + size)
            if stop <= start:
                continue
            into[start - offset : stop - offset].copy_(self._reader(file).read(key, start - first, stop - start))
            copied += stop - start
        return copied

    def close(self) -> None:
        """Let go of files and memory: a file that retention removes would stay on the disk while it is mapped."""
        self._readers.clear()

    def _reader(self, file: str) -> FileReader:
        if file not in self._readers:
            self._readers[file] = FileReader(self.store, file, self.manifest["files"][file]["bytes"])
        return self._readers[file]

    def tensors(self, kind: str, prefix: str = "") -> dict[str, Tensor]:
        """Whole tensors of a kind ("master", "teacher" or "replicated") whose name starts with `prefix`, on the CPU."""
        wanted = [name for name, of in self.table.shapes if of == kind and name.startswith(prefix)]
        found: dict[str, Tensor] = {}
        for name in sorted(wanted, key=lambda name: self._place(name, kind)):
            shape = self.table.shapes[name, kind]
            if kind == "replicated":
                file, key, _, length = next(self.table.fragments(name, kind))
                found[name] = self._reader(file).read(key, 0, length).view(shape).clone()
                continue
            flat = torch.empty(int(torch.Size(shape).numel()))
            if self.read(name, kind, 0, flat.numel(), flat) != flat.numel():
                raise DamagedCheckpoint(f"{self.url}: the fragments of {name} don't cover it")
            found[name] = flat.view(shape)
        return found

    def _place(self, name: str, kind: str) -> tuple[str, int]:
        first = next(self.table.fragments(name, kind))
        return first.file, self._reader(first.file).place(first.key)


def open_checkpoint(store: Store, step: int) -> Checkpoint:
    """Raises DamagedCheckpoint where the manifest does not hold, FileNotFoundError where there is none."""
    store = store.at(step_name(step))
    raw = store.read(MANIFEST)
    try:
        signed = json.loads(raw)
        if isal_zlib.crc32(signed["manifest"].encode()) != signed["crc32"]:
            raise ValueError("its checksum does not match")
        manifest = json.loads(signed["manifest"])
        table = Table(manifest)
        files = {name for name, described in manifest["files"].items() if described["bytes"] + described["crc32"] >= 0}
        if missing := {manifest["state"], *table.files()} - files:
            raise ValueError(f"it tells neither size nor checksum of {sorted(missing)[0]}")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{store.url(MANIFEST)}: {error}") from None
    return Checkpoint(store, manifest, table)


def newest_valid(store: Store) -> Checkpoint | None:
    """The newest checkpoint every file of which holds, or None where none is committed. Collective.

    The ranks check a share of the files each. Warns of each damaged one that it passes over; raises UserError where
    all are damaged. A file that can't be read now is not damaged: raises StorageError, PermissionError or UserError.
    """
    with together():
        steps = committed_steps(store) if rank() == 0 else []
    steps = broadcast_object(steps)
    for step in reversed(steps):
        problems = []
        found = None
        with together():
            try:
                found = open_checkpoint(store, step)
                names = sorted(found.manifest["files"])[rank() :: world_size()]
                problems = [problem for name in names if (problem := found.verify(name, keep=True))]
            except (*MISSING, DamagedCheckpoint) as error:
                problems = [str(error)]
        problems = [problem for mine in gather_objects(problems) for problem in mine]
        if not problems:
            return found
        if rank() == 0:
            log.warning("checkpoint of step %d is damaged, trying the one before it: %s", step, "; ".join(problems))
    if steps:
        raise UserError(f"{store.root}: all {len(steps)} checkpoints are damaged; --restart begins a new run")
    return None


def load(
    checkpoint: Checkpoint,
    engine: Any,
    probe: torch.nn.Module | None = None,
    teacher: torch.nn.Module | None = None,
) -> RunState:
    """Bring an engine, a teacher, and the probe where it was saved, to a checkpoint's state; closes it.

    Collective; any W and ZeRO stage.
    """
    state = checkpoint.state()
    kinds = checkpoint.kinds() - {"master"}
    engine.before_load()
    flats = {f.flat for f in engine.fragments}
    on_device = engine.optimizer.defaults.get("fused") or engine.optimizer.defaults.get("capturable")
    for flat in flats:
        place = flat.device if on_device else torch.device("cpu")
        scalars = {key: torch.tensor(value, device=place) for key, value in state.optimizer_scalars.items()}
        engine.optimizer.state[flat] = scalars | {kind: torch.zeros_like(flat.detach()) for kind in kinds}
        if not engine.optimizer.state[flat]:
            del engine.optimizer.state[flat]  # saved before the first step: the optimizer makes it
    with together():
        for f in engine.fragments:
            for kind in ("master", *kinds):
                target = f.flat if kind == "master" else engine.optimizer.state[f.flat][kind]
                if checkpoint.read(f.name, kind, f.offset, f.length, f.of(target)) != f.length:
                    raise DamagedCheckpoint(f"{checkpoint.url}: {kind} of {f.name} is not there in full")
    engine.after_load()
    with torch.no_grad(), together():
        saved = checkpoint.tensors("replicated")
        for name, buffer in kept_buffers(engine.model).items():
            if name not in saved:
                raise DamagedCheckpoint(f"{checkpoint.url}: the buffer {name} is not there")
            buffer.copy_(saved[name])
        if teacher is not None:
            teacher.load_state_dict(teacher_state(checkpoint))
        if probe is not None:
            held = {name.removeprefix(PROBE): t for name, t in saved.items() if name.startswith(PROBE)}
            if held:
                probe.load_state_dict(held)
    checkpoint.close()
    return state


def teacher_state(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """All parameters and buffers of the teacher, whole, by name, on the CPU; empty where there is none."""
    prefix = f"{TEACHER}."
    buffers = checkpoint.tensors("replicated", prefix)
    return checkpoint.tensors(TEACHER) | {name.removeprefix(prefix): tensor for name, tensor in buffers.items()}
