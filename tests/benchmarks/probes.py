"""Probes at ImageNet's size within 8 GB of anonymous memory: `python -m tests.benchmarks.probes [--rows N]`.

Writes synthetic features (fp32, so 1.28 million x 2048 take 10.5 GB of disk) with class structure, then measures 5
L-BFGS iterations of the linear probe and a sample of kNN queries, and the largest anonymous memory of the process:
RssAnon of /proc, since pages of a memory-mapped file are the kernel's to drop.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch

from dist_ssl.evaluation.knn import knn_predict
from dist_ssl.evaluation.linear import Rows, fit, standardize


def write_features(path: Path, rows: int, dim: int, classes: int) -> np.ndarray:
    """Class means in 64 directions plus noise, block by block; returns the labels."""
    generator = np.random.default_rng(0)
    means = generator.normal(size=(classes, 64)).astype(np.float32)
    directions = generator.normal(size=(64, dim)).astype(np.float32)
    labels = generator.integers(0, classes, rows)
    noise = generator.normal(size=(4096, dim)).astype(np.float32)
    features = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(rows, dim))
    for start in range(0, rows, 4096):
        part = labels[start : start + 4096]
        features[start : start + len(part)] = means[part] @ directions / 8 + noise[: len(part)]
        noise = np.roll(noise, 1, axis=0)
    features.flush()
    return labels


class Peak(threading.Thread):
    """The largest anonymous memory of this process while it runs, in GB."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.gigabytes = 0.0

    def run(self) -> None:
        while True:
            status = Path("/proc/self/status").read_text()
            self.gigabytes = max(self.gigabytes, int(status.split("RssAnon:")[1].split()[0]) / 1e6)
            time.sleep(0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_281_167)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "features.npy"
        labels = write_features(path, options.rows, options.dim, options.classes)
        features = np.load(path, mmap_mode="r")
        peak = Peak()
        peak.start()
        found = {"rows": options.rows, "dim": options.dim, "classes": options.classes}
        found |= {"threads": torch.get_num_threads()}
        rows = Rows(features, labels)
        started = time.monotonic()
        standardizer = standardize(rows)
        found["standardize_seconds"] = round(time.monotonic() - started, 1)
        times = [time.monotonic()]
        fit(
            rows,
            standardizer,
            options.classes,
            [1e-6],
            max_iterations=options.iterations,
            progress=lambda _: times.append(time.monotonic()),
        )
        seconds = np.diff(times)
        found["linear_seconds_per_iteration"] = [round(float(value), 1) for value in seconds]
        found["linear_hours_for_100_iterations"] = round(float(np.median(seconds)) * 100 / 3600, 2)
        found["anonymous_gb_after_linear"] = round(peak.gigabytes, 2)
        started = time.monotonic()
        predicted = knn_predict(features[: options.queries], features, labels, options.classes).numpy()
        found["knn_seconds"] = round(time.monotonic() - started, 1)
        found["knn_agreement"] = float((predicted == labels[: options.queries]).mean())
        found["anonymous_gb"] = round(peak.gigabytes, 2)
    print(json.dumps(found, indent=1))
    if found["anonymous_gb"] > 8:
        raise SystemExit("more than 8 GB of anonymous memory")


if __name__ == "__main__":
    main()
