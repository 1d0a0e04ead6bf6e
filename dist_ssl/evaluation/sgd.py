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
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from dist_ssl import augment, distributed
from dist_ssl.config import AugmentConfig, UserError, ViewsConfig
from dist_ssl.data import stream
from dist_ssl.data.progress import track
from dist_ssl.evaluation.features import Split, in_batches_of, layer_dims
from dist_ssl.evaluation.frozen import Readable

BATCH, MIN_SCALE = 1024, 0.08

Classifiers = Mapping[str, nn.Module]  # of a layer's output each


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
) -> dict[str, np.ndarray]:
    """Correct answers (n_test,) of a linear classifier on each of `layers`, all trained in one pass over the images.

    `tune_encoder` trains a copy of the encoder (and head) too, for one layer. Collective.
    """
    if tune_encoder and len(layers) != 1:
        raise ValueError(f"expected one layer to fine-tune from, got {layers}")
    widths = layer_dims(train, [readable])
    check_layer(layers[0], widths)
    model = copy_of(readable)
    for module in model.modules():
        module.requires_grad_(tune_encoder).train(tune_encoder)
    # All zero: every rank starts from the same, without a broadcast.
    classifiers = {layer: nn.Linear(widths[layer], num_classes).to(train.device) for layer in layers}
    for parameter in trainable(Readable(nn.Identity()), classifiers):
        nn.init.zeros_(parameter)
    total = train.manifest.num_samples
    batch_size = min(BATCH, total)
    steps = max(epochs * total // batch_size, 1)
    peak = (0.05 if tune_encoder else 0.1) * batch_size / 256
    optimizer = torch.optim.SGD(trainable(model, classifiers), lr=peak, momentum=0.9, nesterov=True)
    learn(model, classifiers, optimizer, _streamed(train, batch_size, steps, seed), steps, batch_size)
    return score(model, classifiers, test)


def check_layer(layer: str, widths: Iterable[str]) -> None:
    if layer not in widths:
        raise UserError(f"evaluation.fine_tune_from: expected one of {', '.join(widths)}; got {layer!r}")


def copy_of(readable: Readable) -> Readable:
    return Readable(copy.deepcopy(readable.encoder), copy.deepcopy(readable.head), readable.suffix)


def trainable(model: Readable, classifiers: Classifiers) -> list[nn.Parameter]:
    """What `learn` changes: the classifiers, and what of the model requires a gradient."""
    tuned = [p for module in model.modules() for p in module.parameters() if p.requires_grad]
    return [p for classifier in classifiers.values() for p in classifier.parameters()] + tuned


def learn(
    model: Readable,
    classifiers: Classifiers,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[tuple[Tensor, Tensor]],
    steps: int,
    batch_size: int,
) -> None:
    """Trains classifiers, and what of the model requires a gradient, in place, on this rank's parts of `batches`.

    From the optimizer's rate down to 0 by a cosine. Batch norm's mode stays as it is, and ends as eval. Collective.
    """
    parameters, peak = trainable(model, classifiers), optimizer.defaults["lr"]
    tuning = any(p.requires_grad for module in model.modules() for p in module.parameters())
    for step, (pixels, labels) in enumerate(track(batches, steps, "training on labels", distributed.rank() == 0)):
        for group in optimizer.param_groups:
            group["lr"] = peak * 0.5 * (1 + math.cos(math.pi * step / steps))
        with torch.set_grad_enabled(tuning):
            outputs = model.layers(pixels)
        losses = [F.cross_entropy(one(outputs[layer]), labels, reduction="sum") for layer, one in classifiers.items()]
        optimizer.zero_grad()
        (torch.stack(losses).sum() / batch_size).backward()
        _sum_gradients(parameters)
        optimizer.step()
    for module in model.modules():
        module.eval()


def _streamed(train: Split, batch_size: int, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's part of each global batch, through the pretraining's own stream, of one view."""
    run = train.config.run.model_copy(update={"seed": seed})
    config = in_batches_of(batch_size, train.config, train.config.evaluation.num_workers).model_copy(
        update={"augment": _crop_and_flip(train), "run": run}
    )
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


def _sum_gradients(parameters: list[nn.Parameter]) -> None:
    if distributed.world_size() > 1:
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter)


@torch.inference_mode()
def score(model: Readable, classifiers: Classifiers, test: Split) -> dict[str, np.ndarray]:
    """Correct answers (n_test,) of each classifier. Collective: ranks share the images."""
    cuts = np.linspace(0, test.manifest.num_samples, distributed.world_size() + 1).astype(int)
    start, stop = cuts[distributed.rank()], cuts[distributed.rank() + 1]
    hits: dict[str, list[Tensor]] = {layer: [torch.zeros(0, dtype=torch.int64)] for layer in classifiers}
    for batch in test.batches(int(start), int(stop)):
        outputs = model.read(test.pixels(batch.images))
        for layer, classifier in classifiers.items():
            predicted = classifier(outputs[layer]).argmax(1).cpu()
            hits[layer].append((predicted == batch.labels).long())
    sizes = np.diff(cuts).tolist()
    return {
        layer: distributed.gather_rows(torch.cat(mine).to(test.device), sizes).cpu().numpy().astype(bool)
        for layer, mine in hits.items()
    }
