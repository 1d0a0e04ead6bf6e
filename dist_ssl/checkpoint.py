"""Checkpoints: fragments of named parameters, committed as one transaction, read back at any world size and ZeRO stage.

    step-00001200/i0007/rank-00003.safetensors   what rank 3 of incarnation 7 held: masters, optimizer state, buffers
    step-00001200/i0007/state.json               step, cursor, config, hash of the data, versions
    step-00001200/manifest.json                  written last: sizes, checksums, and where each fragment stands

A directory without a manifest that holds is not a checkpoint. Files of two incarnations never share a name, so an older
one that is still alive can't damage what a newer one writes; it finds the newer one's number before it commits, and stops.
Nothing is ever unpickled. Reading needs neither DeepSpeed nor a process group.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_ssl import config as config_module
from dist_ssl import storage
from dist_ssl.config import Config, StorageConfig, UserError
from dist_ssl.distributed import broadcast_object, gather_objects, rank, world_size
from dist_ssl.fragments import FileReader, HostBuffer, checksum
from dist_ssl.models import ContrastiveModel, build_model

log = logging.getLogger(__name__)
FORMAT = 1


class Fenced(RuntimeError):
    """A newer incarnation of this run has started: this one must not write any more. Not to be started again."""


class DamagedCheckpoint(ValueError):
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


def checkpoint_url(config: Config) -> str:
    return config.checkpoint.url or storage.join(config.run.dir, "checkpoints")


def step_url(url: str, step: int) -> str:
    return storage.join(url, f"step-{step:08d}")


def committed_steps(url: str, config: StorageConfig) -> list[int]:
    """Steps that have a manifest, ascending; whether it holds is seen when it is read."""
    return sorted(steps_in(url, config, "manifest.json"))


def steps_in(url: str, config: StorageConfig, name: str = "") -> set[int]:
    found = (re.search(r"step-(\d{8})/(?:.*/)?([^/]+)$", file) for file in storage.list_files(url, config))
    return {int(match[1]) for match in found if match and (not name or match[2] == name)}


# --- incarnations ----------------------------------------------------------------------------------------------


def newest_incarnation(run_dir: str | Path) -> int:
    return max((int(path.name) for path in Path(run_dir, "incarnations").glob("[0-9]*")), default=0)


def take_incarnation(run_dir: str | Path) -> int:
    """The next incarnation number of a run directory, taken by creating its file. Call on rank 0 only."""
    directory = Path(run_dir, "incarnations")
    directory.mkdir(parents=True, exist_ok=True)
    while True:
        number = newest_incarnation(run_dir) + 1
        try:
            (directory / f"{number:04d}").touch(exist_ok=False)
        except FileExistsError:  # another start took it in the same moment
            continue
        return number


# --- writing ---------------------------------------------------------------------------------------------------


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
        self._group = dist.new_group(backend="gloo") if world_size() > 1 else None

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
        described = {"bytes": len(data), "crc32": checksum(data)}
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
        signed = json.dumps({"crc32": zlib.crc32(body.encode()), "manifest": body})
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


# --- reading ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint whose manifest holds."""

    url: str
    storage: StorageConfig
    manifest: dict[str, Any]

    def verify(self, name: str) -> str | None:
        """What is wrong with one of its files, or None."""
        described = self.manifest["files"][name]
        crc = 0
        try:
            for start in range(0, described["bytes"], 2**24):
                stop = min(start + 2**24, described["bytes"])
                crc = zlib.crc32(storage.read_bytes(storage.join(self.url, name), self.storage, start, stop), crc)
            size = storage.size(storage.join(self.url, name), self.storage)
        except OSError as error:
            return f"{name}: {error}"
        if size != described["bytes"]:
            return f"{name}: expected {described['bytes']} bytes, found {size}"
        return None if crc == described["crc32"] else f"{name}: its checksum does not match: damaged"

    def state(self) -> RunState:
        raw = storage.read_bytes(storage.join(self.url, self.manifest["state"]), self.storage)
        return RunState(**json.loads(raw))

    def kinds(self) -> set[str]:
        return {entry["kind"] for entry in self.manifest["fragments"]} - {"replicated"}

    def read(self, name: str, kind: str, offset: int, length: int, into: Tensor, readers: dict[str, FileReader]) -> int:
        """Elements [offset, offset + length) of a parameter's flat `kind`, copied to `into`; returns how many were."""
        copied = 0
        for entry in self._index().get((name, kind), ()):
            start, stop = max(offset, entry["offset"]), min(offset + length, entry["offset"] + entry["length"])
            if stop <= start:
                continue
            reader = readers.setdefault(
                entry["file"], FileReader(storage.join(self.url, entry["file"]), self.storage)
            )
            into[start - offset : stop - offset].copy_(reader.read(entry["key"], start - entry["offset"], stop - start))
            copied += stop - start
        return copied

    def tensors(self, kind: str, prefix: str = "") -> dict[str, Tensor]:
        """Whole tensors of a kind ("master" or "replicated") whose name starts with `prefix`, on the CPU."""
        readers: dict[str, FileReader] = {}
        found: dict[str, Tensor] = {}
        for (name, entry_kind), entries in self._index().items():
            if entry_kind != kind or not name.startswith(prefix):
                continue
            shape = entries[0]["shape"]
            if kind == "replicated":
                reader = readers.setdefault(
                    entries[0]["file"], FileReader(storage.join(self.url, entries[0]["file"]), self.storage)
                )
                found[name] = reader.read(entries[0]["key"], 0, entries[0]["length"]).view(shape).clone()
                continue
            flat = torch.empty(int(torch.Size(shape).numel()))
            if self.read(name, kind, 0, flat.numel(), flat, readers) != flat.numel():
                raise DamagedCheckpoint(f"{self.url}: the fragments of {name} don't cover it")
            found[name] = flat.view(shape)
        return found

    def _index(self) -> dict[tuple[str, str], list[dict[str, Any]]]:
        index = self.__dict__.get("_cached_index")
        if index is None:
            index = {}
            for entry in self.manifest["fragments"]:
                index.setdefault((entry["name"], entry["kind"]), []).append(entry)
            self.__dict__["_cached_index"] = index
        return index


