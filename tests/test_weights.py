"""Starting weights from files, ours, torchvision's and timm's, and weights out as timm's folder."""

import json
import logging
import shutil

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from dist_ssl import checkpoint
from dist_ssl import config as configuration
from dist_ssl.cli import app
from dist_ssl.config import StorageConfig, UserError
from dist_ssl.evaluation.commands import _config_of
from dist_ssl.models import build_encoder
from dist_ssl.models.weights import start_from
from dist_ssl.report.timm_folder import export_for_timm
from tests import engines, trajectory
from tests.pool import ranks
from tests.terminal import blocks
from tests.trajectory import small_config

HERE = StorageConfig()


def equal(state, other):
    kept = {name: tensor for name, tensor in state.items() if "num_batches_tracked" not in name}
    return all(torch.equal(tensor, other[name]) for name, tensor in kept.items())


def test_torchvisions_and_timms_weights_are_taken_by_name(tmp_path, caplog):
    caplog.set_level(logging.INFO, "dist_ssl")
    theirs = torchvision.models.resnet18()
    state = {name: tensor.contiguous() for name, tensor in theirs.state_dict().items()}
    save_file(state, tmp_path / "a.safetensors")
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, tmp_path / "a.pth")
    save_file(timm.create_model("vit_tiny_patch16_224", img_size=32).state_dict(), tmp_path / "vit.safetensors")
    for encoder, file in [("resnet18", "a.safetensors"), ("timm/resnet18", "a.pth"), ("resnet18", "a.pth")]:
        ours = build_encoder(encoder, 32)
        start_from(ours, str(tmp_path / file), HERE)
        assert equal(ours.state_dict(), state)
        assert (
            "100 of the encoder's 100 tensors; not there: none; of another shape: none; left aside: 2 ("
            in caplog.messages[-1]
        )
    ours = build_encoder("timm/vit_tiny_patch16_224", 48)
    before = ours.state_dict()["pos_embed"].clone()
    start_from(ours, str(tmp_path / "vit.safetensors"), HERE)
    assert equal({"cls_token": ours.cls_token}, load_file(tmp_path / "vit.safetensors"))
    assert torch.equal(ours.pos_embed, before)
    assert "of another shape: 1 (pos_embed (expected (1, 10, 192), got (1, 5, 192)))" in caplog.messages[-1]


def test_what_does_not_match_is_one_line(tmp_path):
    save_file({"a.weight": torch.zeros(3), "conv1.weight": torch.zeros(3)}, tmp_path / "a.safetensors")
    torch.save({"state": print}, tmp_path / "code.pth")
    cases = {
        "a.safetensors": r"nothing in it has .* 100 tensors, such as 'conv1\.weight'; it holds 2 \(a\.weight, conv1\."
        r"weight\); of another shape: 1 \(conv1\.weight \(expected \(64, 3, 7, 7\), got \(3,\)\)\)",
        "code.pth": "not loadable as tensors only, so not loaded at all: it holds a .*print, which is code",
        "none.safetensors": "no such file of weights",
    }
    for file, said in cases.items():
        with pytest.raises(UserError, match=said):
            start_from(build_encoder("resnet18"), str(tmp_path / file), HERE)
    with pytest.raises(UserError, match="expected a plain path or a URL of the schemes"):
        start_from(build_encoder("resnet18"), "ftp://host/a.safetensors", HERE)


@pytest.mark.parametrize("method", [pytest.param("nt_xent", marks=pytest.mark.slow), "byol"])
def test_a_run_starts_from_them_once(tmp_path, small_shards, method):
    """At step 0 student and teacher have the weights; a resume does not read them again, nor go on from others."""
    torch.manual_seed(5)
    encoder = build_encoder("resnet_tiny")
    save_file(encoder.state_dict(), tmp_path / "w.safetensors")
    overrides = [f"model.init={tmp_path}/w.safetensors", f"objective.name={method}", "train.steps=2"]
    config = small_config(tmp_path / "run", small_shards, *overrides, "checkpoint.every_steps=1")
    assert ranks(2).run(trajectory.pretrain, config) == [0, 0]
    for teacher in (False, True)[: 2 if method == "byol" else 1]:
        _, _, start = checkpoint.load_run(tmp_path / "run", 0, teacher)
        assert equal(encoder.state_dict(), start.encoder.state_dict())
    _, _, whole = checkpoint.load_run(tmp_path / "run")
    (tmp_path / "w.safetensors").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000002")
    assert ranks(2).run(trajectory.pretrain, config) == [0, 0]
    assert equal(whole.state_dict(), checkpoint.load_run(tmp_path / "run")[2].state_dict())
    other = configuration.with_overrides(config, ["model.init=other.safetensors"])
    assert all("model.init: " in said for said in ranks(2).run(trajectory.pretrain_error, other))


