"""lightly's SimCLR as its documentation writes it, with DistributedDataParallel on more than one rank; see `peers`.

Its own: dataset, transform, head, loss, the order of the loop. From us: the encoder, with torch's batch norm in it, and
optimizer, schedule and temperature, so that accuracies can be compared. With `seconds` in the settings instead of
`epochs` it ends so long after `started`, and the schedule goes by the clock.
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torchvision
from PIL import Image
from torch import nn

from dist_ssl.data import idx
from dist_ssl.models import GlobalBatchNorm, build_encoder
from dist_ssl.models.resnet import BasicBlock, ResNet

HIDDEN_DIM, OUTPUT_DIM, TEMPERATURE, LEARNING_RATE, WEIGHT_DECAY, MIN_SCALE = 256, 64, 0.2, 0.002, 1e-4, 0.3


class Idx(torch.utils.data.Dataset[Any]):
    """The images of an IDX file, as torchvision's MNIST hands them out; without labels. lightly sets `transform`."""

    def __init__(self, path: str):
        self.images, self.transform = idx.read(path, 3), lambda image: image

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: int) -> tuple[Any, int]:
        return self.transform(Image.fromarray(self.images[item]).convert("RGB")), 0


class BatchNorm(nn.BatchNorm2d):
    def _check_input_dim(self, input: torch.Tensor) -> None:
        pass


def encoder_of(name: str, size: int) -> Any:
    """Ours by name, with the forward of torchvision's blocks and torch's batch norm: what a peer's user would build."""
    torch.manual_seed(0)
    encoder = build_encoder(name, size)
    for module in encoder.modules():
        if isinstance(module, GlobalBatchNorm):
            module.__class__ = BatchNorm
        elif isinstance(module, BasicBlock):
            module.__class__ = torchvision.models.resnet.BasicBlock
        elif isinstance(module, ResNet):
            module.__class__ = torchvision.models.ResNet
    return encoder


def rate(gone: float, warmup: float, step: float = 0.0) -> float:
    """Our schedule: a linear rise, then half a cosine, of the largest. Arguments are parts of the whole run."""
    if gone < warmup:
        return (gone + step) / warmup
    return 0.5 * (1 + math.cos(math.pi * (gone - warmup) / max(1e-9, 1 - warmup)))


class SimCLR(nn.Module):
    def __init__(self, backbone: Any):
        from lightly.models.modules import SimCLRProjectionHead

        super().__init__()
        self.backbone = backbone
        self.projection_head = SimCLRProjectionHead(backbone.output_dim, HIDDEN_DIM, OUTPUT_DIM)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.projection_head(self.backbone(x).flatten(start_dim=1))


def main() -> None:
    from lightly.data import LightlyDataset
    from lightly.loss import NTXentLoss
    from lightly.transforms import SimCLRTransform

    settings = json.loads(Path(sys.argv[1]).read_text())
    ranks, epochs, seconds = settings["ranks"], settings.get("epochs"), settings.get("seconds")
    model: Any = SimCLR(encoder_of(settings["encoder"], settings["size"]))
    backbone = model.backbone
    if ranks > 1:
        dist.init_process_group("gloo")
        model = nn.parallel.DistributedDataParallel(model)
    transform = SimCLRTransform(input_size=settings["size"], min_scale=MIN_SCALE)
    if seconds:
        dataset = LightlyDataset.from_torch_dataset(Idx(settings["images"]), transform=transform)
    else:
        dataset = LightlyDataset(settings["images"], transform=transform)
    sampler = torch.utils.data.DistributedSampler(dataset) if ranks > 1 else None
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=settings["batch"],
        shuffle=sampler is None,
        sampler=sampler,
        drop_last=True,
        num_workers=settings["workers"],
        persistent_workers=True,
    )
    decay = settings.get("weight_decay", WEIGHT_DECAY)
    criterion = NTXentLoss(temperature=settings.get("temperature", TEMPERATURE), gather_distributed=ranks > 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=decay)
    waited, step, begun, gone = 0.0, 0, time.time(), 0.0
    warmup, of_a_step = (0.05, 0.0) if seconds else (1 / epochs, 1 / (epochs * len(loader)))
    for epoch in range(epochs or sys.maxsize):
        if gone >= 1:
            break
        if sampler is not None:
            sampler.set_epoch(epoch)
        asked = time.monotonic()
        for views, _, _ in loader:
            waited += time.monotonic() - asked
            if seconds:
                gone = (time.time() - begun) / (settings["started"] + seconds - begun)
                if ranks > 1:  # rank 0's clock
                    dist.broadcast(clock := torch.tensor(gone), 0)
                    gone = float(clock)
                if gone >= 1:
                    break
            else:
                gone = step * of_a_step
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * rate(gone, warmup, of_a_step)
            x0, x1 = views
            loss = criterion(model(x0), model(x1))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step, asked = step + 1, time.monotonic()
    if ranks == 1 or dist.get_rank() == 0:
        torch.save(backbone.state_dict(), Path(settings["out"]) / "weights.pth")
        (Path(settings["out"]) / "waited.txt").write_text(str(waited))
        (Path(settings["out"]) / "images.txt").write_text(str(step * settings["batch"] * ranks))
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
