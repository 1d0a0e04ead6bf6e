"""End to end on the CPU against what a user would pick: `python -m tests.benchmarks.peers [fashion] [photos]`.

The same images, encoder, batch, ranks, optimizer and number of steps, in turn: ours (`dist-ssl pretrain`), lightly's
SimCLR as its documentation writes it (`peer_lightly`), and stable-pretraining's (`peer_stable_pretraining`), where
`--stable-pretraining PYTHON` names the interpreter of an environment that has it (CONTRIBUTING has the two commands).

`fashion`: Debian's dataset-fashion-mnist as 28x28 PNGs; `photos`: JPEGs of 500x375, made here, to crops of 96. Every
contestant runs twice, one epoch and `--epochs`, and the difference counts: start-up, checkpoint of step 0 and imports
are in both. CPU time is that of all processes that a run started. Accuracy, of `fashion`, is by one judge: our probes
on h of the weights that the longer run left. Other people's networks have torch's own batch norm, each rank for itself.
"""

from __future__ import annotations

import argparse
import ctypes
import gzip
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from dist_ssl.config import StorageConfig
from dist_ssl.data.shards import write_shards
from dist_ssl.data.sources import open_source
from tests.benchmarks.input import photographs

FASHION = Path("/usr/share/datasets/fashion-mnist")
PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Task:
    """What all contestants are given."""

    name: str
    folder: Path  # with images/train, images/test, shards/train, shards/test
    encoder: str
    size: int
    batch: int
    num_images: int
    ranks: int
    workers: int

    def settings(self, epochs: int, out: Path) -> dict[str, Any]:
        """What the peers' programs read, as JSON."""
        return {
            "images": str(self.folder / "images/train"),
            "encoder": self.encoder,
            "size": self.size,
            "batch": self.batch // self.ranks,
            "ranks": self.ranks,
            "workers": self.workers,
            "epochs": epochs,
            "out": str(out),
        }


@dataclass(frozen=True)
class Spent:
    wall: float
    cpu: float  # seconds of user and system, of all processes
    waited: float  # seconds in which rank 0 had no batch
    peak_mb: float  # proportional set size of all processes together


def fashion(folder: Path, num_images: int, num_test: int) -> None:
    """PNGs in a folder a class, as torchvision's ImageFolder and lightly's dataset read them."""
    for split, stem, count in (("train", "train", num_images), ("test", "t10k", num_test)):
        packed = [(FASHION / f"{stem}-{kind}-ubyte.gz").read_bytes() for kind in ("images-idx3", "labels-idx1")]
        images, labels = (np.frombuffer(gzip.decompress(data), np.uint8) for data in packed)
        images, labels = images[16:], labels[8:]  # their headers
        for i in range(count):
            path = folder / "images" / split / str(labels[i]) / f"{i:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[i * 784 : (i + 1) * 784].reshape(28, 28)).save(path)


