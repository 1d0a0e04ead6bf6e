"""timm's models as encoders: a dozen families train on two ranks as on one; sizes, decay, recomputation, mistakes."""

import importlib.util
import os
import shutil

import pytest
import timm
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from dist_ssl import checkpoint
from dist_ssl.config import UserError
from dist_ssl.engine import optimizers
from dist_ssl.evaluation import evaluate
from dist_ssl.evaluation.frozen import with_batch_statistics
from dist_ssl.models import GlobalBatchNorm, Rows, build_encoder, build_model, build_teacher, from_timm
from dist_ssl.models.drop_path import DropPath
from dist_ssl.planning import before_start
from dist_ssl.report.timm_folder import export_for_timm
from tests import trajectory
from tests.pool import ranks
from tests.test_trajectory import relative_error
from tests.trajectory import small_config

# (name, side, drop path): the smallest of a family, at the smallest size that works.
FAMILIES = [
    ("vit_tiny_patch16_224", 32, 0.2),
    ("mobilenetv3_small_050", 32, 0.2),
    ("resnet18", 32, 0.0),
    ("resnet26d", 32, 0.2),
    ("convnext_atto", 32, 0.2),
    ("vit_small_patch14_reg4_dinov2", 28, 0.2),
    ("eva02_tiny_patch14_224", 28, 0.0),
    ("swin_tiny_patch4_window7_224", 32, 0.2),
    ("efficientnet_lite0", 32, 0.2),
    ("regnetx_002", 32, 0.0),
    ("pit_ti_224", 32, 0.0),
    ("levit_128s", 64, 0.2),
]
ASKED = [  # 2 minutes more: DIST_SSL_EVERY_FAMILY=1 pytest tests/test_timm.py
    ("resnetv2_50", 32, 0.0),
    ("convnextv2_atto", 32, 0.0),
    ("mixer_s16_224", 32, 0.0),
    ("xcit_nano_12_p16_224", 32, 0.2),
    ("nextvit_small", 32, 0.0),
    ("densenet121", 32, 0.0),
    ("repvit_m0_9", 32, 0.0),
]
if os.environ.get("DIST_SSL_EVERY_FAMILY"):
    FAMILIES += ASKED
TINY = "timm/vit_tiny_patch16_224"
NORMED = "timm/mobilenetv3_small_050"


def timm_config(run_dir, shards, encoder, side=32, *overrides):
    values = [f"model.encoder={encoder}", f"augment.crop_size={side}", "train.global_batch_size=7", *overrides]
    return small_config(run_dir, shards, *values)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "side", "drop"), FAMILIES)
def test_a_step_on_two_ranks_is_that_of_one(tmp_path, small_shards, name, side, drop):
    overrides = [f"model.drop_path_rate={drop}", "augment.min_scale=0.5"]
    one = timm_config(tmp_path, small_shards, f"timm/{name}", side, *overrides, "engine.zero_stage=0")
    ((loss, gradient),) = ranks(1).run(trajectory.loss_and_gradient, one)
    two = timm_config(tmp_path, small_shards, f"timm/{name}", side, *overrides)
    for other_loss, other_gradient in ranks(2).run(trajectory.loss_and_gradient, two):
        error = relative_error(other_gradient, gradient)
        print(f"{name} at {side}: loss {abs(other_loss / loss - 1):.1e}, gradient {error:.1e} off")
        assert other_loss == pytest.approx(loss, rel=4e-6)  # pit_ti is 0 off by itself, 1.5e-6 in a whole session
        assert error < 1e-5


@pytest.mark.parametrize(
    "name",
    ["mobilenetv3_small_050", *(pytest.param(name, marks=pytest.mark.slow) for name in ("resnetv2_50", "levit_128s"))],
)
def test_h_is_timms_and_every_batch_norm_is_global(name):
    torch.manual_seed(1)
    ours = build_encoder(f"timm/{name}", 64)
    torch.manual_seed(1)
    options = {"img_size": 64} if name.startswith("levit") else {}
    theirs = timm.create_model(name, num_classes=0, **options)
    norms = [module for module in ours.modules() if isinstance(module, _BatchNorm)]
    assert norms
    assert all(isinstance(norm, GlobalBatchNorm) for norm in norms)
    x = torch.randn(4, 3, 64, 64)
    for training in (False, True):  # in training the statistics of one rank are those of the batch
        torch.testing.assert_close(ours.train(training)(x), theirs.train(training)(x), rtol=1e-3, atol=1e-4)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert ours.output_dim == ours(x).shape[1]


