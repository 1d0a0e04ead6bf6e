"""The geometry of layers, each number against another way to it: numpy, SciPy, scikit-learn, autograd's Jacobian."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from sklearn.linear_model import Ridge
from sklearn.metrics.pairwise import euclidean_distances

from dist_ssl.config import HeadConfig, ViewPolicy
from dist_ssl.evaluation import evaluate
from dist_ssl.evaluation.factor_weights import evenness, factor_weight
from dist_ssl.evaluation.features import open_split
from dist_ssl.evaluation.geometry import (
    alignment_and_uniformity,
    directions,
    lidar,
    matrix_entropy,
    matrix_information,
    trained_on,
)
from dist_ssl.evaluation.jacobian import gains, stretched
from dist_ssl.evaluation.linear import Rows
from dist_ssl.evaluation.results import accuracy_matrix
from dist_ssl.evaluation.spectrum import spectrum
from dist_ssl.evaluation.views import draw, views
from dist_ssl.models import ProjectionHead
from dist_ssl.report.geometry import geometry as section
from dist_ssl.report.geometry import matrix
from tests.pool import ranks
from tests.test_evaluation_frozen import CPU, config_of, labelled, subject_of  # noqa: F401


def features_of_rank(rank=9, dim=16, count=200):
    """Singular values 1, 1/2, 1/4, ... in `rank` directions about a mean that is not 0."""
    generator = np.random.default_rng(0)
    left = np.linalg.qr(generator.normal(size=(count, rank)))[0]
    right = np.linalg.qr(generator.normal(size=(dim, rank)))[0]
    values = left * 0.5 ** np.arange(rank) * math.sqrt(count) @ right.T + generator.normal(size=dim)
    return values.astype(np.float32)


def test_a_spectrum_is_that_of_numpys_singular_values():
    x = features_of_rank()
    found = spectrum(Rows(x, np.zeros(len(x))))
    wide = x.astype(np.float64)
    centred = np.linalg.svd(wide - wide.mean(0), compute_uv=False)
    shares = centred**2 / centred[0] ** 2
    assert (found["dim"], found["rank"]) == (16, np.linalg.matrix_rank(wide - wide.mean(0), tol=1e-6 * centred[0]))
    assert found["above"] == [int((shares > level).sum()) for level in (1e-1, 1e-2, 1e-3, 1e-4)]
    assert found["condition"] == pytest.approx(centred[0] / centred[found["rank"] - 1], rel=1e-4)
    assert [number for number, _ in found["spectrum"]] == list(range(9))
    assert [log for _, log in found["spectrum"]] == pytest.approx(np.log10(shares[:9]), abs=1e-4)
    values = np.linalg.svd(wide, compute_uv=False)
    p = values / values.sum() + 1e-7
    assert found["rankme"] == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-5)
    flat = spectrum(Rows(np.ones((5, 3), np.float32), np.zeros(5)))
    assert (flat["rank"], flat["spectrum"], flat["condition"]) == (0, [], 1.0)


def views_nvd(count=40, num_views=3, dim=6):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 1, dim, generator=generator)
    return images + 0.3 * torch.randn(count, num_views, dim, generator=generator)


def test_alignment_and_uniformity_are_means_over_pairs():
    x = views_nvd()
    unit = (x / x.norm(dim=2, keepdim=True)).double().numpy()
    own = [np.sum((v[a] - v[b]) ** 2) for v in unit for a in range(3) for b in range(a)]
    squares = euclidean_distances(unit.reshape(120, 6), squared=True)
    image = np.arange(120) // 3
    potential = np.exp(-2 * squares[image[:, None] != image]).mean()
    found = alignment_and_uniformity(x)
    assert found["alignment"] == pytest.approx(np.mean(own), rel=1e-6)
    assert found["uniformity"] == pytest.approx(np.log(potential), rel=1e-6)


def test_lidar_is_the_smooth_rank_of_the_papers_matrix():
    x = views_nvd().double().numpy()
    means = x.mean(1)
    within = np.mean([np.outer(d, d) for d in (x - means[:, None]).reshape(-1, 6)], axis=0) + 1e-4 * np.eye(6)
    between = np.cov(means.T, bias=True)
    root = np.linalg.inv(sqrtm(within))
    values = np.linalg.eigvalsh(root @ between @ root)
    p = values / values.sum() + 1e-7
    assert lidar(torch.from_numpy(x)) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-6)


def test_matrix_information_is_that_of_renyis_entropies():
    a, b = (torch.randn(30, dim, generator=torch.Generator().manual_seed(dim)) for dim in (5, 7))
    grams = [(rows @ rows.T).double().numpy() for rows in (a, b)]
    grams = [gram / np.sqrt(np.outer(np.diag(gram), np.diag(gram))) for gram in grams]
    entropies = [-np.log((np.linalg.eigvalsh(gram / 30) ** 2).sum()) for gram in (*grams, grams[0] * grams[1])]
    assert matrix_information(a, b) == pytest.approx(entropies[0] + entropies[1] - entropies[2], rel=1e-5)
    assert matrix_information(torch.eye(30), torch.eye(30)) == pytest.approx(math.log(30))
    same = torch.ones(30, 5) + 0.1 * a  # all rows much alike: I(a; b) is below H(a), though I(a; a) is lower still
    found = [matrix_information(same, other) for other in (b, same)]
    assert found[1] < found[0] <= matrix_entropy(_gram(same))


def _gram(rows: torch.Tensor) -> torch.Tensor:
    unit = torch.nn.functional.normalize(rows.double(), dim=1)
    return unit @ unit.T


def test_a_factors_weight_is_how_far_the_layer_moves_along_it():
    generator = np.random.default_rng(0)
    y = generator.integers(0, 2, (2, 3000))
    directions_of = np.linalg.qr(generator.normal(size=(10, 2)))[0]
    strengths = np.array([3.0, 0.5])
    signs = 2 * y.T - 1
    x = (signs * strengths) @ directions_of.T + 0.01 * generator.normal(size=(3000, 10))
    found = [factor_weight(x[:2000], one[:2000], x[2000:], one[2000:]) for one in y]
    total = math.sqrt(x[:2000].var(0).sum())
    assert found == pytest.approx(strengths / total, rel=0.05)
    assert found == pytest.approx([factor_weight(7 * x[:2000], a[:2000], 7 * x[2000:], a[2000:]) for a in y])
    # Against scikit-learn's ridge, of four values and noise in the way.
    values, noisy = generator.integers(0, 4, 3000), x + generator.normal(size=(3000, 10))
    noisy[:, 0] += values
    targets = [
        (np.eye(4)[part] - np.eye(4)[part].mean(0)) / np.eye(4)[part].std(0) for part in (values[:2000], values[2000:])
    ]
    spread = noisy[:2000].var(0).sum()
    ridge = Ridge(alpha=1e-3 * spread / 10 * 2000).fit(noisy[:2000], targets[0])
    along = noisy[2000:] @ (ridge.coef_ / np.linalg.norm(ridge.coef_, axis=1, keepdims=True)).T / math.sqrt(spread)
    expected = [np.cov(along[:, k], targets[1][:, k], bias=True)[0, 1] for k in range(4)]
    got = factor_weight(noisy[:2000], values[:2000], noisy[2000:], values[2000:])
    assert got == pytest.approx(np.sqrt(np.mean(np.maximum(expected, 0) ** 2)), rel=1e-6)
    assert factor_weight(x[:2000], generator.integers(0, 2, 2000), x[2000:], y[0, :1000]) < 0.1 * found[0]
    assert evenness([1, 1, 1]) == pytest.approx(1)
    assert evenness([1, 3]) == pytest.approx(-(0.25 * np.log2(0.25) + 0.75 * np.log2(0.75)))
    assert evenness([1]) is None


def test_the_matrix_names_the_layer_that_wins():
    probes = {"linear": {"h": 0.7, "z": 0.8, "pixels": 0.9}, "fine_tuned": {"h": 0.9}}
    results = {
        "layers": ["h", "z", "h_untrained", "pixels"],
        "probes": {probe: {layer: {"top1": top1} for layer, top1 in of.items()} for probe, of in probes.items()},
        "head_information": {"tasks": {"zoom": {"layers": {"h": {"accuracy": 0.5}, "z": {"accuracy": 0.5}}}}},
    }
    assert accuracy_matrix(results) == {
        "class, linear": {"accuracy": {"h": 0.7, "z": 0.8}, "best": "z"},
        "zoom": {"accuracy": {"h": 0.5, "z": 0.5}, "best": "h"},
    }
    assert "Won: h 1, z 1." in matrix(results)
    assert "<b>80.0%</b>" in matrix(results)


HEADS = [{"kind": "mlp", "num_layers": 3}, {"kind": "shortcut"}, {"kind": "discrete"}, {"kind": "sae", "l1": 0.1}]


@pytest.mark.parametrize("keys", HEADS, ids=lambda keys: keys["kind"])
def test_gains_are_those_of_autograds_whole_jacobian(keys):
    torch.manual_seed(0)
    config = HeadConfig(**{"hidden_dim": 16, "output_dim": 8, "latent_dim": 32, "top_k": 3} | keys)
    head = ProjectionHead(12, config).eval().requires_grad_(False)
    h, steps = torch.randn(20, 12), {name: torch.randn(20, 12) for name in ("some", "half", "still")}
    steps["half"][10:], steps["still"][:] = 0, 0
    found = gains(head, h, steps)
    jacobians = [torch.autograd.functional.jacobian(lambda x: head(x[None])[0], row) for row in h]
    usual = [jacobian.norm().item() / math.sqrt(12) for jacobian in jacobians]
    assert set(found) == {"some", "half"}
    for name, moved in (("some", 20), ("half", 10)):
        v = steps[name][:moved]
        expected = torch.stack([j @ one for j, one in zip(jacobians, v, strict=False)]).norm(dim=1) / v.norm(dim=1)
        assert torch.allclose(stretched(head, h[:moved], v), expected, rtol=1e-4)
        assert found[name]["images"] == moved
        # Random directions are 32 of those that the Frobenius norm is the mean of.
        assert found[name]["gain"] == pytest.approx(np.mean(expected.numpy() / usual[:moved]), rel=0.05)
        assert found[name]["interval"][0] < found[name]["gain"] < found[name]["interval"][1]


def test_a_direction_is_one_augmentation_alone(labelled):  # noqa: F811
    config = config_of(labelled)
    test = open_split("test", config, CPU)
    batch = next(iter(test.batches()))
    images, ids = batch.images[:12], batch.sample_ids[:12].numpy()
    policies = directions(config)
    assert list(policies) == [
        "crop", "flip", "brightness", "contrast", "saturation", "hue", "grey", "blur", "solarise"
    ]  # fmt: skip
    assert trained_on(config) == set(policies) - {"solarise"}
    pixels = test.pixels(images)
    flipped = views(test, images, [policies["flip"]], *draw(ids, [policies["flip"]]))[:, 0]
    assert torch.allclose(flipped, pixels.flip(-1), atol=1e-5)
    grey = views(test, images, [policies["grey"]], *draw(ids, [policies["grey"]]))[:, 0]
    std, mean = (torch.tensor(one)[:, None, None] for one in (config.augment.std, config.augment.mean))
    assert torch.allclose((grey * std + mean)[:, 0], (grey * std + mean)[:, 2], atol=1e-5)
    still = ViewPolicy(**policies["flip"].model_dump() | {"flip_probability": 0.0})
    assert torch.allclose(views(test, images, [still], *draw(ids, [still]))[:, 0], pixels, atol=1e-5)


def _geometry(data, folder):
    from pathlib import Path

    config = config_of(data, probes=["geometry"], geometry_images=17, batch_size_per_rank=8)
    found = evaluate.evaluate(subject_of(config, Path(folder)), CPU).values["geometry"]
    # Its batch-norm statistics are a mean over batches, which are other ones on other ranks.
    assert set(found["layers"].pop("h_untrained")) == {"dim", "spectrum", "above", "rank", "condition", "rankme"}
    return found


@pytest.mark.slow
def test_three_ranks_find_what_one_finds(labelled, tmp_path):  # noqa: F811
    alone = _geometry(labelled, tmp_path / "one")
    assert alone["images"] == 17
    page = section({"geometry": alone})
    assert f"I(h; z) = {alone['head']['information']:.2f} nats" in page
    assert page.count("<svg") == 2
    assert section({}) == ""
    assert set(alone["layers"]) == {"h", "g1", "z"}
    assert set(alone["head"]["gains"]) >= {"crop", "flip", "brightness", "hue", "grey", "solarise", "another image"}
    for other in ranks(3).run(_geometry, str(labelled), str(tmp_path / "three")):
        assert_close(other, alone)


def assert_close(a, b):
    """Numbers to 1e-3 (h itself is rounded otherwise in other batches), all else equal."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_close(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_close(one, other)
    elif isinstance(a, float):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-3)
    else:
        assert a == b
