"""scikit-learn's handwritten digits as PNGs, a folder a class: `python -m tests.digits FOLDER [--pages | --centred]`.

1797 real scans of 8x8 pixels, enlarged; with --pages each stands somewhere on a larger page, with --centred in the
middle of one.
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


def write_pages(folder: Path, centred: bool = False) -> Path:
    """The same at random places of pages of 48 pixels, which leave an untrained encoder far more to learn.

    centred: all in the middle, so that two crops of a page share its digit and nothing else. Otherwise they share its
        place too, which is easier to predict: losses without negatives learn that.
    """
    places, middle = np.random.default_rng(0), (PAGE - DIGIT) // 2
    for path, scan in _scans(folder, DIGIT):
        page = Image.new("L", (PAGE, PAGE))
        page.paste(scan, (middle, middle) if centred else tuple(places.integers(0, PAGE - DIGIT + 1, 2)))
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
    match sys.argv[1:]:
        case [folder]:
            write_digits(Path(folder))
        case [folder, ("--pages" | "--centred") as which]:
            write_pages(Path(folder), centred=which == "--centred")
        case _:
            sys.exit(__doc__)
