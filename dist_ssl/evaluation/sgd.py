"""Protocols that read augmented images again: SimCLR's linear protocol, and fine-tuning of the whole encoder.

Random resized crop and flip only, SGD with Nesterov momentum 0.9, cosine schedule, no warm-up, no weight decay; base
learning rates 0.1 (linear) and 0.05 (fine-tuning), times batch / 256 (Chen et al. 2020, appendices B.5 and B.8).
Fine-tuning works on a copy: the encoder under evaluation stays as it is. With several ranks gradients are summed by
one all-reduce a step and batch norm takes global statistics.

Legend: n training images, B rows of a global batch, C classes, K layers read.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import functional as TF

from dist_ssl import augment, distributed
from dist_ssl import config as configuration
from dist_ssl.augment.parameters import FLIP
from dist_ssl.config import AugmentConfig, UserError, ViewsConfig
from dist_ssl.data import stream
from dist_ssl.data.progress import track
from dist_ssl.evaluation.features import Split
from dist_ssl.evaluation.frozen import Readable

BATCH, MIN_SCALE = 1024, 0.08


@dataclass(frozen=True)
class Images:
    """A few training images in memory (uint8 (n, 3, S, S)), for fine-tuning on few labels."""

    images: Tensor
    labels: Tensor
    sample_ids: Tensor


def read_rows(train: Split, rows: np.ndarray) -> Images:
    """The images of some rows, in memory on every rank: one pass over the split. ImageNet's 1% takes 1.9 GB."""
    images, labels, ids, seen = [], [], [], 0
    for batch in train.batches(0, int(rows.max()) + 1):
        mine = torch.from_numpy(rows[(rows >= seen) & (rows < seen + len(batch.labels))] - seen)
        images.append(batch.images[mine])
        labels.append(batch.labels[mine])
        ids.append(batch.sample_ids[mine])
        seen += len(batch.labels)
    return Images(torch.cat(images), torch.cat(labels), torch.cat(ids))