@pytest.mark.slow
def test_tokens_positions_and_tables_are_not_decayed(tmp_path):
    """A list of suffixes had missed cls_token and pos_embed."""
    expected = {
        "vit_small_patch14_reg4_dinov2": {"pos_embed", "cls_token", "reg_token"},
        "swin_tiny_patch4_window7_224": {"layers.0.blocks.0.attn.relative_position_bias_table"},
    }
    for name, named in expected.items():
        model = build_model(timm_config(tmp_path, "", f"timm/{name}", 28))
        names = {id(p): name for name, p in model.named_parameters()}
        adapted, plain = optimizers.parameter_groups(model, 0.1)
        assert {f"encoder.{one}" for one in named} <= {names[id(p)] for p in plain["params"]}
        assert (adapted["adapt"], plain["adapt"], plain["weight_decay"]) == (True, False, 0.0)
        assert all(p.ndim > 1 for p in adapted["params"])


@pytest.mark.slow
def test_other_sizes_are_resampled_to_or_refused(tmp_path):
    two_sizes = 'augment.views=[{"count"=2}, {"count"=2, "crop_size"=16}]'
    h, _, _ = build_model(timm_config(tmp_path, "", TINY, 32, two_sizes))(
        torch.randn(2, 3, 32, 32), torch.randn(2, 3, 16, 16)
    )
    assert h.shape == (4, 192)
    refused = r"augment\.crop_size: timm/mixer_s16_224 does not take images of 16 x 16 pixels: "
    with pytest.raises(UserError, match=refused):
        build_model(timm_config(tmp_path, "", "timm/mixer_s16_224", 32, two_sizes))
    with pytest.raises(UserError, match=r"evaluation\.image_size: timm/mixer_s16_224 does not take .* 48 x 48"):
        build_encoder("timm/mixer_s16_224", 32)(torch.randn(1, 3, 48, 48))


def test_statistics_are_those_of_images_of_a_side_that_is_new():
    encoder = build_encoder("timm/resnet18", 32)
    with_batch_statistics(encoder, [3 + torch.randn(8, 3, 64, 64) for _ in range(2)])
    assert (encoder.bn1.num_batches_tracked, encoder.bn1.training) == (2, False)
    assert encoder.bn1.running_mean.abs().mean() > 0.1


@pytest.mark.parametrize("encoder", [NORMED, pytest.param(TINY, marks=pytest.mark.slow)])
def test_recomputation_is_exact(tmp_path, encoder):
    """The same gradient, and running statistics that have counted the batch once."""
    found = []
    for recomputing in ("false", "true"):
        overrides = [f"model.activation_checkpointing={recomputing}", "model.drop_path_rate=0.5"]
        model = build_model(timm_config(tmp_path, "", encoder, 32, *overrides))
        model.of(Rows(7, 0, 4, 4))
        x = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        model(x)[1].square().sum().backward()
        found.append([p.grad for p in model.parameters()] + list(model.buffers()))
    assert all(torch.equal(plain, again) for plain, again in zip(*found, strict=True))


def test_paths_are_dropped_by_the_place_in_the_global_batch():
    layer = DropPath()
    layer.drop_prob, layer.scale_by_keep, layer.layer = 0.5, True, 3
    x = torch.ones(12, 2, 2)  # 6 images, 2 rows each

    def draws(seed, first, count, total=6):
        layer.of(Rows(seed, first, count, total))
        rows = x[first * 2 : (first + count) * 2]
        return layer(rows), layer(rows)

    whole = draws(1, 0, 6)
    assert set(whole[0].unique().tolist()) == {0.0, 2.0}
    assert torch.equal(torch.cat([draws(1, 0, 1)[0], draws(1, 1, 5)[0]]), whole[0])
    assert not torch.equal(*whole)  # a layer that is passed twice
    assert not torch.equal(draws(2, 0, 6)[0], whole[0])
    assert torch.equal(layer.eval()(x), x)