def open_checkpoint(url: str, step: int, config: StorageConfig) -> Checkpoint:
    """Raises DamagedCheckpoint where the manifest does not hold, FileNotFoundError where there is none."""
    directory = step_url(url, step)
    raw = storage.read_bytes(storage.join(directory, "manifest.json"), config)
    try:
        signed = json.loads(raw)
        if zlib.crc32(signed["manifest"].encode()) != signed["crc32"]:
            raise ValueError("its checksum does not match")
        manifest = json.loads(signed["manifest"])
        if manifest["format"] != FORMAT:
            raise ValueError(f"expected format {FORMAT}, got {manifest['format']}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{directory}/manifest.json: {error}") from None
    return Checkpoint(directory, config, manifest)


def newest_valid(url: str, config: StorageConfig) -> Checkpoint | None:
    """The newest checkpoint every file of which holds, or None where none is committed. Collective.

    The ranks check a share of the files each. Warns of each damaged one that it passes over; raises UserError where
    all are damaged.
    """
    steps = broadcast_object(committed_steps(url, config) if rank() == 0 else None)
    for step in reversed(steps):
        problems = []
        found = None
        try:
            found = open_checkpoint(url, step, config)
            names = sorted(found.manifest["files"])[rank() :: world_size()]
            problems = [problem for name in names if (problem := found.verify(name))]
        except (OSError, DamagedCheckpoint) as error:
            problems = [str(error)]
        problems = [problem for mine in gather_objects(problems) for problem in mine]
        if not problems:
            return found
        if rank() == 0:
            log.warning("checkpoint of step %d is damaged, trying the one before it: %s", step, "; ".join(problems))
    if steps:
        raise UserError(f"{url}: all {len(steps)} checkpoints are damaged; --restart begins a new run")
    return None


