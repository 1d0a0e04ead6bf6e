"""One step's computation on this rank: augment, encoder, head, contrast with all ranks' z, backward.

Legend: n images of this rank, V views of each, V_s of one size, S its side, D width of h, d width of z.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from dist_ssl import objective
from dist_ssl.augment import augment
from dist_ssl.config import Config
from dist_ssl.data.stream import Batch
from dist_ssl.distributed import rank
from dist_ssl.engine import Engine
from dist_ssl.models import frozen_running_statistics


@dataclass(frozen=True)
class StepResult:
    """This rank's part of a step, detached: loss (scalar), h (n, V, D), z (n, V, d)."""

    loss: Tensor
    h: Tensor
    z: Tensor


class Step:
    """Computes losses and gradients; knows nothing of time, files or what comes next."""

    def __init__(self, config: Config, model: Engine, rows_per_chunk: list[list[int]]):
        self._config, self._model = config, model
        self._images_per_chunk = [rows[rank()] for rows in rows_per_chunk]
        self._num_views = config.augment.num_views
        self._rows_per_rank = [sum(rows) for rows in zip(*rows_per_chunk, strict=True)]
        self._buffers = BufferSnapshot(model.model)

    def __call__(self, batch: Batch, seed: int) -> StepResult:
        """Forward and backward of one global batch; `seed` is of this step and rank, for dropout. Collective."""
        self._buffers.take()
        if self._config.objective.chunks > 1:
            return self._in_chunks(batch, seed)
        h, z = self._forward(batch, slice(None), seed)
        loss = self._contrast(z, batch)
        self._model.backward(loss)
        return StepResult(loss.detach(), h.detach(), z.detach())

    def _forward(self, batch: Batch, images: slice, seed: int) -> tuple[Tensor, Tensor]:
        """h (n, V, D) and z (n, V, d) of some images, whose views are made here and not kept."""
        # In the format and dtype that the first convolution reads; on a GPU they are written so.
        dtype = torch.bfloat16 if self._config.engine.precision == "bf16" else torch.float32
        views = (augment(*of_size, self._config.augment, dtype) for of_size in batch.of_each_size(images))
        flat = [x.flatten(0, 1).contiguous(memory_format=torch.channels_last) for x in views]  # (n V_s, 3, S, S) each
        torch.manual_seed(seed)
        h, z = self._model(*flat)
        return h.unflatten(0, (-1, self._num_views)), z.unflatten(0, (-1, self._num_views))

    def settle(self, applied: Tensor) -> None:
        """Put batch norm's statistics back where the step was not applied, by a flag on the device."""
        self._buffers.put_back_unless(applied)

    def _in_chunks(self, batch: Batch, seed: int) -> StepResult:
        """GradCache (Gao et al. 2021): all z without graph, dL/dz exactly, then chunk by chunk with that gradient.

        Chunk j is a slice of the global batch, the same on any number of ranks, and so are its batch-norm statistics.
        Its views are made anew in the second pass: those of all chunks would be the most that a GPU holds.
        """
        edges = accumulate(self._images_per_chunk, initial=0)
        chunks = [(slice(*pair), seed + number) for number, pair in enumerate(pairwise(edges))]
        h_parts, z_parts = [], []
        with torch.no_grad(), frozen_running_statistics():
            for images, seed_of_chunk in chunks:
                h, z = self._forward(batch, images, seed_of_chunk)
                h_parts.append(h)
                z_parts.append(z)
        leaf = torch.cat(z_parts).requires_grad_()
        loss = self._contrast(leaf, batch)
        (gradient,) = torch.autograd.grad(loss, leaf)
        for images, seed_of_chunk in chunks:  # the same seed, so the same dropout as in the first pass
            _, z = self._forward(batch, images, seed_of_chunk)
            self._model.backward((z * gradient[images]).sum())
        return StepResult(loss.detach(), torch.cat(h_parts), leaf.detach())

    def _contrast(self, z: Tensor, batch: Batch) -> Tensor:
        temperature, rows, ids = self._config.objective.temperature, self._rows_per_rank, batch.sample_ids
        match self._config.objective.name:
            case "nt_xent":
                return objective.nt_xent_views(z, temperature, rows_per_rank=rows, sample_ids=ids)
            case "decoupled":
                return objective.decoupled_views(z, temperature, rows_per_rank=rows, sample_ids=ids)
            case "supervised":
                return objective.supervised_views(z, temperature, batch.labels, rows_per_rank=rows, sample_ids=ids)


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

    def put_back_unless(self, keep: Tensor) -> None:
        """`keep` is a bool scalar on the device, which the host does not read."""
        for saved, flat in zip(self._saved, self._buffers, strict=True):
            torch.where(keep, flat, saved, out=flat)