def test_a_teacher_drops_nothing(tmp_path):
    config = timm_config(tmp_path, "", TINY, 32, "model.drop_path_rate=0.5", "objective.name=byol")
    assert max(m.drop_prob for m in build_model(config).modules() if isinstance(m, DropPath)) == 0.5
    assert {m.drop_prob for m in build_teacher(config).modules() if isinstance(m, DropPath)} == {0.0}


MISTAKES = [
    (["model.encoder=timm/resnt18"], r"got 'timm/resnt18'; did you mean 'timm/resnet18'\?"),
    (["model.encoder=timm/resnet18.a1_in1k"], r"did you mean 'timm/resnet18'\? \(weights come by model\.init\)"),
    (["model.encoder=timm/hf-hub:someone/thing"], r"did you mean 'timm/"),
    (["model.encoder=timm/vgg11", "model.drop_path_rate=0.1"], r"model\.drop_path_rate: timm/vgg11 has none"),
    (["model.encoder=timm/vit_tiny_patch16_224", "augment.crop_size=40"], r"augment\.crop_size: timm/vit_tiny"),
    (["model.drop_path_rate=0.1"], "drop_path_rate: expected 0, since only timm/ encoders have it, got 0.1"),
]


@pytest.mark.parametrize(("overrides", "said"), MISTAKES, ids=[" ".join(overrides) for overrides, _ in MISTAKES])
def test_a_mistake_says_what_is_known(tmp_path, overrides, said):
    with pytest.raises(UserError, match=said):
        build_model(small_config(tmp_path, "", *overrides))


def test_a_norm_that_would_be_of_one_rank_is_refused():
    for norm in (torch.nn.SyncBatchNorm(4), timm.layers.EvoNorm2dB0(4)):
        with pytest.raises(UserError, match=f"timm/x has {type(norm).__name__}, whose statistics would be of one"):
            from_timm._make_global(torch.nn.Sequential(norm), "x")


def test_without_timm_the_command_that_installs_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = timm_config(tmp_path, "x", TINY)
    for ask in (before_start.check_extras, build_model):
        with pytest.raises(UserError, match=r"timm is not installed here; pip install timm"):
            ask(config)


@pytest.mark.slow
@pytest.mark.parametrize(("encoder", "side"), [(NORMED, 32), ("timm/levit_128s", 64)])
def test_a_run_is_resumed_to_the_bit_evaluated_and_exported(tmp_path, small_shards, encoder, side):
    overrides = [
        "model.drop_path_rate=0.2",
        "train.steps=2",
        "checkpoint.every_steps=1",
        "diagnostics.online_probe=false",
    ]
    config = timm_config(tmp_path / "run", small_shards, encoder, side, *overrides)
    assert ranks(2).run(trajectory.pretrain, config) == [0, 0]
    _, _, whole = checkpoint.load_run(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000002")
    assert ranks(2).run(trajectory.pretrain, config) == [0, 0]
    _, step, resumed = checkpoint.load_run(tmp_path / "run")
    assert step == 2
    assert all(torch.equal(tensor, resumed.state_dict()[name]) for name, tensor in whole.state_dict().items())

    probes = ['evaluation.probes=["knn"]', "evaluation.num_workers=0", "evaluation.num_seeds=1"]
    shards = [f"evaluation.{split}_shards={small_shards}" for split in ("train", "test")]
    subject = evaluate.run_subject(tmp_path / "run", None, [*probes, *shards])
    assert "h" in evaluate.evaluate(subject, torch.device("cpu")).values["probes"]["knn"]

    assert export_for_timm(tmp_path / "run", tmp_path / "folder") == 2
    theirs = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True).eval()
    x = torch.randn(2, 3, side, side)
    torch.testing.assert_close(theirs(x), resumed.encoder(x), rtol=1e-4, atol=1e-5)
    card = (tmp_path / "folder" / "README.md").read_text()
    assert "| layer | kNN |" in card
    assert "--format timm" in card
    assert not (tmp_path / "folder" / "model.json").exists()
