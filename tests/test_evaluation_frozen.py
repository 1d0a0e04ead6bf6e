"""Frozen means frozen: features, digests, resuming, ranks, and anybody's weights, on real shards."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from dist_ssl import config as configuration
from dist_ssl.config import StorageConfig, UserError
from dist_ssl.evaluation import evaluate, features, head_information
from dist_ssl.evaluation.evaluate import Subject
from dist_ssl.evaluation.features import extract, open_split
from dist_ssl.evaluation.frozen import (
    EncoderChangedError,
    Readable,
    digest,
    frozen,
    load_foreign,
    with_batch_statistics,
)
from dist_ssl.models import build_encoder, build_model
from dist_ssl.report.page import build
from tests.pool import ranks

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """150 train and 50 test shapes."""
    from dist_ssl.data.shards import write_shards
    from dist_ssl.data.sources import open_source

    folder = tmp_path_factory.mktemp("labelled")
    write_shards(open_source("shapes:200:24"), str(folder), StorageConfig(), test_fraction=0.25, num_workers=0)
    return folder


def config_of(data, **evaluation):
    values = {
        "augment": {"crop_size": 16},
        "model": {"encoder": "resnet_tiny", "head": {"hidden_dim": 24, "output_dim": 8}},
        "data": {"shards": f"{data}/train", "num_workers": 0},
        "train": {"steps": 1, "global_batch_size": 8},
        "evaluation": {
            "train_shards": f"{data}/train",
            "test_shards": f"{data}/test",
            "batch_size_per_rank": 32,
            "num_workers": 0,
            "num_seeds": 2,
            "head_information_images": 90,
            "geometry_images": 24,
        }
        | evaluation,
    }
    return configuration.validate(values, "test")


def subject_of(config, folder):
    model = build_model(config)
    other = build_model(config.model_copy(update={"run": config.run.model_copy(update={"seed": 1})}))
    return Subject(
        "a/step-00000003",
        3,
        config,
        Readable(model.encoder, model.head),
        Readable(other.encoder, suffix="_untrained"),
        folder,
    )


def test_evaluate_writes_results_that_name_layers_digests_and_intervals(labelled, tmp_path):
    config = config_of(labelled)
    found = evaluate.evaluate(subject_of(config, tmp_path), CPU).values
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(found))
    assert found["layers"] == ["h", "g1", "z", "h_untrained", "pixels"]
    assert found["encoder_digest"]["before"] == found["encoder_digest"]["after"]
    assert (found["data"]["train_images"], found["data"]["test_images"]) == (150, 50)
    for probe in ("linear", "knn"):
        for layer in found["layers"]:
            value = found["probes"][probe][layer]
            assert value["interval"][0] <= value["top1"] <= value["interval"][1]
            assert value["top1"] == pytest.approx(np.mean(value["seeds"]))
            assert len(value.get("fits", ())) == ((1 if layer == "pixels" else 2) if probe == "linear" else 0)
    tasks = found["head_information"]["tasks"]
    assert {"quarter turn", "colour or grey", "class", "hue", "rotation"} <= set(tasks)
    assert tasks["quarter turn"]["kind"] == "transformation"
    assert tasks["hue"]["kind"] == "factor"
    for task in tasks.values():
        assert set(task["layers"]) == {"h", "g1", "z"}
        assert all(value["bits"] <= task["entropy_bits"] for value in task["layers"].values())
    assert (tmp_path / "pictures.npz").exists()
    assert_that_tensorboard_shows_embeddings_and_neighbours(tmp_path)
    assert not list(tmp_path.glob("head_*"))


def assert_that_tensorboard_shows_embeddings_and_neighbours(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    h = np.load(folder / "features/test/h.npy")
    (table,) = (folder / "tensorboard").glob("*/h/tensors.tsv")
    np.testing.assert_allclose(np.loadtxt(table), h, rtol=1e-5, atol=1e-6)
    (labels,) = (folder / "tensorboard").glob("*/h/metadata.tsv")
    assert np.loadtxt(labels).tolist() == np.load(folder / "features/test/labels.npy").tolist()
    images = EventAccumulator(str(folder / "tensorboard")).Reload().Tags()["images"]
    assert sorted(images) == ["neighbours/h", "neighbours/z", "views"]
    told = (folder / "tensorboard/projector_config.pbtxt").read_text()
    assert told.count("tensor_name") == told.count("sprite {") == 2


def test_results_are_kept_by_checkpoint_and_data(labelled, tmp_path):
    """One data set after another, then the first again, another time with the same name: nothing is overwritten."""
    folder, few = tmp_path / "evaluation" / "step-3", {"probes": ["knn"], "num_seeds": 1}
    own = config_of(labelled, **few)
    other = config_of(labelled, **few, train_shards=f"{labelled}/test", test_shards=f"{labelled}/train")
    (tmp_path / "config.toml").write_text(configuration.dumps(own))

    def run(config, name):
        return evaluate.evaluate(replace(subject_of(config, folder), name=name), CPU)

    first, second = run(own, ""), run(other, None)
    assert first.folder == folder
    assert re.fullmatch("data-[0-9a-f]{8}", second.name)
    assert run(own, "").folder == first.folder
    assert run(other, None).folder == second.folder
    named, clash = run(own, "shapes"), run(other, "shapes")
    assert (named.name, clash.name) == ("shapes", second.name.replace("data", "shapes"))
    assert json.loads((folder / "results.json").read_text())["data"]["test_images"] == 50
    assert run(other, "").folder == second.folder  # its own place is taken by results on other data
    text = build([tmp_path]).read_text()
    assert all(f"On {one.name}, step 3" in text for one in (second, named, clash))
    assert f"--train-shards {labelled}/test --test-shards {labelled}/train --name {clash.name}" in text
    # Runs are compared on each data set that they share.
    shutil.copytree(tmp_path, tmp_path.parent / "twin", ignore=shutil.ignore_patterns("features", "data-*", "shapes*"))
    text = build([tmp_path.parent / "twin", tmp_path], tmp_path / "both.html").read_text()
    assert text.count("What the frozen encoders know, on ") == 2
    assert "Not evaluated on these images: twin" in text


@pytest.mark.parametrize("what", ["a weight", "a running statistic", "training mode"])
def test_an_encoder_changed_on_purpose_fails_the_evaluation(labelled, tmp_path, what, monkeypatch):
    config = config_of(labelled, probes=["linear", "knn"])
    subject = subject_of(config, tmp_path)
    norm = next(m for m in subject.trained.encoder.modules() if isinstance(m, torch.nn.BatchNorm2d))

    def sabotage(*_):
        with torch.no_grad():
            if what == "a weight":
                next(subject.trained.encoder.parameters()).view(-1)[0] += 1e-6
            elif what == "a running statistic":
                norm.running_mean[0] += 1e-6
            else:
                norm.train()
        return 8

    monkeypatch.setattr(evaluate, "_num_classes", sabotage)  # runs between two passes over the images
    with pytest.raises(EncoderChangedError):
        evaluate.evaluate(subject, CPU)
    assert not (tmp_path / "results.json").exists()


def test_frozen_models_take_no_gradient_and_digests_see_every_tensor():
    encoder = build_encoder("resnet_tiny", 16).train()
    with frozen([Readable(encoder)]) as proofs:
        assert not encoder.training
        assert not any(p.requires_grad for p in encoder.parameters())
    assert proofs[0]["before"] == proofs[0]["after"] == digest(encoder)
    for tensor in encoder.state_dict().values():
        before = digest(encoder)
        tensor.view(-1)[0] += 1
        assert digest(encoder) != before


def test_features_are_those_of_the_model_and_an_interrupted_extraction_goes_on(labelled, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "BLOCK_ROWS", 32)
    config = config_of(labelled)
    subject, split = subject_of(config, tmp_path), open_split("train", config, CPU)
    with frozen([subject.trained]):
        whole = extract(split, [subject.trained], ["one"], tmp_path / "whole")
        images = torch.cat([batch.images for batch in split.batches()])
        with torch.inference_mode():
            h = subject.trained.encoder(split.pixels(images))
            z = subject.trained.head(h)
        assert np.allclose(whole.layers["h"], h, atol=1e-5)
        assert np.allclose(whole.layers["z"], z, atol=1e-5)
        assert isinstance(whole.layers["h"], np.memmap)

        real, seen = Readable.read, []

        def dies_later(self, pixels):
            seen.append(len(pixels))
            if len(seen) == 4:
                raise RuntimeError("the lights went out")
            return real(self, pixels)

        monkeypatch.setattr(Readable, "read", dies_later)
        with pytest.raises(RuntimeError, match="lights"):
            extract(split, [subject.trained], ["one"], tmp_path / "resumed")
        with pytest.raises(ValueError, match="interrupted"):
            features.open_features(tmp_path / "resumed")
        seen[:] = [0] * 10
        resumed = extract(split, [subject.trained], ["one"], tmp_path / "resumed")
        assert 0 < sum(seen[11:]) < 150  # after the call that asks for widths: not everything again
        for name, values in whole.layers.items():
            assert np.array_equal(values, resumed.layers[name])
        # Another encoder's features are not taken for this one's.
        seen[:] = [0] * 10
        extract(split, [subject.trained], ["two"], tmp_path / "resumed")
        assert sum(seen[11:]) == 150


def _evaluate_on_this_rank(data, folder):
    config = config_of(data, num_seeds=1, head_information_images=64)
    return evaluate.evaluate(subject_of(config, Path(folder)), CPU).values


@pytest.mark.slow
def test_three_ranks_evaluate_like_one(labelled, tmp_path):
    alone = _evaluate_on_this_rank(labelled, tmp_path / "one")
    several = ranks(3).run(_evaluate_on_this_rank, str(labelled), str(tmp_path / "three"))
    assert several[0]["probes"] == several[1]["probes"] == several[2]["probes"]
    for layer in ("h", "z"):
        a = np.load(tmp_path / "one" / "features" / "test" / f"{layer}.npy")
        b = np.load(tmp_path / "three" / "features" / "test" / f"{layer}.npy")
        assert np.allclose(a, b, atol=1e-5)
        # 50 test images, tied votes and hundreds of near-flat directions: one image may fall on the other side.
        assert several[0]["probes"]["knn"][layer]["top1"] == pytest.approx(
            alone["probes"]["knn"][layer]["top1"], abs=0.021
        )
    for name, task in alone["head_information"]["tasks"].items():
        other = several[0]["head_information"]["tasks"][name]
        assert other["layers"]["h"]["bits"] == pytest.approx(task["layers"]["h"]["bits"], abs=0.05)


def test_batch_statistics_are_those_of_the_images():
    encoder = build_encoder("resnet_tiny", 16)
    first = next(m for m in encoder.modules() if isinstance(m, torch.nn.Conv2d))
    batches = [3 * torch.randn(16, 3, 16, 16) + 1 for _ in range(4)]
    with_batch_statistics(encoder, batches)
    activations = [first(batch) for batch in batches]
    norm = next(m for m in encoder.modules() if isinstance(m, torch.nn.BatchNorm2d))
    assert torch.allclose(norm.running_mean, torch.stack([a.mean((0, 2, 3)) for a in activations]).mean(0), atol=1e-5)
    assert norm.momentum == 0.1
    assert not encoder.training


def test_foreign_weights_with_prefixes_and_classifier(tmp_path):
    encoder = build_encoder("resnet_tiny", 16)
    state = {f"module.encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    state["fc.weight"] = torch.zeros(10, 128)
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "a.pth")
    save_file({name: tensor.clone() for name, tensor in encoder.state_dict().items()}, tmp_path / "a.safetensors")
    for name in ("a.pth", "a.safetensors"):
        assert digest(load_foreign(tmp_path / name, "resnet_tiny", 16)) == digest(encoder)
    with pytest.raises(UserError, match="not the weights of resnet18"):
        load_foreign(tmp_path / "a.pth", "resnet18", 16)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (self.path.touch, ())


def test_foreign_weights_run_no_code_and_say_so_in_a_clean_line(tmp_path):
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"state_dict": Evil(tmp_path / "was here")}))
    torch.save(build_encoder("resnet_tiny", 16), tmp_path / "whole.pth")
    (tmp_path / "noise.pth").write_bytes(b"noise\x1b[1m" * 100)
    (tmp_path / "empty.pth").touch()
    expected = {"evil": "", "noise": "", "empty": "", "whole": "ResNetTiny, which is code; save the model's state_dict"}
    for name, reason in expected.items():
        with pytest.raises(UserError, match="not loaded at all: ") as caught:
            load_foreign(tmp_path / f"{name}.pth", "resnet_tiny", 16)
        assert str(caught.value).isprintable()
        assert reason in str(caught.value)
        assert "weights_only" not in str(caught.value)
    assert not (tmp_path / "was here").exists()
    (tmp_path / "noise.safetensors").write_bytes(b"noise" * 100)
    with pytest.raises(UserError, match="not a safetensors file"):
        load_foreign(tmp_path / "noise.safetensors", "resnet_tiny", 16)


def command_evaluates(weights, *arguments):
    """`dist-ssl evaluate` of weights of a tiny encoder, as a user calls it."""
    from dist_ssl.cli import app

    save_file(build_encoder("resnet_tiny", 16).state_dict(), weights)
    settings = ["--set", "evaluation.image_size=16", "--set", "evaluation.num_workers=0"]
    done = CliRunner().invoke(
        app, ["evaluate", "--weights", str(weights), "--encoder", "resnet_tiny", *settings, *arguments]
    )
    assert done.exit_code == 0, done.output
    return done.output, json.loads((weights.parent / f"{weights.stem}-evaluation" / "results.json").read_text())


def test_the_command_evaluates_anybodys_weights(labelled, tmp_path):
    from dist_ssl.cli import app

    _, found = command_evaluates(tmp_path / "theirs.safetensors", "--data", str(labelled), "--probes", "knn")
    assert found["layers"] == ["h", "h_untrained", "pixels"]
    assert found["step"] is None
    assert "theirs.safetensors names the class" in build([tmp_path / "theirs-evaluation"]).read_text()
    for wrong in (["--weights", "x.pth"], ["runs/x", "--name", "../x"]):
        assert isinstance(CliRunner().invoke(app, ["evaluate", *wrong]).exception, UserError)


@pytest.mark.slow
def test_several_data_sets_in_one_call_end_in_one_table(labelled, tmp_path):
    from dist_ssl.cli import app

    weights, sets = tmp_path / "theirs.safetensors", ["--data", f"first={labelled}"]
    (tmp_path / "half").mkdir()
    for part, there in (("train", "test"), ("test", "train")):  # another data set: the same parts, changed over
        (tmp_path / "half" / part).symlink_to(labelled / there)
    more = ["--data", str(tmp_path / "half"), "--probes", "knn,few_labels", "--set", "evaluation.num_seeds=1"]
    save_file(build_encoder("resnet_tiny", 16).state_dict(), weights)
    command = ["evaluate", "--weights", str(weights), "--encoder", "resnet_tiny", *sets]
    few = ["--set", "evaluation.image_size=16", "--set", "evaluation.num_workers=0"]
    few += ["--set", "evaluation.few_label_fractions=[0.5]"]
    done = CliRunner().invoke(app, [*command, *more, *few], env={"COLUMNS": "160"})
    assert done.exit_code == 0, done.output
    folder = tmp_path / "theirs-evaluation"
    top1 = {}
    for name, images in (("first", "50"), ("half", "150")):
        found = json.loads((folder / name / "results.json").read_text())
        few = (found["probes"][probe]["h"]["top1"] for probe in ("knn", "few_labels_0.5"))
        top1[name] = [f"{100 * value:.1f}".replace("100.0", "100") for value in few]
        (row,) = [line for line in done.output.splitlines() if name in line and "results.json" not in line]
        cells = [cell.strip() for cell in row.split("│")[1:-1]]
        assert cells[:3] == [name, str(found["data"]["num_classes"]), images]
        assert [cell.split(" ")[0] for cell in cells[3:]] == top1[name]
    text = re.sub("<[^>]+>", " ", build([folder]).read_text())
    assert all(number in text[text.index("On each data set") :] for numbers in top1.values() for number in numbers)
    shutil.rmtree(folder)
    twice, both, gone = ["--data", f"{tmp_path}/first"], ["--name", "n", "--data", "x"], ["--data", f"{tmp_path}/gone"]
    for wrong, told in ((twice, "two sets are called first"), (both, "goes without --name"), (gone, "no such folder")):
        done = CliRunner().invoke(app, [*command, *wrong])
        assert isinstance(done.exception, UserError)
        assert told in str(done.exception)
    assert not folder.exists()  # all sets are looked for before the first is evaluated


def test_images_without_labels_get_what_needs_none_and_half_labelled_ones_an_error(tmp_path):
    from dist_ssl.data.shards import write_shards
    from dist_ssl.data.sources import open_source

    generator = np.random.default_rng(0)
    (tmp_path / "flat").mkdir()
    for number in range(80):
        pixels = generator.integers(0, 255, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "flat" / f"{number}.png")
    source = open_source(f"folder:{tmp_path}/flat")
    write_shards(source, str(tmp_path / "data"), StorageConfig(), test_fraction=0.3, num_workers=0)
    config = config_of(tmp_path / "data")
    found = evaluate.evaluate(subject_of(config, tmp_path / "evaluation" / "step-3"), CPU).values
    assert found["probes"] == {}
    assert set(found["head_information"]["tasks"]) == set(head_information.TRANSFORMATIONS)
    (tmp_path / "config.toml").write_text(configuration.dumps(config))
    assert "What the head keeps" in build([tmp_path]).read_text()
    # Weights without a head are not asked what it keeps, and have a page of their own.
    output, found = command_evaluates(tmp_path / "theirs.safetensors", "--data", str(tmp_path / "data"))
    assert "head_information" not in found
    assert "dist-ssl report" in output
    page = build([tmp_path / "theirs-evaluation"]).read_text()
    assert "Nearest neighbours in h" in page
    assert "dist-ssl evaluate --weights" in page
    labels = np.array([0, 1, -1])
    some = features.Features({}, labels, labels, np.zeros(3))
    with pytest.raises(UserError, match="train_shards: expected labelled images, got 1 of 3"):
        evaluate._num_classes(some, some)


def test_transformations_do_what_they_are_named():
    images = torch.randint(0, 255, (6, 3, 16, 16), dtype=torch.uint8)
    for name, transformation in head_information.TRANSFORMATIONS.items():
        assert torch.equal(transformation.apply(images, 0), images), name
        for way in range(1, transformation.num_ways):
            changed = transformation.apply(images, way)
            assert changed.shape == images.shape
            assert changed.dtype == torch.uint8
            assert not torch.equal(changed, images), (name, way)
            assert torch.equal(changed, transformation.apply(images, way)), name
    grey = head_information.TRANSFORMATIONS["colour or grey"].apply(images, 1)
    assert torch.equal(grey[:, 0], grey[:, 2])
    flat = torch.full((1, 3, 16, 16), 90, dtype=torch.uint8)
    assert head_information.TRANSFORMATIONS["image or its edges"].apply(flat, 1).max() == 0
