"""scikit-learn's handwritten digits as a folder of PNGs, a subfolder a class: `python -m tests.digits FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits


def write_digits(folder: Path, size: int = 32) -> Path:
    """1797 real scans of 8x8 pixels, enlarged to size x size, as FOLDER/<digit>/<number>.png."""
    scans, labels = load_digits(return_X_y=True)
    for number, (scan, label) in enumerate(zip(scans, labels, strict=True)):
        target = folder / str(label)
        target.mkdir(parents=True, exist_ok=True)
        pixels = np.round(scan.reshape(8, 8) * (255 / 16)).astype(np.uint8)
        Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC).save(target / f"{number:04d}.png")
    return folder


if __name__ == "__main__":
    write_digits(Path(sys.argv[1]))
