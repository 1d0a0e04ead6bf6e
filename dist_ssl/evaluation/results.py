"""The results of an evaluation: their format, writing them, and the table that the command prints.

results.json (format 1):

    checkpoint        the checkpoint's folder, or the file of weights;  step: its step, null for a file of weights
    encoder           name;  head: its config, null for a file of weights
    encoder_digest    {"before", "after"}: SHA-256 of encoder and head; equal, or there would be no file
    layers            the layers read, in depth order: "h", "g1", ..., "z", "h_untrained"
    data              shards, manifest hashes, counts and the number of classes
    probes            {probe: {layer: {"top1", "interval", "seeds", "spread", ...}}}, accuracies in [0, 1]
    comparisons       [{"probe", "a", "b", "difference", "interval"}]: paired on the same test images
    head_information  {"train_images", "test_images", "tasks": {task: {"chance", "entropy_bits", "layers":
                       {layer: {"accuracy", "accuracy_interval", "bits", "bits_interval", ...}}}}}
    config, versions, seconds

`interval` is the 95% bootstrap over test images of the mean over seeds, `spread` the standard deviation over seeds.
h_untrained is the encoder of step 0 with batch-norm statistics taken in one pass over training images.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dist_ssl

FORMAT = 1


def versions(device: torch.device | None = None) -> dict[str, str]:
    import torchvision

    found = {"dist_ssl": dist_ssl.__version__, "torch": torch.__version__, "torchvision": torchvision.__version__}
    found |= {"python": platform.python_version(), "numpy": np.__version__}
    if device is not None:
        found["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return found


def write_json(path: Path, value: Any) -> None:
    """All of it or none: written beside its place, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def show(results: dict[str, Any], print_: Callable[[Any], None]) -> None:
    """The table that the command prints: a row a layer, a column a probe, intervals beside the numbers."""
    from rich.table import Table

    data = results["data"]
    if not results["probes"]:
        print_(f"{results['checkpoint']}: the images have no labels, so no accuracy; see the report")
        return
    chance = 1 / data["num_classes"]
    table = Table(
        title=f"{results['encoder']}, {results['checkpoint']}",
        caption=f"top-1 on {data['test_images']} test images, {data['num_classes']} classes (chance {chance:.1%}), "
        "95% interval over test images",
    )
    table.add_column("layer")
    probes = results["probes"]
    for probe in probes:
        table.add_column(probe, justify="right")
    for layer in results["layers"]:
        cells = []
        for probe in probes:
            value = probes[probe].get(layer)
            low, high = value["interval"] if value else (0, 0)
            cells.append(f"{value['top1']:.1%} [{low:.1%}, {high:.1%}]" if value else "")
        table.add_row(layer, *cells)
    print_(table)
