"""View sets: what a config says of them, batches out of real shards, and the same step on any number of ranks."""

from __future__ import annotations

import signal

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from dist_ssl import config as configuration
from dist_ssl.augment import augment
from dist_ssl.augment import parameters as A
from dist_ssl.config import AugmentConfig, Config, UserError, ViewPolicy, ViewsConfig
from dist_ssl.data.manifest import load_manifest
from dist_ssl.data.stream import draw_views, training_batches
from dist_ssl.models import build_model
from dist_ssl.planning import estimate
from dist_ssl.training import step
from tests import trajectory
from tests.benchmarks import traffic
from tests.faults import inject
from tests.pool import ranks
from tests.terminal import dist_ssl
from tests.test_trajectory import relative_error
from tests.trajectory import small_config

# The published sets, as a file has them.
BYOL = """
[[augment.views]]
blur_probability = 1.0

[[augment.views]]
blur_probability = 0.1
solarise_probability = 0.2
"""
SWAV = """
[[augment.views]]
count = 2
min_scale = 0.14

[[augment.views]]
count = 6
crop_size = 96
min_scale = 0.05
max_scale = 0.14
"""
DINO = SWAV.replace("min_scale = 0.14", "min_scale = 0.4").replace("max_scale = 0.14", "max_scale = 0.4")
LEJEPA = SWAV.replace("min_scale = 0.14", "min_scale = 0.3").replace("max_scale = 0.14", "max_scale = 0.3")
SLOW = pytest.mark.slow
MULTI_CROP = "augment.views=[{count=2,min_scale=0.3},{count=6,crop_size=16,min_scale=0.05,max_scale=0.3}]"


def loaded(folder, text, *overrides):
    path = folder / "views.toml"
    path.write_text(text)
    return configuration.load(path, ["train.steps=1", "train.global_batch_size=4", "data.num_workers=0", *overrides])


def first_batch(config, shards):
    manifest = load_manifest(str(shards), config.storage)
    with training_batches(config, manifest, cursor=0, first_step=0, num_steps=1, rank=0, world_size=1) as batches:
        return next(batches)


@pytest.mark.parametrize(
    ("text", "sizes", "scales"),
    [
        (BYOL, [(224, 2)], [(0.08, 1.0)] * 2),
        (SWAV, [(224, 2), (96, 6)], [(0.14, 1.0)] * 2 + [(0.05, 0.14)] * 6),
        (DINO, [(224, 2), (96, 6)], [(0.4, 1.0)] * 2 + [(0.05, 0.4)] * 6),
        (LEJEPA, [(224, 2), (96, 6)], [(0.3, 1.0)] * 2 + [(0.05, 0.3)] * 6),
    ],
    ids=["byol", "swav", "dino", "lejepa"],
)
def test_published_sets_of_views_come_out_of_shards(tmp_path, small_shards, text, sizes, scales):
    config = loaded(tmp_path, text)
    batch, policies = first_batch(config, small_shards), config.augment.policies()
    num_views = sum(views for _, views in sizes)
    assert config.augment.sizes() == sizes
    assert config.augment.num_views == len(policies) == num_views
    assert config.augment.image_size == 224
    assert [(policy.min_scale, policy.max_scale) for policy in policies] == scales
    assert [crops.shape for crops in batch.crops] == [(4, views, 3, side, side) for side, views in sizes]
    assert batch.parameters.shape == (4, num_views, A.NUM_PARAMETERS)
    for (crops, drawn), (side, views) in zip(batch.of_each_size(slice(1, 3)), sizes, strict=True):
        assert augment(crops, drawn, config.augment).shape == (2, views, 3, side, side)
    assert torch.equal(torch.cat([drawn for _, drawn in batch.of_each_size()], dim=1), batch.parameters)


def test_each_view_is_drawn_by_its_own_policy(tmp_path):
    config, n = loaded(tmp_path, BYOL).augment, 4000
    drawn, _ = draw_views(0, np.zeros(n, np.int64), np.arange(n), config)
    assert drawn[:, 0, A.BLUR].min() == 1
    assert drawn[:, 0, A.SOLARISE].max() == 0
    assert abs(drawn[:, 1, A.BLUR].mean() - 0.1) < 0.02
    assert abs(drawn[:, 1, A.SOLARISE].mean() - 0.2) < 0.02
    both = drawn[:, :, A.FLIP].mean(dim=0)
    assert ((both - 0.5).abs() < 0.03).all(), "what a set leaves out is as [augment] says"


