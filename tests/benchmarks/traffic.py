"""What a step costs a GPU, counted without one: `python -m tests.benchmarks.traffic CONFIG [--ranks W] [--json FILE]`.

One whole step of rank 0 (augment, encoder, head, loss, backward, optimizer) is traced through the code that CUDA takes,
on fake tensors (`tests.benchmarks.tracer`, which says what differs from CUDA), and beside it forward and backward of
the same network, torchvision's encoder and the head, with torch's own BatchNorm under the same autocast, or with its
SyncBatchNorm, without recomputation. A kernel's predicted time is the longest of its bytes by bandwidth, its FLOPs by
800 TFLOP/s (bf16 products, measured on an H100) and 5 microseconds of launch; time on the wire is not predicted.
DeepSpeed is not in the trace: its stand-in reduces one flat fp32 gradient and steps the whole optimizer; with `--stage`
it does what DeepSpeed 0.19 does under that ZeRO stage between backward's gradients and the next forward's weights:
copies into buckets, reductions, the optimizer on this rank's part, the gathering of weights (written down from its
source; scalars are left out). "Launches" leaves out collectives; "MB sent" is what this rank sends in a ring.

Of bare, in commit 4de154e, where batch norm was a CPU's, and now: ResNet-50, one rank of 256 images: bytes 2.22, 0.81,
launches 4.38, 1.05, predicted H100 time 2.28, 0.84, kept 66.0, 43.8 MB a view; 64 ranks of 64 images: bytes 2.24, 0.83,
launches 5.10, 1.19, time 2.79, 0.92. ViT-S/16, one rank of 256: bytes 1.04, 1.01; launches 1.08 now. The host waits for
nothing; with torch's SyncBatchNorm it does 165 times a step. 64 ranks of 64 with `--stage` 0, 1, 2, 3: predicted H100
time 19.9, 19.3, 19.3, 20.1 ms (bare 20.6), launches 1.41, 1.37, 1.37, 1.58 of bare, DeepSpeed's copies alone 0.22 to
0.45; LARS on a 64th of the weights takes 0.2 ms instead of 0.8.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from dist_ssl import config as config_module
from dist_ssl.config import WITH_TEACHER, Config
from dist_ssl.data.plan import Plan
from dist_ssl.data.stream import Batch, draw_views, empty_crops
from dist_ssl.engine.optimizers import build_optimizer
from dist_ssl.models import ContrastiveModel, GlobalBatchNorm, build_model
from dist_ssl.training.step import Step
from dist_ssl.training.teacher import Teacher
from tests.benchmarks import stages
from tests.benchmarks.tracer import FAKE_MODE, GPUS, Counts, Tracer

COLUMNS = ("bytes", "flops", "launches", "collectives", "wire_bytes", "host_syncs")


class StandIn:
    """What `Step` calls an engine: the model under autocast, backward, and the reduction of gradients."""

    def __init__(self, config: Config, model: ContrastiveModel, tracer: Tracer):
        self.config, self.model, self.tracer = config, model, tracer
        model.encoder.register_forward_pre_hook(lambda *_: self._enter("encoder"))
        model.head.register_forward_pre_hook(lambda *_: self._enter("head"))

    def _enter(self, part: str) -> None:
        self.tracer.part = part

    def __call__(self, *views: Tensor) -> Any:
        with autocast(self.config), self.tracer.keeping(list(self.model.parameters())):
            result = self.model(*views)
        self._enter("loss")
        return result

    def backward(self, loss: Tensor) -> None:
        self._enter("backward")
        loss.backward()
        self._enter("loss")


def autocast(config: Config) -> Any:
    return torch.autocast("cpu", torch.bfloat16, enabled=config.engine.precision == "bf16")


def fake_model(config: Config) -> ContrastiveModel:
    """Without data, which ViTs' initialisation looks at."""
    with FAKE_MODE, mock.patch("torch.nn.init.trunc_normal_", lambda tensor, **_: tensor):
        return build_model(config)