def test_weights_that_do_not_match_and_sizes_leave_no_run_directory(tmp_path, small_shards):
    save_file({"x": torch.zeros(1)}, tmp_path / "w.safetensors")
    config = small_config(tmp_path / "run", small_shards, f"model.init={tmp_path}/w.safetensors")
    assert all("nothing in it has the name" in said for said in ranks(2).run(trajectory.pretrain_error, config))
    sizes = ["model.encoder=vit_s_16", "augment.crop_size=32", "evaluation.image_size=40"]
    config = small_config(tmp_path / "run", small_shards, *sizes)
    assert all("evaluation.image_size: " in said for said in ranks(2).run(trajectory.pretrain_error, config))
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def resnet18_run(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "run"
    settings = small_config(run, "/data/private", "model.encoder=resnet18")
    ranks(2).run(engines.save_after, settings, 1)
    (run / "config.toml").write_text(configuration.dumps(settings))
    return run


@pytest.mark.slow
def test_a_resnet_of_torchvision_becomes_timms_folder(resnet18_run, tmp_path):
    settings = configuration.load(resnet18_run / "config.toml")
    command = ["export", str(resnet18_run), str(tmp_path / "folder"), "--format", "timm"]
    assert CliRunner().invoke(app, command, catch_exceptions=False).exit_code == 0
    theirs = timm.create_model(f"local-dir:{tmp_path}/folder", pretrained=True).eval()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(theirs(x), checkpoint.load_run(resnet18_run)[2].encoder(x), rtol=1e-4, atol=1e-5)
    assert timm.create_model(f"local-dir:{tmp_path}/folder", pretrained=True, num_classes=10)(x).shape == (2, 10)
    data = timm.data.resolve_model_data_config(theirs)
    assert (tuple(data["input_size"]), tuple(data["mean"]), data["crop_pct"]) == (
        (3, 32, 32),
        (0.485, 0.456, 0.406),
        1.0,
    )
    described = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert (described["architecture"], described["num_features"]) == ("resnet18", 512)
    again = configuration.load(tmp_path / "folder" / "pretrain.toml")
    assert configuration.resume_diff(again, settings) == []
    assert "private" not in "".join(path.read_text() for path in (tmp_path / "folder").glob("*.[mt]*"))
    card = (tmp_path / "folder" / "README.md").read_text()
    assert "Not evaluated" in card


@pytest.mark.slow
def test_detectors_start_from_an_export(resnet18_run, tmp_path, monkeypatch):
    """The code of docs/detection.md: one step of torchvision's Faster R-CNN; detectron2's names."""
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(app, ["export", str(resnet18_run), "encoder.safetensors"]).exit_code == 0
    wanted = checkpoint.load_run(resnet18_run)[2].encoder.state_dict()
    rcnn, to_torch, to_detectron2 = blocks("detection.md", "python")
    names = {}
    exec(rcnn, names)
    model = names["faster_rcnn"]("encoder.safetensors", 3, min_size=64, max_size=64)
    assert equal(model.backbone.body.state_dict(), wanted)
    assert model.transform.image_mean == [0.485, 0.456, 0.406]
    boxes = {"boxes": torch.tensor([[4.0, 4.0, 40.0, 50.0]]), "labels": torch.tensor([1])}
    losses = model([torch.rand(3, 64, 64), torch.rand(3, 64, 64)], [boxes, boxes])
    sum(losses.values()).backward()
    torch.optim.SGD(model.parameters(), 1e-3).step()
    parameters = dict(model.backbone.body.named_parameters())
    assert len(parameters) == 60
    assert all(parameter.grad.abs().max() > 0 for parameter in parameters.values())
    assert not torch.equal(parameters["conv1.weight"], wanted["conv1.weight"])
    exec(to_torch, {})
    assert equal(torch.load("encoder.pth", weights_only=True), wanted)
    exec(to_detectron2, names := {})
    renamed = names["detectron2_names"](load_file("encoder.safetensors"))
    assert len(renamed) == len(wanted)
    stem = {"stem.conv1.weight", "stem.conv1.norm.weight", "stem.conv1.norm.running_var"}
    assert stem | {"res3.0.shortcut.weight", "res3.0.shortcut.norm.bias", "res5.1.conv2.norm.bias"} <= set(renamed)
    assert not [name for name in renamed if "bn" in name or "layer" in name or "downsample" in name]


def test_an_encoder_that_timm_has_not_is_said(tmp_path):
    settings = small_config(tmp_path / "run", "", "model.encoder=vit_s_16")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text(configuration.dumps(settings))
    with pytest.raises(UserError, match="timm has no model with the parameter names of vit_s_16"):
        export_for_timm(tmp_path / "run", tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_an_evaluation_takes_what_an_export_says_of_its_images(tmp_path):
    file = tmp_path / "encoder.safetensors"
    assert _config_of(file, "resnet_tiny", None, []).evaluated_size == 224
    described = {"evaluated_size": 28, "mean": [0.1, 0.2, 0.3], "std": [1.0, 1.0, 2.0], "step": 4}
    file.with_suffix(".json").write_text(json.dumps(described))
    found = _config_of(file, "resnet_tiny", None, [])
    assert (found.evaluated_size, found.augment.mean, found.augment.std) == (28, (0.1, 0.2, 0.3), (1.0, 1.0, 2.0))
    assert _config_of(file, "resnet_tiny", None, ["evaluation.image_size=32"]).evaluated_size == 32
    for other in ("5", "[1]", "{", "{}"):  # another tool's, or none
        file.with_suffix(".json").write_text(other)
        assert _config_of(file, "resnet_tiny", None, []).evaluated_size == 224