def test_crops_are_of_their_views_scale(tmp_path):
    """An image whose red is its row and green its column tells where a crop was."""
    from PIL import Image

    from dist_ssl.data.shards import write_shards
    from dist_ssl.data.sources import open_source

    rows, columns = np.mgrid[0:256, 0:256].astype(np.uint8)
    for number in range(20):
        Image.fromarray(np.stack([rows, columns, columns], axis=-1)).save(tmp_path / f"{number}.png")
    write_shards(open_source(f"folder:{tmp_path}"), str(tmp_path / "shards"), configuration.StorageConfig())
    config = loaded(tmp_path, LEJEPA, "train.global_batch_size=20")
    for crops, policy in zip(
        first_batch(config, tmp_path / "shards").crops, config.augment.policies()[1:3], strict=True
    ):
        least, most = policy.min_scale, policy.max_scale
        spans = crops[:, :, :2].flatten(3).int().aminmax(dim=3)
        areas = ((spans.max - spans.min + 2) / 256).prod(dim=2)
        assert least * 0.85 <= areas.min()
        assert areas.max() <= most * 1.15
        assert areas.max() > areas.min() + 0.5 * (most - least)


def test_the_draws_of_a_view_do_not_depend_on_how_many_there_are():
    epochs, ids = np.array([0, 3]), np.array([7, 2**40])
    two, boxes = draw_views(5, epochs, ids, AugmentConfig())
    one = AugmentConfig().model_copy(update={"views": [ViewsConfig(count=1)]})
    eight = AugmentConfig(views=[ViewsConfig(count=3), ViewsConfig(count=5, crop_size=96)])
    for other in (one, eight):
        drawn, other_boxes = draw_views(5, epochs, ids, other)
        shared = min(2, other.num_views)
        assert torch.equal(drawn[:, :shared], two[:, :shared])
        assert np.array_equal(other_boxes[:, :shared], boxes[:, :shared])
    drawn, _ = draw_views(5, epochs, ids, eight)
    assert len({tuple(row) for row in drawn.flatten(0, 1)[:, A.BRIGHTNESS : A.GREY].tolist()}) == 16


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        ("[[augment.views]]\ncount = 1\n", [], "augment: views: expected at least 2 views of an image, got 1; raise"),
        (
            "[[augment.views]]\n[[augment.views]]\ncrop_size = 96\n[[augment.views]]\n",
            [],
            "expected views of one size side by side, got 1 of 224, 1 of 96, 1 of 224 pixels; reorder the sets",
        ),
        ("[augment]\nmin_scale = 0.5\nmax_scale = 0.2\n", [], "expected min_scale <= max_scale, got 0.5 and 0.2"),
        (SWAV, ["augment.max_scale=0.1"], "expected min_scale <= max_scale, got 0.14 and 0.1"),
        ("[[augment.views]]\ncount = 0\n", [], "augment.views.0.count: input should be greater than or equal to 1"),
        (SWAV, ["augment.views=[{count=2},{size=96}]"], "--set: unknown key 'augment.views.1.size'; did you mean"),
        (BYOL, ["augment.views=[{count=2,min_scale=2}]"], "--set: augment.views.0.min_scale: input should be less"),
        (SWAV, ["model.encoder=vit_s_16"], None),
        (SWAV.replace("96", "98"), ["model.encoder=vit_s_16"], "augment.crop_size: expected a multiple of the ViT's"),
    ],
)  # fmt: skip
def test_mistakes_in_views_are_one_line(tmp_path, text, overrides, expected):
    def build():
        build_model(loaded(tmp_path, text, *overrides))

    if expected is None:
        build()
        return
    with pytest.raises(UserError) as error:
        build()
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_sets_of_views_are_written_read_and_compared(tmp_path):
    config = loaded(tmp_path, SWAV)
    assert configuration.loads(configuration.dumps(config)) == config
    by_set = configuration.with_overrides(
        config, ["augment.views=[{count=2,min_scale=0.14},{count=6,crop_size=96,min_scale=0.05,max_scale=0.14}]"]
    )
    assert by_set == config
    (line,) = configuration.resume_diff(
        config, configuration.with_overrides(config, ["augment.views=[{count=2,min_scale=0.14}]"])
    )
    assert line.startswith("augment.views: [{'count': 2, 'min_scale': 0.14}, {'count': 6, ")
    done = dist_ssl("config", str(tmp_path / "views.toml"), "--set", "augment.max_scale=0.9")
    assert configuration.loads(done.stdout) == configuration.load(tmp_path / "views.toml", ["augment.max_scale=0.9"])
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("views = ")]
    assert line.startswith("views = [{ count = 2, min_scale = 0.14 }, { count = 6, crop_size = 96, ")
    assert line.endswith("# file")
    explained = configuration.explain("augment.views")
    assert [line.split()[:4] for line in explained[:2]] == [
        ["augment.views", "list", "of", "table"],
        ["augment.views.count", "int", ">=", "1,"],
    ]
    assert " ".join(explained[2].split()) == "augment.views.crop_size int >= 8, <= 4096 unset unset: augment.crop_size"
    assert len(explained) == 1 + len(ViewsConfig.model_fields)