def fake_teacher(config: Config, tracer: Tracer) -> Teacher:
    with FAKE_MODE, mock.patch("torch.nn.init.trunc_normal_", lambda tensor, **_: tensor):
        teacher = Teacher(config, torch.device("cpu"))
    teacher.model.register_forward_pre_hook(lambda *_: setattr(tracer, "part", "teacher"))
    teacher.model.register_forward_hook(lambda *_: setattr(tracer, "part", "loss"))
    return teacher


def trace_step(config: Config, ranks: int, stage: int | None = None) -> tuple[Tracer, int]:
    """A tracer that saw rank 0's step, and the views of this rank."""
    tracer, model = Tracer(), fake_model(config)
    rows_per_chunk = Plan([1], 0, "", 1, 1).rows_per_rank(
        config.train.global_batch_size, ranks, config.objective.chunks
    )
    n = sum(rows[0] for rows in rows_per_chunk)
    parameters, _ = draw_views(0, np.zeros(n, np.int64), np.arange(n), config.augment)
    with tracer.fake_mode:
        crops = [torch.empty(crops.shape, dtype=torch.uint8) for crops in empty_crops(n, config.augment)]
        moved = torch.empty(n, dtype=torch.int64)  # by the feed, from pinned memory
        applied = torch.ones((), dtype=torch.bool)
    numbers = torch.arange(n)
    batch = Batch(crops, parameters, moved, numbers, numbers, moved, [], {})
    teacher = fake_teacher(config, tracer) if config.objective.name in WITH_TEACHER else None
    with tracer.tracing():
        tracer.part = "augment"
        train_step = Step(config, StandIn(config, model, tracer), rows_per_chunk, teacher)  # type: ignore[arg-type]
        train_step(batch, 0)
        tracer.part = "settling"
        train_step.settle(applied, 0.5)
    trace_optimizer(config, model, tracer, stage)
    return tracer, n * config.augment.num_views


def trace_optimizer(config: Config, model: ContrastiveModel, tracer: Tracer, stage: int | None) -> None:
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    with Tracer().tracing():
        optimizer = build_optimizer(model, config.optimizer)
    groups = [group["params"] for group in optimizer.param_groups]
    if stage:
        with tracer.fake_mode:
            stages.hand_parts_to(optimizer, ranks)
    with Tracer().tracing():
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.empty_like(p)
        optimizer.step()  # makes its state
    with tracer.fake_mode:
        gradient = torch.empty(sum(p.numel() for p in model.parameters()))
    tracer.part = "reduction" if stage is not None else "optimizer"
    with tracer.tracing():
        if stage is not None:
            stages.reduce(stage, [p for group in groups for p in group], ranks)
        elif ranks > 1:
            dist.all_reduce(gradient)
        tracer.part = "optimizer"
        optimizer.step()
        if stage:
            tracer.part = "weights"
            stages.gather(stage, groups, ranks)


def trace_bare(config: Config, views: int, against: str) -> Tracer:
    """Forward and backward of the same network with torch's batch norm."""
    kept = config.model.model_copy(update={"activation_checkpointing": False})
    model = fake_model(config.model_copy(update={"model": kept}))
    tracer, n = Tracer(), views // config.augment.num_views
    with tracer.fake_mode:
        network = nn.Sequential(model.encoder, model.head)
        for module in network.modules():
            if isinstance(module, GlobalBatchNorm):
                module.__class__ = SyncBatchNorm if against == "sync_bn" else BatchNorm
        shapes = [(n * num_views, 3, side, side) for side, num_views in config.augment.sizes()]
        pixels = [torch.empty(shape).contiguous(memory_format=torch.channels_last) for shape in shapes]
    with tracer.tracing():
        tracer.part = "forward"
        with autocast(config), tracer.keeping(list(network.parameters())):
            z = [network(x) for x in pixels]
        gradients = [torch.empty_like(of_size) for of_size in z]
        tracer.part = "backward"
        torch.autograd.backward(z, gradients)
    return tracer


