"""stable-pretraining's SimCLR as its CIFAR-10 benchmark writes it, on Lightning's DDP on more ranks; see `peers`.

Its own: dataset, transforms, sampler, module, forward, loss, trainer. From us: the encoder with torch's batch norm, the
head's widths, and what makes accuracies comparable: optimizer, schedule, temperature, SimCLR's strengths. Its online
probes are left out.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import lightning
import stable_pretraining as spt
import torch
import torchvision
from stable_pretraining import forward
from stable_pretraining.data import transforms
from torch import nn

from tests.benchmarks import peer_lightly as shared

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def view(size: int) -> Any:
    return transforms.Compose(
        transforms.RGB(),
        transforms.RandomResizedCrop((size, size), scale=(shared.MIN_SCALE, 1.0)),
        transforms.RandomHorizontalFlip(p=0.5),
        transforms.ColorJitter(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, p=0.8),
        transforms.RandomGrayscale(p=0.2),
        transforms.PILGaussianBlur(p=0.5),
        transforms.ToImage(mean=MEAN, std=STD),
    )


class Waiting(lightning.Callback):
    """Seconds between the end of a step and the next batch."""

    def __init__(self) -> None:
        self.seconds, self.asked = 0.0, None

    def on_train_epoch_start(self, *_: Any) -> None:
        self.asked = time.monotonic()

    def on_train_batch_start(self, *_: Any) -> None:
        self.seconds += time.monotonic() - (self.asked or time.monotonic())

    def on_train_batch_end(self, *_: Any) -> None:
        self.asked = time.monotonic()


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    size, epochs, ranks = settings["size"], settings["epochs"], settings["ranks"]
    encoder = shared.encoder_of(settings["encoder"], size)
    dataset = spt.data.FromTorchDataset(
        torchvision.datasets.ImageFolder(settings["images"]),
        names=["image", "label"],
        transform=transforms.MultiViewTransform([view(size), view(size)]),
    )
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=settings["batch"],
        shuffle=True,
        drop_last=True,
        num_workers=settings["workers"],
        persistent_workers=True,
    )
    head = nn.Sequential(
        nn.Linear(encoder.output_dim, shared.HIDDEN_DIM, bias=False),
        nn.BatchNorm1d(shared.HIDDEN_DIM),
        nn.ReLU(inplace=True),
        nn.Linear(shared.HIDDEN_DIM, shared.OUTPUT_DIM, bias=False),
        nn.BatchNorm1d(shared.OUTPUT_DIM),
    )
    module = spt.Module(
        backbone=encoder,
        projector=head,
        forward=forward.simclr,
        simclr_loss=spt.losses.NTXEntLoss(temperature=shared.TEMPERATURE),
        optim={
            "optimizer": {
                "type": "AdamW",
                "lr": shared.LEARNING_RATE,
                "betas": (0.9, 0.95),
                "weight_decay": shared.WEIGHT_DECAY,
            },
            "scheduler": {"type": "LinearWarmupCosineAnnealing"},
            "interval": "epoch",
        },
    )
    waiting, out = Waiting(), Path(settings["out"])
    spt.set(cache_dir=str(out / "cache"))
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        callbacks=[waiting],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
        default_root_dir=str(out),
    )
    spt.Manager(trainer=trainer, module=module, data=spt.data.DataModule(train=loader))()
    if trainer.is_global_zero:
        torch.save(encoder.state_dict(), out / "weights.pth")
        (out / "waited.txt").write_text(str(waiting.seconds))


if __name__ == "__main__":
    main()
