"""One step's computation on this rank: augment, encoder, head, loss over all ranks' z, backward.

Legend: n images of this rank, V views of each, V_s of one size, S its side, D width of h, d width of z.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from dist_ssl.augment import augment
from dist_ssl.config import Config
from dist_ssl.data.random import key_of
from dist_ssl.data.stream import Batch
from dist_ssl.distributed import rank, sum_over_ranks, world_size
from dist_ssl.engine import Engine
from dist_ssl.models import Rows, frozen_running_statistics, slices_of
from dist_ssl.training.method import loss_of
from dist_ssl.training.pace import Pace
from dist_ssl.training.teacher import Teacher


@dataclass(frozen=True)
class StepResult:
    """This rank's part of a step, detached: loss (scalar), h (n, V, D), z, p and target (n, V, d), as in `method`."""

    loss: Tensor
    h: Tensor
    z: Tensor
    p: Tensor
    target: Tensor


class Step:
    """Computes losses and gradients; knows nothing of time, files or what comes next."""

    def __init__(self, config: Config, model: Engine, rows_per_chunk: list[list[int]], teacher: Teacher | None = None):
        self._config, self._model, self._teacher = config, model, teacher
        self._rows_per_chunk = rows_per_chunk
        self._num_views = config.augment.num_views
        self._rows_per_rank = [sum(rows) for rows in zip(*rows_per_chunk, strict=True)]
        self.pace = Pace(
            next(model.model.parameters()).device,
            2 * config.objective.chunks if config.objective.chunks > 1 else 1,
        )
        models = [model.model, *([teacher.model] if teacher is not None else [])]
        self._buffers = BufferSnapshot(nn.ModuleList(models))
        self._sliced = config.batch_norm_slices > 1
        if self._sliced:
            slices = slices_of(config.batch_norm_slices)
            for each in models:
                each.normalise_in(slices)

    def __call__(self, batch: Batch, step: int) -> StepResult:
        """Forward and backward of one global batch, the run's step after `step` completed ones. Collective."""
        self._buffers.take()
        if self._config.objective.chunks > 1:
            return self._in_chunks(batch, step)
        views = self._views(batch, slice(None))
        h, z, p = self._student(views, step)
        target = z.detach() if self._teacher is None else self._by_image(self._teacher(*views))
        loss = loss_of(self._config, p, target, batch, self._rows_per_rank, step)
        self._model.backward(loss)
        return StepResult(loss.detach(), h.detach(), z.detach(), p.detach(), target)

    def settle(self, applied: Tensor, progress: float) -> None:
        """After the optimizer's step, by a flag on the device: the teacher follows, or all statistics are put back.

        progress: the share of the run's steps that were taken before this one.
        Collective where batch norm's statistics are those of slices: one all-reduce of the running ones.
        """
        if self._sliced:
            self._buffers.average()
        self._buffers.put_back_unless(applied)
        if self._teacher is not None:
            self._teacher.follow(self._model.model, applied, progress)

    def _in_chunks(self, batch: Batch, step: int) -> StepResult:
        """GradCache (Gao et al. 2021): all p without graph, dL/dp exactly, then chunk by chunk with that gradient.

        Chunk j is a slice of the global batch, the same on any number of ranks, and so are its batch-norm statistics.
        Its views are made anew in the second pass: those of all chunks would be the most that a GPU holds.
        """
        outputs, targets = [], []
        with torch.no_grad():
            for number, images in self._chunks():
                views = self._views(batch, images)
                with frozen_running_statistics():
                    outputs.append(self._student(views, step, number))
                if self._teacher is not None:
                    targets.append(self._by_image(self._teacher(*views)))
        h, z, p = (torch.cat(parts) for parts in zip(*outputs, strict=True))
        target, leaf = torch.cat(targets) if targets else z, p.detach().requires_grad_()
        loss = loss_of(self._config, leaf, target, batch, self._rows_per_rank, step)
        (gradient,) = torch.autograd.grad(loss, leaf)
        for number, images in self._chunks():  # the same seed, so the same dropout as in the first pass
            p_of_chunk = self._student(self._views(batch, images), step, number)[2]
            self._model.backward((p_of_chunk * gradient[images]).sum())
        return StepResult(loss.detach(), h, z, p, target)

    def _chunks(self) -> Iterator[tuple[int, slice]]:
        """(its number, this rank's images) of each chunk."""
        edges = accumulate((rows[rank()] for rows in self._rows_per_chunk), initial=0)
        yield from enumerate(slice(first, stop) for first, stop in pairwise(edges))

    def _views(self, batch: Batch, images: slice) -> list[Tensor]:
        """The views of some images, made here and kept nowhere else: (n V_s, 3, S, S) a size."""
        # In the format and dtype that the first convolution reads; on a GPU they are written so.
        dtype = torch.bfloat16 if self._config.engine.precision == "bf16" else torch.float32
        with self.pace.own():
            views = (augment(*of_size, self._config.augment, dtype) for of_size in batch.of_each_size(images))
            return [x.flatten(0, 1).contiguous(memory_format=torch.channels_last) for x in views]

    def _student(self, views: list[Tensor], step: int, chunk: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """h (n, V, D), z and p (n, V, d), of a chunk of the step's batch."""
        of_chunk, rows = (self._config.run.seed, step, chunk), self._rows_per_chunk[chunk]
        torch.manual_seed(dropping_seed(*of_chunk, rank()))  # dropout differs between ranks, and so numbers of them
        self._model.model.of(Rows(dropping_seed(*of_chunk), sum(rows[: rank()]), rows[rank()], sum(rows)))
        h, z, p = self._model(*views)
        return self._by_image(h), self._by_image(z), self._by_image(p)

    def _by_image(self, rows: Tensor) -> Tensor:
        """(n V, ...) -> (n, V, ...)"""
        return rows.unflatten(0, (-1, self._num_views))


def dropping_seed(*counter: int) -> int:
    """A seed of 63 bits for (the run's seed, step, chunk), and a rank: what a step drops needs no generator's state."""
    return key_of("drop", *counter)[0] >> 1


class BufferSnapshot:
    """A model's buffers as they were before a step: where it is thrown away, batch norm's have been poisoned by then.

    All buffers of a dtype become views of one tensor, so that taking and putting back are a launch each.
    """

    def __init__(self, model: nn.Module):
        places: dict[torch.dtype, list[tuple[nn.Module, str, Tensor]]] = {}
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    places.setdefault(buffer.dtype, []).append((module, name, buffer))
        self._buffers = []
        for held in places.values():
            flat = torch.cat([buffer.reshape(-1) for _, _, buffer in held])
            parts = flat.split([buffer.numel() for _, _, buffer in held])
            for (module, name, buffer), part in zip(held, parts, strict=True):
                module._buffers[name] = part.view(buffer.shape)
            self._buffers.append(flat)
        self._saved = [flat.clone() for flat in self._buffers]

    def take(self) -> None:
        for saved, flat in zip(self._saved, self._buffers, strict=True):
            saved.copy_(flat)

    def average(self) -> None:
        """Let what moved since `take` be the mean over ranks; what did not move keeps its bits. Collective."""
        for saved, flat in zip(self._saved, self._buffers, strict=True):
            if flat.is_floating_point():
                torch.add(saved, sum_over_ranks(flat - saved), alpha=1 / world_size(), out=flat)

    def put_back_unless(self, keep: Tensor) -> None:
        """`keep` is a bool scalar on the device, which the host does not read."""
        for saved, flat in zip(self._saved, self._buffers, strict=True):
            torch.where(keep, flat, saved, out=flat)
