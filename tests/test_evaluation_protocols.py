"""Few labels, the augmented linear protocol and fine-tuning, on features and images whose answer is known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from dist_ssl.config import StorageConfig, UserError
from dist_ssl.evaluation import fine_tuning
from dist_ssl.evaluation.features import extract, open_split
from dist_ssl.evaluation.few_labels import few_label_probe, sample
from dist_ssl.evaluation.fine_tuning import fine_tune_few_labels
from dist_ssl.evaluation.frozen import Readable, digest, frozen
from dist_ssl.evaluation.linear import Rows
from dist_ssl.evaluation.sgd import train_and_score
from dist_ssl.models import build_model
from tests.pool import ranks
from tests.test_evaluation_frozen import config_of

CPU = torch.device("cpu")


def test_samples_are_balanced_seeded_and_nested():
    labels = np.random.default_rng(0).integers(0, 7, 3000)
    for fraction, each in ((0.01, 4), (0.1, 43)):
        rows = sample(labels, fraction, 3)
        assert np.bincount(labels[rows]).tolist() == [each] * 7
        assert len(set(rows.tolist())) == len(rows)
        assert (rows == sample(labels, fraction, 3)).all()
        assert (rows != sample(labels, fraction, 4)).any()
    assert set(sample(labels, 0.01, 3)) <= set(sample(labels, 0.1, 3))
    assert len(sample(labels, 1e-6, 0)) == 7
    with pytest.raises(UserError, match="class 1 has 2"):
        sample(np.array([0] * 50 + [1] * 2), 0.5, 0)


def test_few_labels_know_less_than_many_and_seeds_differ():
    x, y = load_digits(return_X_y=True)
    x = x.astype(np.float32)
    train, test = Rows(x[:1200], y[:1200]), Rows(x[1200:], y[1200:])
    results = [few_label_probe(train, test, 10, fraction, 3) for fraction in (0.01, 0.1)]
    few, more = (result.correct_sn for result in results)
    assert few.shape == more.shape == (3, 597)
    assert 0.3 < few.mean() < more.mean() < 0.97
    assert few.mean(1).std() > 0
    assert len(results[1].weight_decays) == len(results[1].fits) == 3


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """Noisy images of three colours, which are the classes: easy, and unharmed by crops."""
    from PIL import Image

    from dist_ssl.data.shards import write_shards
    from dist_ssl.data.sources import open_source

    folder, generator = tmp_path_factory.mktemp("colours"), np.random.default_rng(0)
    for label, colour in enumerate(((200, 40, 40), (40, 200, 40), (40, 40, 200))):
        (folder / "images" / str(label)).mkdir(parents=True)
        for number in range(60):
            pixels = np.clip(np.array(colour) + generator.normal(0, 25, (20, 20, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "images" / str(label) / f"{number}.png")
    write_shards(
        open_source(f"folder:{folder}/images"),
        str(folder),
        StorageConfig(),
        test_fraction=0.3,
        num_workers=0,
    )
    return folder


def _model(data):
    config = config_of(data)
    train, test = (open_split(name, config, CPU) for name in ("train", "test"))
    model = build_model(config)
    return train, test, Readable(model.encoder.eval(), model.head.eval())


def _trained(data, layers, epochs, tune):
    train, test, readable = _model(data)
    before = digest(*readable.modules())
    correct = train_and_score(readable, layers, train, test, 3, epochs=epochs, tune_encoder=tune, seed=0)
    return {layer: hits.tolist() for layer, hits in correct.items()}, before == digest(*readable.modules())


def _tuned(data, folder, layer, labels=None):
    """(correct answers, rate) on a third of the labels, or of others in their place; and those of the linear probe."""
    train, test, readable = _model(data)
    before = digest(*readable.modules())
    with frozen([readable]):
        features = [extract(split, [readable], ["one"], Path(folder) / split.name) for split in (train, test)]
    if labels is not None:
        features[0] = replace(features[0], labels=labels)
    tuned = fine_tune_few_labels(readable, layer, train, test, tuple(features), 3, 0.33, 0)
    rows = [Rows(part.layers[layer], part.labels) for part in features]
    probe = few_label_probe(*rows, 3, 0.33, 1).correct_sn[0]
    assert before == digest(*readable.modules())
    return tuned.correct.tolist(), tuned.rate, probe.tolist()


@pytest.mark.slow
def test_the_augmented_linear_protocol_learns_and_leaves_the_encoder(colours):
    correct, unchanged = _trained(colours, ["h", "g1", "z"], 100, False)
    assert unchanged
    assert set(correct) == {"h", "g1", "z"}
    assert np.mean(correct["h"]) > 0.9


@pytest.mark.slow
def test_fine_tuning_works_on_a_copy(colours):
    correct, unchanged = _trained(colours, ["g1"], 60, True)
    assert unchanged
    assert np.mean(correct["g1"]) > 0.9
    with pytest.raises(UserError, match="expected one of h, g1, z; got 'g7'"):
        _trained(colours, ["g7"], 1, True)


def test_fine_tuning_on_few_labels_starts_as_the_linear_probe(colours, tmp_path, monkeypatch):
    monkeypatch.setattr(fine_tuning, "_choose", lambda *_: 1e-12)
    correct, rate, probe = _tuned(colours, tmp_path, "g1")
    assert rate == 1e-12
    assert correct == probe


def test_labels_that_say_nothing_leave_the_linear_probe(colours, tmp_path):
    labels = np.random.default_rng(0).permutation(np.arange(126) % 3)
    correct, rate, probe = _tuned(colours, tmp_path, "h", labels)
    assert rate == 0
    assert correct == probe


@pytest.mark.slow
def test_protocols_on_two_ranks_are_those_of_one(colours, tmp_path):
    alone, _ = _trained(colours, ["h"], 20, False)
    first, second = (correct for correct, _ in ranks(2).run(_trained, str(colours), ["h"], 20, False))
    assert first == second
    assert np.mean(np.array(first["h"]) == np.array(alone["h"])) > 0.95
    alone, rate, _ = _tuned(colours, tmp_path / "one", "h")
    for correct, chosen, _ in ranks(2).run(_tuned, str(colours), str(tmp_path / "two"), "h"):
        assert chosen == rate
        assert np.mean(np.array(correct) == np.array(alone)) > 0.95
