"""What watching costs: `python -m tests.benchmarks.diagnostics [--encoder NAME] [--size S] [--batch B]`.

One rank's step (forward and backward of 2 B views, and the loss) against what is done beside it: the online probe of
every step, and the geometry of one step in `diagnostics.every_steps`. Turns are taken, medians count; exit code 1 where
the share is over 2%.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from dist_ssl.config import Config, HeadConfig
from dist_ssl.models import ContrastiveModel, ProjectionHead, build_encoder
from dist_ssl.objective import nt_xent
from dist_ssl.training.diagnostics import diagnose
from dist_ssl.training.online_probe import OnlineProbe

LIMIT = 0.02


def seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="resnet_tiny")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=128, help="images of this rank")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--repetitions", type=int, default=15)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder, every = build_encoder(options.encoder, options.size), Config().diagnostics.every_steps
    model = ContrastiveModel(encoder, ProjectionHead(encoder.output_dim, HeadConfig()), [2]).to(device)
    views = torch.randn(2 * options.batch, 3, options.size, options.size, device=device)
    views = views.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(options.classes, (options.batch,), device=device)
    probe = OnlineProbe(options.classes, model.widths).to(device)
    h, z, _ = (output.detach() for output in model(views))
    by_image = [output.unflatten(0, (-1, 2)) for output in (h, z)]

    def step() -> None:
        _, z, _ = model(views)
        nt_xent(z[0::2], z[1::2], 0.1).backward()

    calls: dict[str, Callable[[], Any]] = {
        "step": step,
        "probe": lambda: probe.update({"h": h[0::2], "z": z[0::2]}, labels),
        "geometry": lambda: diagnose(*by_image, loss=1.0, temperature=0.1, num_views=len(views)),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(options.repetitions):
        for name, call in calls.items():
            times[name].append(seconds(call))
    cost = {name: statistics.median(values[2:]) for name, values in times.items()}
    share = (cost["probe"] + cost["geometry"] / every) / cost["step"]
    print(*(f"{name} {1e3 * value:.2f} ms" for name, value in cost.items()), sep=", ")
    print(f"{share:.2%} of the step: the probe of each, the geometry of one in {every}")
    return 1 if share > LIMIT else 0


if __name__ == "__main__":
    sys.exit(main())