class BatchNorm(nn.BatchNorm2d):
    """torch's, for the head's (B, C) too."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """The addition and the ReLU as torchvision's blocks do them."""
        y = self.normalise(x)
        if residual is not None:
            y += residual
        return y.relu_() if relu else y

    def normalise(self, x: Tensor) -> Tensor:
        return super().forward(x)


class SyncBatchNorm(BatchNorm):
    """torch's, past its refusal of tensors that are not on a GPU."""

    def normalise(self, x: Tensor) -> Tensor:
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        group = dist.group.WORLD
        return torch.nn.modules._functions.SyncBatchNorm.apply(
            x, self.weight, self.bias, self.running_mean, self.running_var, self.eps, self.momentum, group,
            dist.get_world_size(),
        )  # fmt: skip


def summary(counts: Counts, tracer: Tracer, views: int) -> dict[str, float]:
    figures = {name: getattr(counts, name) for name in COLUMNS}
    return figures | {"kept_bytes_per_view": tracer.kept_bytes / views, "ms": milliseconds(counts)}


def milliseconds(counts: Counts) -> dict[str, float]:
    return {gpu: round(1e3 * counts.seconds[gpu], 2) for gpu in GPUS}


def table(title: str, tracer: Tracer, views: int) -> str:
    head = f"{'':10}{'MB':>9}{'GFLOP':>9}{'launches':>10}{'collectives':>13}{'MB sent':>9}{'host syncs':>12}"
    lines = [f"{title}, {views} views on this rank", head + "".join(f"{gpu + ' ms':>10}" for gpu in GPUS)]
    for part, counts in [*tracer.parts.items(), ("in all", tracer.total)]:
        lines.append(
            f"{part:10}{counts.bytes / 1e6:9.0f}{counts.flops / 1e9:9.0f}{counts.launches:10}{counts.collectives:13}"
            f"{counts.wire_bytes / 1e6:9.1f}{counts.host_syncs:12}"
            + "".join(f"{1e3 * counts.seconds[gpu]:10.2f}" for gpu in GPUS)
        )
    lines.append(f"kept for backward: {tracer.kept_bytes / views / 1e6:.1f} MB a view")
    lines += [f"waits for the device, {why} ({n})" for why, n in tracer.syncs.items()]
    return "\n".join(lines)


def operators(tracer: Tracer, number: int) -> str:
    return "\n".join(
        f"{name:44}{tracer.operators[name]:6}{num_bytes / 1e6:10.0f} MB"
        for name, num_bytes in tracer.operator_bytes.most_common(number)
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument(
        "--stage", type=int, choices=range(4), help="also trace what DeepSpeed does under this ZeRO stage"
    )
    parser.add_argument("--against", choices=["torchvision", "sync_bn"], default="torchvision")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument(
        "--operators", type=int, default=0, metavar="N", help="also list the N that move the most bytes"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    config = config_module.load(options.config, options.set)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=options.ranks)
    step, views = trace_step(config, options.ranks, options.stage)
    bare = trace_bare(config, views, options.against)
    for title, tracer in (("step", step), (f"bare, {options.against}", bare)):
        print(table(title, tracer, views), operators(tracer, options.operators), sep="\n", end="\n\n")
    print("step / bare:", ", ".join(
        f"{name} {getattr(step.total, name) / getattr(bare.total, name):.2f}" for name in ("bytes", "launches", "flops")
    ), *(f"{gpu} {step.total.seconds[gpu] / bare.total.seconds[gpu]:.2f}" for gpu in GPUS), sep=", ")  # fmt: skip
    if options.json:
        figures = {"step": summary(step.total, step, views), "bare": summary(bare.total, bare, views)}
        figures["parts"] = {part: summary(counts, step, views) for part, counts in step.parts.items()}
        options.json.write_text(json.dumps(figures, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
