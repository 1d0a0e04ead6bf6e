"""What the tests of partition, optimizers and checkpoints run on each rank: an engine fed fixed gradients."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from torch import Tensor

from dist_ssl import checkpoint, distributed, engine
from dist_ssl import config as config_module
from dist_ssl.checkpoint import Checkpointer, RunState, take_incarnation
from dist_ssl.config import Config
from dist_ssl.engine import engine as engine_module
from dist_ssl.models import build_model
from dist_ssl.training import verdict
from tests.counting import Count
from tests.trajectory import messages

LARS_RATE = 1.0  # a layer moves by 1e-3 of its norm in a step: a trust ratio that is 1% off is seen after a few


def build(config: Config) -> engine.Engine:
    return engine.initialize(build_model(config), config, distributed.initialize())


def gradients(model: torch.nn.Module, step: int) -> dict[str, Tensor]:
    """One fixed sequence of gradients, the same on all ranks."""
    generator = torch.Generator().manual_seed(1000 + step)
    return {name: torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}


def take_steps(model: engine.Engine, shapes: torch.nn.Module, steps: range, rate: float = 0.01) -> None:
    """Steps on the fixed gradients: a loss whose gradient with respect to each parameter is the given tensor."""
    images = torch.zeros(2, 3, 32, 32)
    given = {}

    def replace(*arguments: Any, **keywords: Any) -> Any:
        # DeepSpeed has reduced the real gradients, which are zero here; the optimizer gets ours in its own layout.
        for f in model.fragments:
            if f.flat.grad is not None:
                whole = given[f.name].view(-1)[f.offset : f.offset + f.length]
                f.of(f.flat.grad).copy_(whole)
        return apply(*arguments, **keywords)

    apply, model._apply = model._apply, replace
    for step in steps:
        given.update(gradients(shapes, step))
        h, z, _ = model(images)
        loss = 0.0 * (h.sum() + z.sum())
        model.backward(loss)
        model.step(rate, verdict.agree(loss.detach(), verdict.Asked()))
    model._apply = apply


def held(model: engine.Engine) -> dict[tuple[str, str, int], Tensor]:
    """(name, kind, offset) -> this rank's elements."""
    found = {}
    for f in model.fragments:
        found[f.name, "master", f.offset] = f.of(f.flat).clone()
        for key, value in model.optimizer.state.get(f.flat, {}).items():
            if value.dim():
                found[f.name, key, f.offset] = f.of(value).clone()
    return found


def assembled(parts: list[dict[tuple[str, str, int], Tensor]]) -> dict[tuple[str, str], Tensor]:
    """What all ranks hold, as whole flat tensors."""
    whole: dict[tuple[str, str], dict[int, Tensor]] = {}
    for part in parts:
        for (name, kind, offset), values in part.items():
            whole.setdefault((name, kind), {})[offset] = values
    return {key: torch.cat([pieces[offset] for offset in sorted(pieces)]) for key, pieces in whole.items()}


def initial_and_stepped(config: Config, steps: int) -> tuple[bool, dict[tuple[str, str, int], Tensor]]:
    """Whether this rank's fragments hold the untrained model's values; and what it holds after some steps."""
    expected = {name: p.detach().clone() for name, p in build_model(config).named_parameters()}
    model = build(config)
    initial = all(
        torch.equal(f.of(f.flat), expected[f.name].view(-1)[f.offset : f.offset + f.length]) for f in model.fragments
    )
    take_steps(model, build_model(config), range(steps), LARS_RATE)
    return initial, held(model)


def save_after(config: Config, steps: int, more: int = 0, **options: Any) -> tuple[Any, Any]:
    """Take steps, save as the next incarnation; return what this rank held then, and after some more steps."""
    model, shapes = build(config), build_model(config)
    take_steps(model, shapes, range(steps))
    save(config, model, steps, **options)
    saved = held(model)
    take_steps(model, shapes, range(steps, steps + more))
    return saved, held(model)


def save(config: Config, model: engine.Engine, steps: int, last_step: int | None = None) -> None:
    """Commit as the next incarnation, which went on from `last_step`, or from whatever is there."""
    incarnation = distributed.broadcast_object(take_incarnation(config.run.dir) if distributed.rank() == 0 else None)
    store, last_step = checkpoint.checkpoint_store(config), steps if last_step is None else last_step
    checkpointer = Checkpointer(store, config.run.dir, config.checkpoint, model, incarnation, last_step=last_step)
    state = RunState(steps, steps * 4, config_module.dumps(config), "data")
    checkpointer.save(state, dict(model.model.named_buffers()))
    checkpointer.wait()
    assert checkpointer.seconds_to_save() > 0