def load(checkpoint: Checkpoint, engine: Any, probe: torch.nn.Module | None = None) -> RunState:
    """Bring an engine, and the probe where it was saved, to a checkpoint's state. Collective; any W and ZeRO stage."""
    state = checkpoint.state()
    readers: dict[str, FileReader] = {}
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
    for f in engine.fragments:
        for kind in ("master", *kinds):
            target = f.flat if kind == "master" else engine.optimizer.state[f.flat][kind]
            if checkpoint.read(f.name, kind, f.offset, f.length, f.of(target), readers) != f.length:
                raise DamagedCheckpoint(f"{checkpoint.url}: {kind} of {f.name} is not there in full")
    engine.after_load()
    saved = checkpoint.tensors("replicated")
    with torch.no_grad():
        for name, buffer in engine.model.named_buffers():
            buffer.copy_(saved[name])
        if probe is not None:
            held = {name.removeprefix("probe."): t for name, t in saved.items() if name.startswith("probe.")}
            if held:
                probe.load_state_dict(held)
    return state


# --- a run's model, for evaluation and export ------------------------------------------------------------------


def read_run_config(run_dir: str | Path) -> Config:
    """The resolved config of a run directory. Raises UserError where there is none."""
    path = Path(run_dir, "config.toml")
    if not path.exists():
        raise UserError(f"{run_dir}: not a run directory: it has no config.toml")
    return config_module.with_overrides(config_module.load(path), [f"run.dir={json.dumps(str(run_dir))}"])


def read_model_state(url: str, step: int, config: StorageConfig) -> dict[str, Tensor]:
    """All parameters and buffers of the model at a step, whole, fp32, by name, on the CPU."""
    found = open_checkpoint(url, step, config)
    problems = [problem for name in found.manifest["files"] if (problem := found.verify(name))]
    if problems:
        raise UserError(f"{found.url}: damaged: {'; '.join(problems)}")
    buffers = {n: t for n, t in found.tensors("replicated").items() if not n.startswith("probe.")}
    return found.tensors("master") | buffers


def load_run(run_dir: str | Path, step: int | None = None) -> tuple[Config, int, ContrastiveModel]:
    """(config, step, model in evaluation mode on the CPU) of a run, at its newest or the given step."""
    config = read_run_config(run_dir)
    url = checkpoint_url(config)
    steps = committed_steps(url, config.storage)
    if not steps or (step is not None and step not in steps):
        raise UserError(f"{url}: expected a checkpoint of step {step}; there are {steps or 'none'}")
    step = steps[-1] if step is None else step
    model = build_model(config)
    model.load_state_dict(read_model_state(url, step, config.storage))
    return config, step, model.eval().requires_grad_(False)


def export_encoder(run_dir: str | Path, file: str | Path, *, with_head: bool = False, step: int | None = None) -> int:
    """Write a run's encoder as safetensors, with its JSON beside it; returns the step it was taken at."""
    config = read_run_config(run_dir)
    steps = committed_steps(checkpoint_url(config), config.storage)
    if not steps or (step is not None and step not in steps):
        raise UserError(f"{run_dir}: expected a checkpoint of step {step}; there are {steps or 'none'}")
    step = steps[-1] if step is None else step
    write_export(config, step, Path(file), with_head)
    return step


def write_export(config: Config, step: int, file: Path, with_head: bool = False) -> None:
    """The encoder at a step under torchvision's parameter names (and the head's as `head.*`), and a JSON of what it is."""
    from safetensors.torch import save

    state = read_model_state(checkpoint_url(config), step, config.storage)
    tensors = {name.removeprefix("encoder."): t for name, t in state.items() if name.startswith("encoder.")}
    if with_head:
        tensors |= {name: t for name, t in state.items() if name.startswith("head.")}
    described = {
        "encoder": config.model.encoder,
        "image_size": config.augment.crop_size,
        "mean": config.augment.mean,
        "std": config.augment.std,
        "step": step,
        "head": config.model.head.model_dump() if with_head else None,
    }
    storage.write_bytes(str(file), save(tensors, metadata={"format": "pt"}), config.storage)
    storage.write_bytes(str(file.with_suffix(".json")), json.dumps(described, indent=1).encode(), config.storage)