def train_and_score(
    readable: Readable,
    layers: list[str],
    train: Split,
    test: Split,
    num_classes: int,
    *,
    epochs: int,
    tune_encoder: bool,
    seed: int,
    few: Images | None = None,
) -> dict[str, np.ndarray]:
    """Correct answers (n_test,) of a linear classifier on each of `layers`, all trained in one pass over the images.

    `tune_encoder` trains a copy of the encoder (and head) too, for one layer. Collective.
    """
    if tune_encoder and len(layers) != 1:
        raise ValueError(f"expected one layer to fine-tune from, got {layers}")
    model = Readable(copy.deepcopy(readable.encoder), copy.deepcopy(readable.head), readable.suffix)
    for module in model.modules():
        module.requires_grad_(tune_encoder).train(tune_encoder)
    with torch.no_grad():
        blank = torch.zeros(2, 3, train.image_size, train.image_size, device=train.device)
        probe = Readable(readable.encoder, readable.head, readable.suffix).read(blank)
    if missing := [layer for layer in layers if layer not in probe]:
        raise UserError(f"evaluation.fine_tune_from: expected one of {', '.join(probe)}; got {missing[0]!r}")
    classifiers = nn.ModuleDict({layer: nn.Linear(probe[layer].shape[1], num_classes) for layer in layers})
    for classifier in classifiers.values():
        for parameter in classifier.parameters():
            nn.init.zeros_(parameter)  # every rank starts from the same, without a broadcast
    classifiers.to(train.device)
    parameters = list(classifiers.parameters())
    if tune_encoder:
        parameters += [p for module in model.modules() for p in module.parameters()]
    total = len(few.labels) if few is not None else train.manifest.num_samples
    batch_size = min(BATCH, total)
    steps = max(epochs * total // batch_size, 1)
    peak = (0.05 if tune_encoder else 0.1) * batch_size / 256
    optimizer = torch.optim.SGD(parameters, lr=peak, momentum=0.9, nesterov=True)
    batches = _in_memory(train, few, batch_size, steps, seed) if few else _streamed(train, batch_size, steps, seed)
    for step, (pixels, labels) in enumerate(track(batches, steps, "training on labels", distributed.rank() == 0)):
        for group in optimizer.param_groups:
            group["lr"] = peak * 0.5 * (1 + math.cos(math.pi * step / steps))
        with torch.set_grad_enabled(tune_encoder):
            outputs = model.layers(pixels)
        losses = [F.cross_entropy(classifiers[x](outputs[x]), labels, reduction="sum") for x in layers]
        optimizer.zero_grad()
        (torch.stack(losses).sum() / batch_size).backward()
        _sum_gradients(parameters)
        optimizer.step()
    for module in model.modules():
        module.eval()
    return _score(model, classifiers, layers, test)


def _streamed(train: Split, batch_size: int, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's part of each global batch, through the pretraining's own stream, of one view."""
    config = configuration.with_overrides(
        train.config,
        [
            f"train.global_batch_size={batch_size}",
            f"run.seed={seed}",
            "objective.chunks=1",
            f"data.num_workers={train.config.evaluation.num_workers}",
        ],
    ).model_copy(update={"augment": _crop_and_flip(train)})
    place = {"rank": distributed.rank(), "world_size": distributed.world_size()}
    batches = stream.training_batches(config, train.manifest, cursor=0, first_step=0, num_steps=steps, **place)
    with batches:
        for batch in batches:
            views = augment.augment(batch.crops[0].to(train.device), batch.parameters, config.augment)
            yield views[:, 0], batch.labels.to(train.device)


def _crop_and_flip(train: Split) -> AugmentConfig:
    """One view of each image, which a pretraining's config would refuse."""
    view = ViewsConfig(
        count=1,
        crop_size=train.image_size,
        min_scale=MIN_SCALE,
        max_scale=1.0,
        flip_probability=train.augment.flip_probability,
        jitter_probability=0.0,
        grey_probability=0.0,
        blur_probability=0.0,
        solarise_probability=0.0,
    )
    return train.augment.model_copy(update={"views": [view]})


def _in_memory(train: Split, few: Images, batch_size: int, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of a few images, reshuffled each epoch, cropped and flipped; this rank's part of each."""
    size = train.image_size
    generator = np.random.Generator(np.random.Philox(key=[seed, 0x5D]))
    order = np.empty(0, dtype=np.int64)
    settings = _crop_and_flip(train)
    for step in range(steps):
        while len(order) < batch_size:
            order = np.concatenate([order, generator.permutation(len(few.labels))])
        rows, order = order[:batch_size], order[batch_size:]
        mine = np.array_split(rows, distributed.world_size())[distributed.rank()]
        ids = few.sample_ids[mine].numpy()
        # The step stands for the epoch: an image that comes back is cropped anew.
        drawn, uniforms = stream.draw_views(seed, np.full(len(mine), step), ids, settings)
        crops = []
        for position, row in enumerate(mine):
            side = few.images.shape[-1]
            top, left, height, width = augment.crop_box(uniforms[position, 0], side, side, MIN_SCALE)
            crop = TF.resized_crop(few.images[row], top, left, height, width, [size, size], antialias=True)
            crops.append(crop.flip(2) if drawn[position, 0, FLIP] > 0 else crop)
        pixels = torch.stack(crops) if crops else few.images[:0]
        yield train.pixels(pixels), few.labels[mine].to(train.device)


def _sum_gradients(parameters: list[nn.Parameter]) -> None:
    if distributed.world_size() > 1:
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter)


@torch.inference_mode()
def _score(model: Readable, classifiers: nn.ModuleDict, layers: list[str], test: Split) -> dict[str, np.ndarray]:
    cuts = np.linspace(0, test.manifest.num_samples, distributed.world_size() + 1).astype(int)
    start, stop = cuts[distributed.rank()], cuts[distributed.rank() + 1]
    hits: dict[str, list[Tensor]] = {layer: [torch.zeros(0, dtype=torch.int64)] for layer in layers}
    for batch in test.batches(int(start), int(stop)):
        outputs = model.read(test.pixels(batch.images))
        for layer in layers:
            predicted = classifiers[layer](outputs[layer]).argmax(1).cpu()
            hits[layer].append((predicted == batch.labels).long())
    sizes = np.diff(cuts).tolist()
    gathered = {}
    for layer in layers:
        mine = torch.cat(hits[layer]).to(test.device)
        gathered[layer] = distributed.gather_rows(mine, sizes).cpu().numpy().astype(bool)
    return gathered
