"""Raw pixels beside every layer, and the table that shows them: it fits a terminal of 80 columns."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from rich.console import Console

from dist_ssl.evaluation import evaluate
from dist_ssl.evaluation.features import PIXELS, Features, in_one_channel, open_split
from dist_ssl.evaluation.knn import knn_predict
from dist_ssl.evaluation.results import Stored, show, show_several
from tests.test_evaluation_frozen import CPU, config_of, labelled, subject_of  # noqa: F401


def test_pixels_are_the_images_and_are_probed_up_to_a_size(labelled, tmp_path):  # noqa: F811
    config = config_of(labelled, probes=["knn"], num_seeds=1)
    found = evaluate.evaluate(subject_of(config, tmp_path / "all"), CPU).values
    train, test = (open_split(name, config, CPU) for name in ("train", "test"))
    images, labels = {}, {}
    for split in (train, test):
        batches = list(split.batches())
        images[split.name] = torch.cat([batch.images for batch in batches]).flatten(1).numpy()
        labels[split.name] = torch.cat([batch.labels for batch in batches]).numpy()
        kept = np.load(tmp_path / "all" / "features" / split.name / "pixels.npy")
        assert kept.dtype == np.uint8
        assert np.array_equal(kept, images[split.name])
    predicted = knn_predict(images["test"].astype(np.float32), images["train"], labels["train"], 8).numpy()
    assert found["probes"]["knn"]["pixels"]["top1"] == pytest.approx((predicted == labels["test"]).mean())
    assert {one["b"] for one in found["comparisons"]} == {"z", "h_untrained", "pixels"}
    smaller = config_of(labelled, probes=["knn"], raw_pixels_up_to=3 * 16**2 - 1)
    assert "pixels" not in evaluate.evaluate(subject_of(smaller, tmp_path / "none"), CPU).values["layers"]


def test_grey_images_are_probed_in_one_channel():
    grey = np.random.default_rng(0).integers(0, 255, (2, 3000, 1, 16), dtype=np.uint8).repeat(3, axis=2)

    def parts(images):
        return [
            Features({"h": one, PIXELS: one.reshape(3000, 48)}, np.zeros(3000), np.arange(3000), np.zeros(3000))
            for one in images
        ]

    for part, images in zip(in_one_channel(*parts(grey)), grey, strict=True):
        assert np.array_equal(part.layers[PIXELS], images[:, 0])
        assert np.shares_memory(part.layers["h"], images)
    grey[1, 2900, 2, 15] ^= 1  # one number of one image of the second part
    assert [part.layers[PIXELS].shape for part in in_one_channel(*parts(grey))] == [(3000, 48)] * 2
    without = [Features({"h": grey[0]}, np.zeros(3000), np.arange(3000), np.zeros(3000))]
    assert in_one_channel(*without) == without


def test_tables_fit_a_terminal_of_80_columns():
    """With the longest numbers that there are, all probes and a head of four layers."""
    probes = ["linear", "knn", "few_labels_0.01", "few_labels_0.1", "linear_augmented", "fine_tuned"]
    probes += ["few_labels_fine_tuned_0.01", "few_labels_fine_tuned_0.125"]
    layers = ["h", "g1", "g2", "g3", "z", "h_untrained", "pixels"]
    worst = {"top1": 0.999, "interval": [0.98, 1.0], "fits": [{"converged": False}]}
    results = {
        "checkpoint": "runs/a/checkpoints/step-00000003",
        "encoder": "resnet50",
        "layers": layers,
        "data": {"num_classes": 1000, "test_images": 50_000},
        "probes": {probe: dict.fromkeys(layers, worst) for probe in probes},
    }
    for draw, rows, at_once in (
        (lambda print_: show(results, print_), [layer.removeprefix("h_") for layer in layers], 3),
        (lambda print_: show_several([Stored(3, "imagenet", None, results)] * 2, print_), ["imagenet"] * 2, 2),
    ):
        console = Console(width=80, file=io.StringIO())
        draw(console.print)
        text = console.file.getvalue()
        tables = -(-len(probes) // at_once)
        assert text.count("99.9 [98.0, 100]*") == len(rows) * len(probes)
        assert [line.split()[1] for line in text.splitlines() if "[98.0" in line] == rows * tables
        for name in ("linear", "kNN", "linear, 1%", "linear, 10%", "fine-tuned", "fine-tuned, 1%", "fine-tuned, 12.5%"):
            assert f" {name} " in text
        assert "…" not in text
        assert text.count("top-1 in %") == text.count("runs/a/") == 1