def photos(folder: Path, num_images: int, _: int) -> None:
    """Twice as many files as different pictures."""
    (folder / "images/train/0").mkdir(parents=True)
    for i, data in enumerate(photographs(num_images // 2) * 2):
        (folder / "images/train/0" / f"{i:05d}.jpg").write_bytes(data)


def write(task: Task) -> None:
    for split in (path.name for path in (task.folder / "images").iterdir()):
        source = open_source(f"folder:{task.folder / 'images' / split}")
        write_shards(source, str(task.folder / "shards" / split), StorageConfig(), shard_mb=1, num_workers=0)


def config_of(task: Task, epochs: int, out: Path) -> list[str]:
    """Ours: quickstart's settings, which the peers repeat."""
    values = {
        "run.dir": str(out),
        "data.shards": str(task.folder / "shards/train"),
        "data.num_workers": task.workers,
        "augment.crop_size": task.size,
        "model.encoder": task.encoder,
        "train.global_batch_size": task.batch,
        "train.steps": epochs * task.num_images // task.batch,
        "checkpoint.every_steps": 10**6,
    }
    return [part for key, value in values.items() for part in ("--set", f"{key}={json.dumps(value)}")]


def run(command: list[str], log: Path) -> Spent:
    """Run a program to its end, with all that it started: orphans (a fork server) are handed to this process."""
    before, started, peak = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic(), 0.0
    over = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(1.0):
            held = 0
            for process in psutil.Process().children(recursive=True):
                try:
                    held += process.memory_full_info().pss
                except psutil.Error:
                    continue
            peak = max(peak, held / 2**20)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("OMP_")}
    with log.open("w") as output:
        code = subprocess.run(command, stdout=output, stderr=output, env=environment).returncode
    wall = time.monotonic() - started
    over.set()
    watcher.join()
    if code:
        raise SystemExit(f"{' '.join(command)}: exit code {code}\n{log.read_text()[-3000:]}")
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            break
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Spent(wall, cpu, 0.0, peak)


def ours(task: Task, epochs: int, out: Path) -> Spent:
    start = ["launch.local" if task.ranks > 1 else "dist_ssl.cli", "pretrain", "configs/quickstart.toml"]
    ranks = ["--ranks", str(task.ranks)] if task.ranks > 1 else []
    spent = run([sys.executable, "-m", *start, *ranks, *config_of(task, epochs, out / "run")], out.with_suffix(".log"))
    waited, step = 0.0, 0
    for line in map(json.loads, (out / "run/metrics.jsonl").read_text().splitlines()):
        elapsed = (line["step"] - step) * task.batch / line["images_per_second"]
        waited, step = waited + line["data_wait_fraction"] * elapsed, line["step"]
    export = ["export", str(out / "run"), str(out / "weights.safetensors")]
    subprocess.run([sys.executable, "-m", "dist_ssl.cli", *export], check=True, capture_output=True)
    return Spent(spent.wall, spent.cpu, waited, spent.peak_mb)


def theirs(program: str, interpreter: str, task: Task, epochs: int, out: Path) -> Spent:
    out.mkdir(parents=True)
    (out / "settings.json").write_text(json.dumps(task.settings(epochs, out)))
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(task.ranks)]
    by_ranks = torchrun if task.ranks > 1 and program == "peer_lightly" else []  # Lightning starts its ranks itself
    module = ["-m", f"tests.benchmarks.{program}", str(out / "settings.json")]
    spent = run([interpreter, *by_ranks, *module], out.with_suffix(".log"))
    return Spent(spent.wall, spent.cpu, float((out / "waited.txt").read_text()), spent.peak_mb)


def judge(
    weights: Path, encoder: str, data: tuple[str, str], settings: list[str], probes: tuple[str, ...]
) -> dict[str, float]:
    """Top-1 in percent, by probe, on h of anybody's weights; data: training and test shards."""
    shards = ["--train-shards", data[0], "--test-shards", data[1]]
    of = ["--weights", str(weights), "--encoder", encoder, "--output", str(weights.parent / "evaluation")]
    said = [part for setting in settings for part in ("--set", setting)]
    command = [sys.executable, "-m", "dist_ssl.cli", "evaluate", *of, *shards, *said]
    run(command, weights.parent / "evaluation.log")
    (results,) = (weights.parent / "evaluation").rglob("results.json")
    found = json.loads(results.read_text())["probes"]
    return {name: 100 * found[name]["h"]["top1"] for name in probes}


def weights_in(out: Path) -> Path:
    """The weights that a contestant left."""
    return next(path for path in out.glob("weights.*") if path.suffix != ".json")


