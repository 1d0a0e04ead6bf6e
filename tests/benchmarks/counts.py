"""What grows with the ranks, before the issue of a thousand ranks and now, as a table of Markdown.

    python -m tests.benchmarks.counts [CONFIG] [--ranks 8 64 1024] [--classes 21841]

"Now" is what `dist-ssl plan --at-ranks` counts (tests hold it to what ranks send); "before" are the formulas of then,
written here: batch norm gathered all ranks' moments, the online probe reduced its gradients, a manifest listed every
fragment, each process held the shards' list as objects (39 MB of 100,000 shards; 8.2 MB now, a rank's workers map it).
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from dist_ssl import config as configuration
from dist_ssl.checkpoint.table import shares
from dist_ssl.config import Config
from dist_ssl.models import build_model
from dist_ssl.planning import counts, estimate
from dist_ssl.planning.estimate import FP32, Sizes, shown

LISTED_BYTES, COLUMN_BYTES = 39e6, 8.2e6  # of 100,000 shards: `tests.benchmarks.index`, then and now
RANKS_A_NODE = 8


def rows(config: Config, sizes: Sizes) -> dict[str, tuple[str, str]]:
    """name -> (before, now), of a rank and step, a checkpoint, a node."""
    w, channels, batch = sizes.ranks, sizes.batch_norm_channels, config.train.global_batch_size
    share = (w - 1) / w
    norms = sum((2 * c + 1) * sizes.moment_bytes * (w - 1) + 2 * 2 * c * FP32 * share for c in channels)
    width = sizes.h_dim + sizes.z_dim
    probe = 2 * FP32 * (sizes.num_classes * (width + 2) + 2 * width + 4) * share
    now = {found.name: found.value for found in counts.counts(config, sizes)}
    others = now["sent by a rank in a step"] - now["batch norm: sent"] - now["online probe: sent"]
    parameters = [p.numel() for p in build_model(config).parameters()]
    kinds = 1 + sizes.optimizer_values
    fragments = kinds * sum(sum(1 for _ in shares(numel, w)) for numel in parameters)
    processes = RANKS_A_NODE * (1 + config.data.num_workers)
    collectives = now["collectives of a step"] - now["batch norm: collectives"] - now["online probe: collectives"]

    def sizes_of(before: float, after: float) -> tuple[str, str]:
        return _bytes(before), _bytes(after)

    return {
        f"batch norm, sent ({batch} images a step)": sizes_of(norms, now["batch norm: sent"]),
        f"online probe, sent ({sizes.num_classes:,} classes)": sizes_of(probe, now["online probe: sent"]),
        "sent by a rank in a step, in all": sizes_of(others + norms + probe, now["sent by a rank in a step"]),
        "collectives of a step": (
            f"{collectives + 2 * len(channels) + 1:,.0f}",
            f"{now['collectives of a step']:,.0f}",
        ),
        "entries of a checkpoint's manifest, ZeRO 0": (f"{fragments:,}", f"{kinds * len(parameters):,}"),
        "files that rank 0 rewrites at a start (ledger)": (f"{w:,}", "1"),
        "list of 100,000 shards, a node": sizes_of(processes * LISTED_BYTES, RANKS_A_NODE * COLUMN_BYTES),
    }


def _bytes(value: float) -> str:
    return shown(estimate.Estimate("", value, "bytes", ""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", nargs="?", default="configs/simclr_resnet50_imagenet.toml")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 1024])
    parser.add_argument("--classes", type=int, default=21_841)
    options = parser.parse_args()
    config = configuration.load(options.config, ["train.global_batch_size=4096"])
    sizes = Sizes.of(config, options.ranks[0], measure=False, num_classes=options.classes)
    columns = [rows(config, replace(sizes, ranks=ranks)) for ranks in options.ranks]
    print("| before, now |", " | ".join(f"W = {ranks:,}" for ranks in options.ranks), "|")
    print("|---|" + "---|" * len(columns))
    for name in columns[0]:
        print(f"| {name} |", " | ".join(", ".join(column[name]) for column in columns), "|")


if __name__ == "__main__":
    main()