def test_every_key_of_a_view_can_be_set_for_a_set():
    assert set(ViewsConfig.model_fields) == {"count", *ViewPolicy.model_fields}


def test_a_run_without_sets_has_two_views_and_an_explicit_pair_is_the_same():
    pair = configuration.with_overrides(Config(), ["augment.views=[{count=2}]"])
    assert pair.augment.policies() == Config().augment.policies()
    assert Config().augment.sizes() == [(224, 2)]


# --- the model ----------------------------------------------------------------------------------------------------


def test_the_encoder_runs_once_a_size_and_rows_are_ordered_by_image_and_view(tmp_path):
    model = build_model(small_config(tmp_path, "", MULTI_CROP)).eval()
    crops = [torch.randn(3, 2, 3, 32, 32), torch.randn(3, 6, 3, 16, 16)]
    calls = []
    model.encoder.register_forward_hook(lambda *_: calls.append(1))
    h, z, _ = (rows.unflatten(0, (3, 8)) for rows in model(*(x.flatten(0, 1) for x in crops)))
    assert len(calls) == 2
    for image in range(3):
        for view, x in enumerate([*crops[0][image], *crops[1][image]]):
            alone = model.encoder(x[None])[0]
            assert torch.allclose(h[image, view], alone, atol=1e-5)
            assert torch.allclose(z[image, view], model.head(alone[None])[0], atol=1e-5)


def test_statistics_are_of_a_sizes_views_in_the_encoder_and_of_all_in_the_head(tmp_path):
    model = build_model(small_config(tmp_path, "", MULTI_CROP))
    torch.manual_seed(0)
    large, small = torch.randn(8, 3, 32, 32), 5 + torch.randn(24, 3, 16, 16)
    h, _, _ = model(large, small)
    counted = model.encoder.stem[1].num_batches_tracked.clone()
    each = [model.encoder(x).unflatten(0, (4, -1)) for x in (large, small)]
    alone = torch.cat(each, dim=1).flatten(0, 1)
    assert torch.equal(h, alone)
    assert counted == 1, "a step is a batch"
    seen = model.head(alone).mean(dim=0)
    assert torch.allclose(seen, torch.zeros_like(seen), atol=1e-5)


@pytest.mark.slow
def test_chunks_are_augmented_one_by_one_and_nothing_waits_for_the_host(tmp_path):
    """A step of a ViT on two sizes, traced as a GPU would take it."""
    keys = ["model.encoder=vit_s_16", "train.global_batch_size=24", "objective.chunks=3", "engine.precision=bf16"]
    config, images, real = loaded(tmp_path, SWAV, *keys), [], step.augment

    def recorded(crops, *rest):
        images.append(len(crops))
        return real(crops, *rest)

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(step, "augment", recorded)
            tracer, num_views = traffic.trace_step(config, 1)
    finally:
        dist.destroy_process_group()
    assert images == [8] * 12, "two sizes of three chunks, in both passes"
    assert num_views == 24 * 8
    assert not tracer.syncs


