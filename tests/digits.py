"""scikit-learn's handwritten digits as PNGs, a folder a class: `python -m tests.digits FOLDER [--pages]`.

1797 real scans of 8x8 pixels, enlarged; with --pages each stands somewhere on a larger page.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

DIGIT, PAGE = 24, 48  # pixels


def write_digits(folder: Path, size: int = 32) -> Path:
    """size x size pixels each, as FOLDER/<digit>/<number>.png."""
    for path, scan in _scans(folder, size):
        scan.save(path)
    return folder


def write_pages(folder: Path) -> Path:
    """The same at random places of pages of 48 pixels, which leave an untrained encoder far more to learn."""
    places = np.random.default_rng(0)
    for path, scan in _scans(folder, DIGIT):
        page = Image.new("L", (PAGE, PAGE))
        page.paste(scan, tuple(places.integers(0, PAGE - DIGIT + 1, 2)))
        page.save(path)
    return folder


def _scans(folder: Path, size: int):
    scans, labels = load_digits(return_X_y=True)
    for number, (scan, label) in enumerate(zip(scans, labels, strict=True)):
        path = folder / str(label) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.round(scan.reshape(8, 8) * (255 / 16)).astype(np.uint8)
        yield path, Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC)


if __name__ == "__main__":
    (write_pages if "--pages" in sys.argv[2:] else write_digits)(Path(sys.argv[1]))
