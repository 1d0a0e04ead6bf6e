"""What a run says of itself when it starts and when it is over: a few lines, on rank 0."""

from __future__ import annotations

import logging
import shlex
import time

from torch import nn

from dist_ssl import config as config_module
from dist_ssl.config import WITH_TEACHER, Config
from dist_ssl.data.manifest import Manifest
from dist_ssl.data.progress import duration
from dist_ssl.data.quarantine import bad_samples
from dist_ssl.distributed import World
from dist_ssl.models import ContrastiveModel

log = logging.getLogger(__name__)


class Announcement:
    """Says what is about to run; `over` says how long it took and what to do next."""

    def __init__(self, config: Config, world: World, manifest: Manifest, model: ContrastiveModel, done_steps: int):
        self._config, self._world = config, world
        batch, samples = config.train.global_batch_size, manifest.num_samples
        steps = config_module.total_steps(config, samples)
        self._started, self._steps_to_go = time.monotonic(), steps - done_steps
        if world.rank != 0:
            return
        encoder, head = _millions(model.encoder), _millions(model.head)
        method: str = config.objective.name
        method += f", predictor ({_millions(model.predictor)})" if model.predictor is not None else ""
        if config.objective.name in WITH_TEACHER:
            method += f", a teacher ({_millions(model.encoder, model.head)})"
        classes = f", {len(manifest.classes)} classes for the probes" if manifest.classes else ", no labels"
        device = "GPU" if world.device.type == "cuda" else "CPU"
        went = f", {done_steps:,} of them done" if done_steps else ""
        for line in (
            f"run: {config.run.dir}, {f'going on from step {done_steps:,}' if done_steps else 'new'}",
            f"data: {samples:,} images in {len(manifest.shards):,} shards{classes}",
            f"model: {config.model.encoder} ({encoder} parameters), head {config.model.head.kind} ({head}), {method}",
            f"ranks: {world.size} ({device}, {config.engine.precision}, ZeRO {config.engine.zero_stage}), "
            f"a batch of {batch:,} over all of them",
            f"steps: {steps:,}{went}, {batch * steps / samples:.1f} epochs of {samples / batch:.1f} steps; "
            f"a checkpoint every {config.checkpoint.every_steps:,}",
        ):
            log.info("%s", line)

    def over(self) -> None:
        """Call on every rank when all steps are done."""
        if self._world.rank == 0:
            run_dir = self._config.run.dir
            replaced = len(bad_samples(run_dir))
            log.info(
                "%s: complete, %d steps in %s%s; next: %s",
                run_dir,
                self._steps_to_go,
                duration(time.monotonic() - self._started),
                f", {replaced} bad samples replaced (quarantine-rank*.jsonl)" if replaced else "",
                next_command(self._config),
            )


def next_command(config: Config) -> str:
    """What one does with a complete run."""
    without = " --data DIR, with labelled images" if not config.evaluation.test_shards else ""
    return f"dist-ssl evaluate {shlex.quote(config.run.dir)}{without}"


def _millions(*parts: nn.Module) -> str:
    return f"{sum(p.numel() for part in parts for p in part.parameters()) / 1e6:.2f}M"