def test_the_plans_pixels_are_those_of_a_batch(tmp_path, small_shards):
    config = loaded(tmp_path, SWAV, "engine.precision=fp32", "objective.chunks=2", "model.encoder=resnet_tiny")
    batch = first_batch(config, small_shards)
    views = [augment(crops, drawn, config.augment) for crops, drawn in batch.of_each_size(slice(0, 2))]
    held = 4 * sum(crops.nbytes for crops in batch.crops) + sum(of_size.nbytes for of_size in views)
    (row,) = [row for row in estimate.memory(config, estimate.Sizes.of(config, 1, False)) if row.name == "pixels"]
    assert row.value == held


# --- runs ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory, small_shards):
    """(chunks) -> loss and gradient of the first step on one rank."""
    found = {}

    def of(chunks):
        if chunks not in found:
            config = multi_crop(tmp_path_factory.mktemp("one"), small_shards, 0, chunks)
            (found[chunks],) = ranks(1).run(trajectory.loss_and_gradient, config)
        return found[chunks]

    return of


def multi_crop(folder, shards, stage, chunks=1, *overrides):
    keys = [f"engine.zero_stage={stage}", f"objective.chunks={chunks}", "run.seed=7"]
    return small_config(folder, shards, MULTI_CROP, *keys, *overrides)


@pytest.mark.parametrize(
    ("size", "stage", "chunks"),
    [(2, 1, 1), *(pytest.param(*case, marks=SLOW) for case in [(3, 3, 1), (3, 0, 3), (2, 2, 3), (2, 3, 3)])],
)
def test_two_sizes_give_one_gradient_on_any_ranks(tmp_path, small_shards, one_rank, size, stage, chunks):
    loss, gradient = one_rank(chunks)
    for other, other_gradient in ranks(size).run(
        trajectory.loss_and_gradient, multi_crop(tmp_path, small_shards, stage, chunks)
    ):
        assert other == pytest.approx(loss, rel=1e-6)
        assert relative_error(other_gradient, gradient) < 1e-5


@pytest.mark.slow
def test_a_multi_crop_run_is_one_trajectory(tmp_path, small_shards):
    """The same samples and losses on one rank and two, and bit by bit where the two were stopped on the way."""
    runs = {
        name: multi_crop(tmp_path / name, small_shards, 1, 1, "train.steps=8") for name in ("one", "two", "stopped")
    }
    assert ranks(1).run(trajectory.pretrain, runs["one"]) == [0]
    assert ranks(2).run(trajectory.pretrain, runs["two"]) == [0, 0]
    assert trajectory.ledger(tmp_path / "two") == trajectory.ledger(tmp_path / "one")
    losses = trajectory.losses(tmp_path / "two")
    assert losses == pytest.approx(trajectory.losses(tmp_path / "one"), rel=1e-4)
    assert ranks(2).run(inject.pretrain_with_signal, runs["stopped"], 4, signal.SIGTERM) == [75, 75]
    assert len(trajectory.losses(tmp_path / "stopped")) < 8
    assert ranks(2).run(trajectory.pretrain, runs["stopped"]) == [0, 0]
    assert trajectory.losses(tmp_path / "stopped") == losses


@pytest.mark.slow
def test_a_multi_crop_run_is_evaluated_and_reported(tmp_path, small_shards):
    keys = [MULTI_CROP, "train.steps=2", "data.ledger=false"]
    keys += [f"evaluation.{name}_shards='{small_shards}'" for name in ("train", "test")]
    keys += ["evaluation.num_workers=0", "evaluation.num_seeds=1", "evaluation.sgd_epochs=1"]
    config = small_config(tmp_path, small_shards, *keys, "evaluation.probes=['knn','linear_augmented']")
    assert ranks(1).run(trajectory.pretrain, config) == [0]
    done = dist_ssl("evaluate", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (pictures,) = tmp_path.rglob("pictures.npz")
    with np.load(pictures) as found:
        assert found["views"].shape == (4, 8, 3, 32, 32)
    done = dist_ssl("report", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (page,) = tmp_path.rglob("*.html")
    assert page.read_text().count('alt="a view"') == 4 * 8