def warnings_of_commits(config: Config, steps: list[int]) -> list[str]:
    """What one incarnation, which went on from step 0, warns of while it commits these."""
    model, store = build(config), checkpoint.checkpoint_store(config)
    incarnation = distributed.broadcast_object(take_incarnation(config.run.dir) if distributed.rank() == 0 else None)
    checkpointer = Checkpointer(store, config.run.dir, config.checkpoint, model, incarnation, last_step=0)
    with messages() as said:
        for step in steps:
            checkpointer.save(RunState(step, step * 4, config_module.dumps(config), "data"), {})
            checkpointer.wait()
    return said


def go_on_and_save(config: Config, steps: int) -> int:
    """Commit what the newest valid checkpoint holds as another step; returns the one it was."""
    model = build(config)
    found = checkpoint.newest_valid(checkpoint.checkpoint_store(config))
    assert found is not None
    checkpoint.load(found, model)
    save(config, model, steps, last_step=found.step)
    return found.step


def refusal(config: Config, kind: str, value: float, poisoned_rank: int) -> str:
    """What saving after a step raises where one rank holds a value that is not finite, in the last element."""
    model = build(config)
    take_steps(model, build_model(config), range(1))
    if distributed.rank() == poisoned_rank:
        f = model.fragments[-1]
        state = {"buffer": next(b for b in model.model.buffers() if b.is_floating_point()), "master": f.of(f.flat)}
        state |= {name: f.of(tensor) for name, tensor in model.optimizer.state[f.flat].items() if tensor.dim()}
        state[kind].view(-1)[-1] = value
    try:
        save(config, model, 4, last_step=2)
    except checkpoint.NotFiniteCheckpoint as error:
        return str(error)
    return "nothing was raised"


def synced_and_renamed(config: Config, steps: int) -> list[tuple[str, str]]:
    """What was asked of the kernel during a save: ("fsync", path) and ("rename", the new path), in order."""
    calls: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        temporary = path.with_name(path.name[1:].rpartition(".")[0]) if path.name.startswith(".") else None
        calls.append(("fsync", f"temporary of {temporary}" if temporary else str(path)))
        fsync(descriptor)

    def recorded_replace(source: str, target: str | Path) -> None:
        calls.append(("rename", os.path.realpath(target)))
        replace(source, target)

    os.fsync, os.replace = recorded_fsync, recorded_replace
    try:
        save_after(config, steps)
    finally:
        os.fsync, os.replace = fsync, replace
    return calls


def save_error(config: Config, steps: int) -> str:
    """What `save_after` raised on this rank, as all must."""
    try:
        save_after(config, steps)
    except OSError as error:
        return str(error)
    return "nothing was raised"


def sent_for_a_commit(config: Config) -> list[tuple[str, int]]:
    """The collectives of a commit on this rank, (name, bytes given), by the writer's thread's own function."""
    model = build(config)
    take_steps(model, build_model(config), range(1))
    store = checkpoint.checkpoint_store(config)
    incarnation = distributed.broadcast_object(take_incarnation(config.run.dir) if distributed.rank() == 0 else None)
    checkpointer = Checkpointer(store, config.run.dir, config.checkpoint, model, incarnation)
    checkpointer.save(RunState(1, 4, config_module.dumps(config), "data"), dict(model.model.named_buffers()))
    checkpointer.wait()
    with Count() as count:
        checkpointer._write(RunState(2, 8, config_module.dumps(config), "data"), checkpointer._held()[1])
    checkpointer.wait()
    return count.collectives


def load_and_step(config: Config, start: int, more: int) -> tuple[Any, Any]:
    """Load the newest checkpoint; return what is held right after, and after some more steps."""
    model = build(config)
    found = checkpoint.newest_valid(checkpoint.checkpoint_store(config))
    assert found is not None
    state = checkpoint.load(found, model)
    assert (state.step, state.cursor) == (start, start * 4)
    loaded = held(model)
    take_steps(model, build_model(config), range(start, start + more))
    return loaded, held(model)


def saved_and_loaded_with_a_lone_number(config: Config) -> tuple[Any, Any]:
    """What is held of a parameter without dimensions, as timm's NFNets have them, at a save and after its load."""

    def started() -> tuple[engine.Engine, torch.nn.Module]:
        model = build_model(config)
        model.gain = torch.nn.Parameter(torch.tensor(0.5))
        model.encoder.register_forward_hook(lambda module, inputs, h: h * model.gain)
        shapes = copy.deepcopy(model)
        return engine.initialize(model, config, distributed.initialize()), shapes

    def lone(model: engine.Engine) -> Any:
        held = {}
        for f in model.fragments:
            if f.name == "gain":
                held = {
                    key: (value if key == "step" else f.of(value)).item()
                    for key, value in model.optimizer.state[f.flat].items()
                }
                held["master"] = f.of(f.flat).item()
        return held

    model, shapes = started()
    take_steps(model, shapes, range(2))
    save(config, model, 2)
    other, _ = started()
    found = checkpoint.newest_valid(checkpoint.checkpoint_store(config))
    assert found is not None
    checkpoint.load(found, other)
    return lone(model), lone(other)


