"""Time to accuracy, from files without labels: `python -m tests.benchmarks.speedrun [--rounds N] [--validation]`.

Fashion-MNIST's raw files (Debian's dataset-fashion-mnist) to 88% by kNN (cosine, k = 20, temperature 0.07, a bank of
60,000, 10,000 test images; raw pixels 84.6%) and 82% by a linear probe on 600 labels, 60 a class (raw pixels 77.8%),
on 2 CPU cores. Ours is `configs/speedrun.toml`, timed from the first command to the weights. lightly's SimCLR, the
same encoder, batch, optimizer and temperature on DistributedDataParallel, gets as many seconds, its schedule by the
clock. One judge for both: `dist-ssl evaluate` of the weights that they leave, whose time does not count.

`--validation` trains on the first 50,000 images and judges on the other 10,000: by it the config was chosen, never by
the test images.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from dist_ssl import config as configuration
from tests.benchmarks.peers import FASHION, judge, run, weights_in

CONFIG = "configs/speedrun.toml"
RANKS = {"dist_ssl": 1, "lightly": 2}  # on two cores ours is faster on one; its example is on DDP
NUM_IMAGES, NUM_VALIDATION, NUM_LABELS = 60_000, 10_000, 600
JUDGED = ['evaluation.probes=["knn","few_labels"]', "evaluation.keep_features=false", "augment.crop_size=28"]


def split(folder: Path) -> None:
    """The training files as 50,000 images to train on and 10,000 to judge on, under Debian's names."""
    for kind, num_dims in (("images-idx3", 3), ("labels-idx1", 1)):
        data = gzip.decompress((FASHION / f"train-{kind}-ubyte.gz").read_bytes())
        start = 4 + 4 * num_dims
        items = np.frombuffer(data, np.uint8, offset=start).reshape(60_000, -1)
        for name, part in (("train", items[:-NUM_VALIDATION]), ("t10k", items[-NUM_VALIDATION:])):
            header = data[:4] + len(part).to_bytes(4, "big") + data[8:start]
            (folder / f"{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + part.tobytes(), 1))


def source(files: Path, part: str, labels: bool) -> str:
    images = f"idx:{files}/{part}-images-idx3-ubyte.gz"
    return f"{images}:{files}/{part}-labels-idx1-ubyte.gz" if labels else images


def listed(images: str, out: Path) -> float:
    """Index images where they are; seconds."""
    command = [sys.executable, "-m", "dist_ssl.cli", "shards", "index", images, "--rebuild"]
    return run(command, out / "index.log").wall


def ours(files: Path, out: Path) -> float:
    """Seconds of three commands: the images are listed, trained on, and give batch norm its statistics in the end."""
    images = source(files, "train", labels=False)
    settings = ["--set", f"run.dir={out}/run", "--set", f"data.shards={images}"]
    train = [sys.executable, "-m", "launch.local", "pretrain", CONFIG, "--ranks", str(RANKS["dist_ssl"]), *settings]
    seconds = listed(images, out) + run(train, out / "pretrain.log").wall
    export = ["export", f"{out}/run", f"{out}/weights.safetensors", "--batch-norm-from", images]
    return seconds + run([sys.executable, "-m", "dist_ssl.cli", *export], out / "export.log").wall


def lightly(files: Path, out: Path, seconds: float, config: configuration.Config) -> float:
    """The same encoder, size of views and batch; seconds from the command to its exit."""
    settings = {
        "images": source(files, "train", labels=False).removeprefix("idx:"),
        "encoder": config.model.encoder,
        "size": config.augment.crop_size,
        "batch": config.train.global_batch_size // RANKS["lightly"],
        "ranks": RANKS["lightly"],
        "workers": 1,
        "temperature": config.objective.temperature,
        "weight_decay": config.optimizer.weight_decay,
        "seconds": seconds,
        "started": time.time(),
        "out": str(out),
    }
    (out / "settings.json").write_text(json.dumps(settings))
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(RANKS["lightly"])]
    command = [sys.executable, *torchrun, "-m", "tests.benchmarks.peer_lightly", str(out / "settings.json")]
    return run(command, out / "pretrain.log").wall


def images_seen(out: Path) -> int:
    """By the training of a contestant, in all its epochs."""
    if (told := out / "images.txt").exists():
        return int(told.read_text())
    return int(json.loads((out / "run" / "metrics.jsonl").read_text().splitlines()[-1])["samples_seen"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--validation", action="store_true", help="judge on images of the training set, left out of it")
    parser.add_argument("--only-ours", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    config = configuration.load(CONFIG)
    found: dict[str, list[dict[str, Any]]] = {}
    fraction = NUM_LABELS / (NUM_IMAGES - NUM_VALIDATION * options.validation)
    judged, probes = [*JUDGED, f"evaluation.few_label_fractions=[{fraction:g}]"], ("knn", f"few_labels_{fraction:g}")
    print(f"{'':9s} seconds   images    kNN  {NUM_LABELS} labels   (goals: 88 and 82)")
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder) / "files"  # an index is written beside them
        files.mkdir()
        if options.validation:
            split(files)
        else:
            for path in FASHION.iterdir():
                (files / path.name).symlink_to(path)
        data = (source(files, "train", labels=True), source(files, "t10k", labels=True))
        for turn in range(options.rounds):
            seconds = 0.0
            for name in ("dist_ssl",) if options.only_ours else ("dist_ssl", "lightly"):
                out = Path(folder) / f"{name}-{turn}"
                out.mkdir()
                seconds = ours(files, out) if name == "dist_ssl" else lightly(files, out, seconds, config)
                for images in data:
                    listed(images, out)
                knn, few_labels = judge(weights_in(out), config.model.encoder, data, judged, probes).values()
                seen = images_seen(out)
                row = {"seconds": seconds, "images": seen, "knn": knn, "few_labels": few_labels}
                found.setdefault(name, []).append(row)
                print(f"{name:9s} {seconds:7.0f}  {seen:7,d}  {knn:5.1f}  {few_labels:10.1f}", flush=True)
                if options.json:
                    options.json.write_text(json.dumps(found, indent=1))
    for name, rows in found.items():
        middle = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        print(f"median of {name}: {middle['seconds']:.0f} s, {middle['knn']:.1f}, {middle['few_labels']:.1f}")


if __name__ == "__main__":
    main()
