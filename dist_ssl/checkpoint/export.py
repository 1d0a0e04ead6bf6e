"""A run's model out of its checkpoints: whole tensors for an evaluation, the encoder as safetensors for others."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dist_ssl import config as config_module
from dist_ssl.checkpoint.read import PROBE, TEACHER, Checkpoint, open_checkpoint, teacher_state
from dist_ssl.config import Config, UserError
from dist_ssl.models import ContrastiveModel, build_model, build_teacher
from dist_ssl.storage import Store
from dist_ssl.storage.layout import check_export_name, checkpoint_store, committed_steps, config_path


@dataclass(frozen=True)
class NormStatistics:
    """Buffers of an encoder by name, to be exported in place of the run's, and the images that they are of."""

    source: str
    buffers: Mapping[str, Tensor]


def read_run_config(run_dir: str | Path) -> Config:
    """The resolved config of a run directory. Raises UserError where there is none."""
    saved = config_module.load(config_path(run_dir))
    return config_module.with_overrides(saved, [config_module.override("run.dir", str(run_dir))])


def read_model_state(checkpoint: Checkpoint, teacher: bool = False) -> dict[str, Tensor]:
    """All parameters and buffers of the model, or of its teacher, whole, fp32, by name, on the CPU.

    Raises UserError for damage, and where a teacher is asked for and there is none.
    """
    problems = [problem for name in checkpoint.manifest["files"] if (problem := checkpoint.verify(name))]
    if problems:
        raise UserError(f"{checkpoint.url}: damaged: {'; '.join(problems)}")
    if teacher:
        state = teacher_state(checkpoint)
        if not state:
            raise UserError(f"{checkpoint.url}: expected a teacher, but its method has none; leave --teacher out")
        return state
    others = (PROBE, f"{TEACHER}.")
    buffers = {n: t for n, t in checkpoint.tensors("replicated").items() if not n.startswith(others)}
    return checkpoint.tensors("master") | buffers


def load_run(
    run_dir: str | Path, step: int | None = None, teacher: bool = False
) -> tuple[Config, int, ContrastiveModel]:
    """(config, step, model or its teacher in evaluation mode on the CPU) of a run, at its newest or the given step."""
    config = read_run_config(run_dir)
    found = _existing(checkpoint_store(config), step)
    state = read_model_state(found, teacher)
    model = build_teacher(config) if teacher else build_model(config)
    model.load_state_dict(state)
    return config, found.step, model.eval().requires_grad_(False)


def _existing(store: Store, step: int | None) -> Checkpoint:
    """The checkpoint of a step, or for None the newest. Raises UserError where there is none."""
    steps = committed_steps(store)
    if not steps:
        raise UserError(
            f"{store.root}: expected a checkpoint, there are none; pretrain first, or give another run's directory"
        )
    if step is not None and step not in steps:
        raise UserError(f"{store.root}: expected a checkpoint of step {step}; there are {steps}")
    return open_checkpoint(store, steps[-1] if step is None else step)


def export_encoder(
    run_dir: str | Path,
    file: str | Path,
    *,
    with_head: bool = False,
    step: int | None = None,
    teacher: bool = False,
    norms: NormStatistics | None = None,
) -> int:
    """Write a run's encoder, or its teacher's, as safetensors, with its JSON beside it; returns the step it is of."""
    check_export_name(file)
    found = _existing(checkpoint_store(read_run_config(run_dir)), step)
    write_export(found, Path(file), with_head, teacher, norms)
    return found.step


def write_export(
    checkpoint: Checkpoint,
    file: Path,
    with_head: bool = False,
    teacher: bool = False,
    norms: NormStatistics | None = None,
) -> None:
    """Its encoder, or its teacher's, under torchvision's names (the head's as `head.*`), and a JSON of what it is."""
    from safetensors.torch import save

    config = config_module.loads(checkpoint.state().config, f"{checkpoint.url}: its config")
    state = read_model_state(checkpoint, teacher)
    tensors = {name.removeprefix("encoder."): t for name, t in state.items() if name.startswith("encoder.")}
    if norms is not None:
        tensors |= norms.buffers
    if with_head:
        tensors |= {name: t for name, t in state.items() if name.startswith("head.")}
    described = {
        "encoder": config.model.encoder,
        "image_size": config.augment.image_size,
        "evaluated_size": config.evaluated_size,
        "batch_norm_from": norms and norms.source,
        "mean": config.augment.mean,
        "std": config.augment.std,
        "step": checkpoint.step,
        "teacher": teacher,
        "head": config.model.head.model_dump() if with_head else None,
    }
    beside = Store(str(file.parent), checkpoint.store.config)
    beside.write(file.name, save(tensors, metadata={"format": "pt"}))
    beside.write(file.with_suffix(".json").name, json.dumps(described, indent=1).encode())