def naive_lars(config: Config, steps: int) -> dict[str, Tensor]:
    """LARS by a loop over layers in one process, on the same gradients."""
    optimizer = config.optimizer
    model = build_model(config)
    momenta = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    with torch.no_grad():
        for step in range(steps):
            for name, gradient in gradients(model, step).items():
                p = dict(model.named_parameters())[name]
                update = gradient
                if p.ndim > 1:
                    update = gradient + optimizer.weight_decay * p
                    trust = optimizer.trust_coefficient * p.double().norm() / update.double().norm()
                    update = update * trust.float()
                momenta[name] = optimizer.momentum * momenta[name] + LARS_RATE * update
                p -= momenta[name]
    return {name: p.detach().view(-1) for name, p in model.named_parameters()}


def newest_step(config: Config) -> tuple[int | str, list[str]]:
    """The step of the newest valid checkpoint, or the error; and what was warned of."""
    with messages() as said:
        try:
            found = checkpoint.newest_valid(checkpoint.checkpoint_store(config))
        except ValueError as error:
            return str(error), said
    return -1 if found is None else int(found.manifest["step"]), said


def full_state(config: Config, step: int) -> dict[str, Tensor]:
    return checkpoint.read_model_state(checkpoint.open_checkpoint(checkpoint.checkpoint_store(config), step))


def step_directories(config: Config) -> list[str]:
    return sorted(path.name for path in Path(config.run.dir, "checkpoints").iterdir())


def poisoned_steps(config: Config, poison: str) -> dict[str, Any]:
    """Two good steps with one between them whose gradient, with a finite loss, is `poison` on the last rank only.

    Returns what is held after the first and the second step, whether each was applied, and what is held at the end.
    """
    model, device = build(config), distributed.initialize().device
    generator = torch.Generator().manual_seed(distributed.rank())
    answers: dict[str, Any] = {"applied": [], "losses": []}
    for bad in (False, True, False):
        h, z, _ = model(torch.randn(4, 3, 32, 32, generator=generator).to(device))
        if bad and distributed.rank() == distributed.world_size() - 1:
            z.register_hook(lambda gradient: gradient * float(poison))
        loss = (h.square().mean() + z.square().mean()).float()
        model.backward(loss)
        outcome = verdict.read(model.step(0.01, verdict.agree(loss.detach(), verdict.Asked())))
        answers["applied"].append(outcome.finite)
        answers["losses"].append(outcome.loss)
        answers[f"after {len(answers['applied'])}"] = held(model)
    return answers


def overlapped(function: Callable[..., Any], *arguments: Any) -> Any:
    """Run it with engines that reduce while backward still runs, as on GPUs, in as many buckets as there can be."""
    real = engine.initialize

    def initialize(*given: Any) -> engine.Engine:
        with distributed.as_on_gpu():
            return real(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "initialize", initialize)
        patch.setattr(engine_module, "OVERLAPPED_BUCKET", 1)  # as large as the largest parameter then
        return function(*arguments)


def reduced_before_the_first_layer(config: Config) -> float:
    """The share of the gradient that ranks have added up when backward comes to the first layer's."""
    model, total, reduced = build(config), 0, []
    parameters = dict(model.model.named_parameters())
    large = 4 * max(p.numel() for p in parameters.values()) // 2  # bytes; batch norm's messages are small
    total = sum(4 * p.numel() for p in parameters.values())
    with Count() as count:
        next(iter(parameters.values())).register_hook(
            lambda _: reduced.append(sum(n for name, n in count.collectives if name == "allreduce" and n >= large))
        )
        h, z, _ = model(torch.randn(4, 3, 32, 32))
        model.backward(h.square().mean() + z.square().mean())
    return reduced[0] / total


def waits_of_the_epilogue(config: Config) -> list[str]:
    """Who waits for whom after an overlapped backward, on an accelerator with streams that do nothing."""
    optimizer, said = build(config)._engine.optimizer, list[str]()

    class Stream:
        def __init__(self, name: str):
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            said.append(f"{self.name} waits for {other.name}")

    accelerator = type(deepspeed.accelerator.get_accelerator())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accelerator, "resolves_data_dependency", lambda self: False)
        patch.setattr(accelerator, "current_stream", lambda self, index=None: Stream("backward"))
        patch.setattr(accelerator, "synchronize", lambda self, index=None: said.append("the host waits"))
        optimizer.reduction_stream = Stream("reduction")
        optimizer.setup_buckets()
        optimizer.independent_gradient_partition_epilogue()
    return said