def compare(task: Task, epochs: int, rounds: int, judged: bool, peers: dict[str, Any]) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    images = (epochs - 1) * (task.num_images // task.batch) * task.batch
    for turn in range(rounds):
        for name, contestant in peers.items():
            place = task.folder / f"runs-{task.ranks}" / f"{name}-{turn}"
            short, long = contestant(task, 1, place / "short"), contestant(task, epochs, place / "long")
            wall = long.wall - short.wall
            row = rows.setdefault(name, {"images_per_second": [], "cpu_ms_per_image": [], "data_wait": []})
            row["images_per_second"].append(images / wall)
            row["cpu_ms_per_image"].append(1000 * (long.cpu - short.cpu) / images)
            row["data_wait"].append((long.waited - short.waited) / wall)
            row["peak_mb"] = max(row.get("peak_mb", 0.0), long.peak_mb)
            row["seconds"] = long.wall
            if judged and turn == 0:
                data = (str(task.folder / "shards/train"), str(task.folder / "shards/test"))
                settings = [f"augment.crop_size={task.size}", "evaluation.num_seeds=1"]
                row |= judge(weights_in(place / "long"), task.encoder, data, settings, ("linear", "knn"))
            print(".", end="", flush=True)
    return rows


def table(task: Task, rows: dict[str, Any]) -> str:
    first = next(iter(rows.values()))
    lines = [
        f"\n{task.name}: {task.encoder} at {task.size} pixels, {task.ranks} ranks, batch {task.batch}",
        f"{'':20s} images/s  CPU ms/image (range)     of ours  wait  peak MB  linear    kNN",
    ]
    for name, row in rows.items():
        cpu = row["cpu_ms_per_image"]
        ratio = statistics.median(cpu) / statistics.median(first["cpu_ms_per_image"])
        accuracy = "".join(f"  {row[key]:5.1f}" for key in ("linear", "knn") if key in row)
        lines.append(
            f"{name:20s} {statistics.median(row['images_per_second']):8.0f}  {statistics.median(cpu):6.2f} "
            f"({min(cpu):.2f} to {max(cpu):.2f})   {ratio:7.2f}  {statistics.median(row['data_wait']):4.0%}  "
            f"{row['peak_mb']:7.0f}{accuracy}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="*", choices=["fashion", "photos", []], default=[])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--encoder", help="resnet_tiny for fashion, resnet18 for photos, by default")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--images", type=int, default=10_240, help="of fashion; photos are a fifth")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--workers", type=int, default=1, help="processes a rank that read")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round, a quarter of the images, two epochs")
    parser.add_argument("--only", nargs="+", help="contestants, by name")
    parser.add_argument("--stable-pretraining", metavar="PYTHON", help="an interpreter that has it")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.epochs, options.images, options.rounds = 2, options.images // 4, 1
    peers: dict[str, Any] = {
        "dist_ssl": ours,
        "lightly": lambda *task: theirs("peer_lightly", sys.executable, *task),
    }
    if options.stable_pretraining:
        peers["stable-pretraining"] = lambda *task: theirs("peer_stable_pretraining", options.stable_pretraining, *task)
    else:
        print("stable-pretraining: not installed, not measured (--stable-pretraining PYTHON)")
    peers = {name: peer for name, peer in peers.items() if not options.only or name in options.only}
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    found: dict[str, Any] = {}
    for name in options.inputs or ["fashion", "photos"]:
        with tempfile.TemporaryDirectory() as folder:
            small = name == "fashion"
            num_images = options.images if small else options.images // 5 // options.batch * options.batch
            encoder = options.encoder or ("resnet_tiny" if small else "resnet18")
            for ranks in options.ranks:
                task = Task(
                    name, Path(folder), encoder, 28 if small else 96, options.batch, num_images, ranks, options.workers
                )
                if not (task.folder / "images").exists():
                    (fashion if small else photos)(task.folder, num_images, min(4000, num_images))
                    write(task)
                rows = compare(task, options.epochs, options.rounds, small, peers)
                print(table(task, rows))
                found[f"{name}, {encoder}, {ranks} ranks"] = rows
                if options.json:
                    options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
