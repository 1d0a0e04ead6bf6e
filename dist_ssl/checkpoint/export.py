"""A run's model out of its checkpoints: whole tensors for an evaluation, the encoder as safetensors for others."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from dist_ssl import config as config_module
from dist_ssl import storage
from dist_ssl.checkpoint.layout import checkpoint_url, committed_steps
from dist_ssl.checkpoint.read import open_checkpoint
from dist_ssl.config import Config, StorageConfig, UserError
from dist_ssl.models import ContrastiveModel, build_model


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
    step = _existing_step(url, step, config.storage)
    model = build_model(config)
    model.load_state_dict(read_model_state(url, step, config.storage))
    return config, step, model.eval().requires_grad_(False)


def _existing_step(url: str, step: int | None, config: StorageConfig) -> int:
    """The step, or for None the newest. Raises UserError where there is no checkpoint of it."""
    steps = committed_steps(url, config)
    if not steps:
        raise UserError(
            f"{url}: expected a checkpoint, there are none; pretrain first, or give another run's directory"
        )
    if step is not None and step not in steps:
        raise UserError(f"{url}: expected a checkpoint of step {step}; there are {steps}")
    return steps[-1] if step is None else step


def export_encoder(run_dir: str | Path, file: str | Path, *, with_head: bool = False, step: int | None = None) -> int:
    """Write a run's encoder as safetensors, with its JSON beside it; returns the step it was taken at."""
    if Path(file).suffix != ".safetensors":
        raise UserError(f"{file}: expected a name that ends in .safetensors, which is the format that is written")
    config = read_run_config(run_dir)
    step = _existing_step(checkpoint_url(config), step, config.storage)
    write_export(config, step, Path(file), with_head)
    return step


def write_export(config: Config, step: int, file: Path, with_head: bool = False) -> None:
    """The encoder at a step under torchvision's parameter names (the head's as `head.*`), and a JSON of what it is."""
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
