"""What the trajectory tests run on each rank: importable functions for `tests.pool`."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_ssl import config as config_module
from dist_ssl import distributed, engine, objective
from dist_ssl.augment import augment
from dist_ssl.config import WITH_TEACHER, Config
from dist_ssl.data.manifest import load_manifest
from dist_ssl.data.stream import plan_of, training_batches
from dist_ssl.engine import optimizers
from dist_ssl.models import build_model
from dist_ssl.training import verdict
from dist_ssl.training.step import Step
from dist_ssl.training.teacher import Teacher


def small_config(run_dir: Any, shards: Any, *overrides: str) -> Config:
    """A tiny model, a batch of 20 that three ranks do not divide, 20 AdamW steps at 1e-5."""
    values = {
        "run": {"dir": str(run_dir)},
        "data": {"shards": str(shards), "num_workers": 0, "ledger": True, "streams": 3, "block_shards": 2},
        "augment": {"crop_size": 32},
        "model": {"encoder": "resnet_tiny", "head": {"hidden_dim": 32, "output_dim": 16}},
        "optimizer": {"name": "adamw", "base_learning_rate": 1e-5, "scaling": "none", "warmup_epochs": 0.0},
        "train": {"steps": 20, "global_batch_size": 20},
        "engine": {"zero_stage": 1, "precision": "fp32", "threads_per_rank": 1},
        "checkpoint": {"every_steps": 5},
        "log": {"every_steps": 1, "tensorboard": False},
    }
    return config_module.with_overrides(config_module.validate(values, "test"), overrides)


def pretrain(config: Config, **options: Any) -> int:
    from dist_ssl.training import train

    logging.getLogger().setLevel("ERROR")
    return train.pretrain(config, **options)


def pretrain_warnings(config: Config, **options: Any) -> list[str]:
    """What `pretrain` warned of on this rank."""
    from dist_ssl.training import train

    with messages() as said:
        train.pretrain(config, **options)
    return said


@contextlib.contextmanager
def messages() -> Iterator[list[str]]:
    """The warnings that dist_ssl logs meanwhile."""
    said: list[str] = []
    handler, logger = logging.Handler(logging.WARNING), logging.getLogger("dist_ssl")
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    try:
        yield said
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def pretrain_error(config: Config) -> str:
    """What `pretrain` raised on this rank."""
    try:
        pretrain(config)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def losses(run_dir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def gradient_norm(run_dir: Path) -> float:
    """Of the run's last step."""
    return float(json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["gradient_norm"])


def ledger(run_dir: Path) -> dict[int, list[tuple[int, str]]]:
    """step -> what all ranks consumed, sorted. Each line of each rank must be a step of its own."""
    steps: dict[int, list[tuple[int, str]]] = {}
    for path in run_dir.glob("ledger-rank*.jsonl"):
        seen = set()
        for line in map(json.loads, path.read_text().splitlines()):
            assert line["step"] not in seen, f"{path.name}: step {line['step']} twice"
            seen.add(line["step"])
            steps.setdefault(line["step"], []).extend((epoch, key) for epoch, key in line["samples"])
    return {step: sorted(samples) for step, samples in steps.items()}


def loss_and_gradient(config: Config) -> tuple[float, dict[str, Tensor]]:
    """Global loss and averaged gradient at the first step, on the DeepSpeed engine."""
    world = distributed.initialize()
    manifest = load_manifest(config.data.shards, config.storage)
    model = engine.initialize(build_model(config), config, world)
    gradients: dict[str, Tensor] = {}

    def capture(*_: Any, **__: Any) -> None:
        for f in model.fragments:
            if f.flat.grad is not None:
                whole = gradients.setdefault(f.name, torch.zeros(f.shape).view(-1))
                whole[f.offset : f.offset + f.length] = f.of(f.flat.grad)

    model._apply = capture  # type: ignore[method-assign]
    rows = plan_of(config, manifest).rows_per_rank(config.train.global_batch_size, world.size, config.objective.chunks)
    batch = next(batches(config, manifest, 1))
    teacher = Teacher(config, world.device) if config.objective.name in WITH_TEACHER else None
    result = Step(config, model, rows, teacher)(batch, 0)
    norm = verdict.read(model.step(0.0, verdict.agree(result.loss, verdict.Asked()))).gradient_norm
    loss = result.loss.double() / world.size
    if world.size > 1:
        dist.all_reduce(loss)
        for name, p in build_model(config).named_parameters():
            whole = gradients.setdefault(name, torch.zeros(p.numel()))
            if not model.fragments[0].replicated:
                dist.all_reduce(whole)
    measured = torch.cat(list(gradients.values())).double().norm()  # in fp32 it is 4e-4 off over 5M elements
    assert abs(norm - measured) <= 2e-5 * measured  # the engine's, of sums in fp32: 1.1e-5 off for swin's 28M
    return float(loss), gradients


def batches(config: Config, manifest: Any, num_steps: int) -> Any:
    return training_batches(
        config,
        manifest,
        cursor=0,
        first_step=0,
        num_steps=num_steps,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )


def fp64_losses(config: Config) -> list[float]:
    """The whole computation in fp64 on plain torch: model, loss, averaged gradients, AdamW."""
    manifest = load_manifest(config.data.shards, config.storage)
    model = build_model(config).double()
    optimizer = torch.optim.AdamW(optimizers.parameter_groups(model, 1e-4), lr=1e-3)
    size = distributed.world_size()
    found = []
    rows = plan_of(config, manifest).rows_per_rank(config.train.global_batch_size, size)[0]
    for batch in batches(config, manifest, config.train.steps or 1):
        views = [augment(*of_size, config.augment).flatten(0, 1).double() for of_size in batch.of_each_size()]
        z = model(*views)[1].unflatten(0, (len(batch.keys), -1))
        loss = objective.nt_xent_views(z, 0.1, rows_per_rank=rows, sample_ids=batch.sample_ids)
        optimizer.zero_grad()
        loss.backward()
        total = loss.detach() / size
        if size > 1:
            dist.all_reduce(total)
            for p in model.parameters():
                dist.all_reduce(p.grad)
                p.grad /= size
        optimizer.step()
        found.append(float(total))
    return found
