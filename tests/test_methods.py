"""Each method in training: the same on any number of ranks, in chunks, and with its own metrics and alarms."""

import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dist_ssl import checkpoint, distributed, objective
from dist_ssl import config as config_module
from dist_ssl.config import METHODS, WITH_PREDICTOR, WITH_TEACHER
from dist_ssl.models import build_model, build_teacher
from dist_ssl.planning import method_costs
from dist_ssl.training import method
from tests import trajectory
from tests.counting import Count
from tests.pool import ranks
from tests.test_trajectory import relative_error
from tests.trajectory import small_config

NEW = [name for name in METHODS if name != "nt_xent"]
QUICK = ("byol", "vicreg")
EACH = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NEW]
STEPS = 4
OWN_METRICS = {
    "nt_xent": {"loss_gap", "temperature"},
    "decoupled": {"loss_gap", "temperature"},
    "supervised": {"loss_gap", "temperature"},
    "moco_v3": {"query_accuracy", "temperature"},
    "byol": {"prediction_similarity", "std_z"},
    "simsiam": {"prediction_similarity", "std_z"},
    "vicreg": {"invariance", "off_diagonal", "std_z", "low_std_share"},
    "barlow_twins": {"diagonal", "off_diagonal"},
    "lejepa": {"prediction", "sigreg", "std_z", "low_std_share"},
}


def of_method(folder, shards, name, *overrides):
    return small_config(folder, shards, f"objective.name={name}", f"train.steps={STEPS}", *overrides)


@pytest.mark.parametrize("name", EACH)
def test_a_run_is_the_same_on_one_rank_and_on_two(tmp_path, small_shards, name):
    one = of_method(tmp_path / "1", small_shards, name, "engine.zero_stage=0")
    two = of_method(tmp_path / "2", small_shards, name, "engine.zero_stage=2")
    assert ranks(1).run(trajectory.pretrain, one) == [0]
    assert ranks(2).run(trajectory.pretrain, two) == [0, 0]
    expected, found = trajectory.losses(tmp_path / "1"), trajectory.losses(tmp_path / "2")
    # SimSiam's loss begins near 0, where it is a difference of cosines.
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert len(set(found)) == STEPS
    assert trajectory.ledger(tmp_path / "1") == trajectory.ledger(tmp_path / "2")
    last = json.loads((tmp_path / "2" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last.keys() >= OWN_METRICS[name]
    assert not set(last) & (set.union(*OWN_METRICS.values()) - OWN_METRICS[name])


@pytest.mark.parametrize("name", EACH)
def test_same_loss_and_gradient_from_equal_weights(tmp_path, small_shards, name):
    shared = ["objective.chunks=3", "run.seed=7"]
    one = of_method(tmp_path, small_shards, name, "engine.zero_stage=0", *shared)
    ((loss, gradient),) = ranks(1).run(trajectory.loss_and_gradient, one)
    many = of_method(tmp_path, small_shards, name, "engine.zero_stage=2", *shared)
    for other_loss, other_gradient in ranks(3).run(trajectory.loss_and_gradient, many):
        assert other_loss == pytest.approx(loss, rel=1e-6, abs=1e-7)
        assert relative_error(other_gradient, gradient) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_chunks_give_the_gradient_of_the_whole_batch(tmp_path, small_shards, name):
    """Without batch norm, whose statistics are a chunk's: a ViT, and no batch norm in head and predictor."""
    shared = ["model.encoder=timm/vit_tiny_patch16_224", "model.head.batch_norm=false", "train.global_batch_size=7"]
    shared += ["model.predictor.batch_norm=false"] if name in WITH_PREDICTOR else []
    found = [
        ranks(1).run(
            trajectory.loss_and_gradient, of_method(tmp_path, small_shards, name, f"objective.chunks={chunks}", *shared)
        )[0]
        for chunks in (1, 3)
    ]
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5, abs=1e-6)
    assert relative_error(found[1][1], found[0][1]) < 1e-5


def test_batch_norm_counts_a_chunk_once(tmp_path, small_shards):
    """Each chunk passes the student twice, first without a graph, and the teacher once."""
    config = of_method(tmp_path, small_shards, "byol", "train.steps=2", "objective.chunks=3")
    assert ranks(2).run(trajectory.pretrain, config) == [0, 0]
    for teacher in (False, True):
        model = checkpoint.load_run(tmp_path, teacher=teacher)[2]
        assert {int(t) for name, t in model.state_dict().items() if "num_batches" in name} == {2 * 3}


def test_who_has_a_predictor(tmp_path):
    for name in METHODS:
        model = build_model(of_method(tmp_path, "", name))
        names = {parameter.split(".")[0] for parameter, _ in model.named_parameters()}
        assert names == {"encoder", "head"} | ({"predictor"} if name in WITH_PREDICTOR else set())
    config = of_method(tmp_path, "", "byol")
    layers = [(type(layer).__name__, tuple(layer.weight.shape)) for layer in _weighted(build_model(config).predictor)]
    assert layers == [("Linear", (32, 16)), ("GlobalBatchNorm", (32,)), ("Linear", (16, 32))]
    config = of_method(tmp_path, "", "byol", "model.predictor.hidden_dim=4", "model.predictor.last_batch_norm=true")
    layers = [(type(layer).__name__, tuple(layer.weight.shape)) for layer in _weighted(build_model(config).predictor)]
    assert layers == [("Linear", (4, 16)), ("GlobalBatchNorm", (4,)), ("Linear", (16, 4)), ("GlobalBatchNorm", (16,))]
    assert build_model(of_method(tmp_path, "", "byol", "model.predictor.kind=none")).predictor is None


def _weighted(module):
    return [layer for layer in module.modules() if getattr(layer, "weight", None) is not None]


def test_a_predictor_moves_no_weight_of_encoder_and_head(tmp_path):
    plain, predicting = (build_model(of_method(tmp_path, "", name)).state_dict() for name in ("nt_xent", "simsiam"))
    assert all(torch.equal(predicting[name], tensor) for name, tensor in plain.items())


# --- LeJEPA ---------------------------------------------------------------------------------------------------------

VIEWS, GLOBAL = 5, slice(1, 3)


def lejepa_naive(z, step, weight):
    n, num_views, d = z.shape
    distance = 0.0
    for i in range(n):
        centre = (z[i, 1] + z[i, 2]) / 2
        distance = distance + sum(((z[i, v] - centre) ** 2).sum() for v in range(num_views))
    spread = sum(objective.sigreg(z[:, v], 3, step, 9) for v in range(num_views)) / num_views
    return (1 - weight) * distance / (n * num_views * d) + weight * spread


def lejepa_of_rank(z, rows):
    first = sum(rows[: distributed.rank()])
    own = z[first : first + rows[distributed.rank()]].clone().requires_grad_()
    loss = objective.lejepa(own, 3, 11, 0.3, 9, global_views=GLOBAL, rows_per_rank=rows)
    with Count() as count:
        (gradient,) = torch.autograd.grad(loss, own)
    assert not count.collectives
    return loss.detach(), gradient


@pytest.mark.parametrize("rows", [[7], [3, 4], [4, 1, 2]])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_lejepa_is_the_naive_sum(rows, dtype, tolerance):
    whole = torch.randn(7, VIEWS, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    expected = lejepa_naive(whole, 11, 0.3)
    (gradient,) = torch.autograd.grad(expected, whole)
    expected = expected.detach()
    answers = ranks(len(rows)).run(lejepa_of_rank, whole.detach().to(dtype), rows)
    loss = sum(value for value, _ in answers) / len(rows)
    got = torch.cat([own for _, own in answers]) / len(rows)
    assert abs(float(loss) - float(expected)) <= tolerance * abs(float(expected))
    assert float((got - gradient).norm()) <= tolerance * float(gradient.norm())


def test_lejepa_says_what_is_wrong():
    z = torch.randn(4, 2, 3)
    with pytest.raises(ValueError, match="expected a 1 - weight of at least 0"):
        objective.lejepa(z, 0, 0, 1.5)
    with pytest.raises(ValueError, match=r"lejepa: rank 0: expected z of one shape \(n, V, d\)"):
        objective.lejepa(z[:, 0], 0, 0)


# --- metrics, alarms, plan ------------------------------------------------------------------------------------------


def measured(tmp_path, name, z, p, target, loss=0.0):
    config = of_method(tmp_path, "", name, f"train.global_batch_size={max(len(z), 2)}")
    return {key: float(value) for key, value in method.measure(config, torch.tensor(loss), z, p, target).items()}


def test_metrics_are_the_naive_loops(tmp_path):
    generator = torch.Generator().manual_seed(0)
    z, p, target = (torch.randn(12, 2, 6, generator=generator) for _ in range(3))
    z1, z2 = z.unbind(1)
    found = measured(tmp_path, "vicreg", z, p, target)
    covariances = [np.cov(x.numpy().T) for x in (z1, z2)]
    off = [np.square(c).sum() - np.square(np.diag(c)).sum() for c in covariances]
    assert found["off_diagonal"] == pytest.approx(np.mean(off) / 6, rel=1e-5)
    assert found["invariance"] == pytest.approx(float(((z1 - z2) ** 2).mean()), rel=1e-5)
    stds = np.concatenate([x.numpy().std(axis=0, ddof=1) for x in (z1, z2)])
    assert found["std_z"] == pytest.approx(stds.mean(), rel=1e-5)
    squeezed = z.clone()
    squeezed[..., :2] *= 0.01
    assert measured(tmp_path, "vicreg", squeezed, p, target)["low_std_share"] == pytest.approx(1 / 3)
    found = measured(tmp_path, "barlow_twins", z, p, target)
    correlation = np.corrcoef(z1.numpy().T, z2.numpy().T)[:6, 6:]
    assert found["diagonal"] == pytest.approx(np.diag(correlation).mean(), abs=1e-4)
    off_square = (np.square(correlation).sum() - np.square(np.diag(correlation)).sum()) / 30
    assert found["off_diagonal"] == pytest.approx(off_square, rel=1e-3)
    found = measured(tmp_path, "byol", z, p, target)
    cosines = [F.cosine_similarity(p[i, a], target[i, 1 - a], dim=0) for i in range(12) for a in range(2)]
    assert found["prediction_similarity"] == pytest.approx(float(np.mean(cosines)), abs=1e-6)
    assert measured(tmp_path, "simsiam", z, p, target)["std_z"] == pytest.approx(1.0, abs=0.1)
    assert measured(tmp_path, "simsiam", torch.ones(12, 2, 6), p, target)["std_z"] == pytest.approx(0.0, abs=1e-6)
    assert measured(tmp_path, "moco_v3", z, target.flip(1), target)["query_accuracy"] == 1.0
    assert measured(tmp_path, "moco_v3", z, -target.flip(1), target)["query_accuracy"] == 0.0
    loss = float(objective.lejepa(z, 0, 5))
    found = measured(tmp_path, "lejepa", z, p, target, loss)
    assert found["sigreg"] == pytest.approx(float(objective.sigreg(z, 0, 5)), rel=1e-4)
    assert measured(tmp_path, "nt_xent", z, p, target) == {}
    assert measured(tmp_path, "vicreg", z[:1], p, target) == {}  # one image has no deviation


def test_alarms_say_what_to_try():
    late = {"step": 500.0}
    for metrics, start in (
        ({"low_std_share": 0.8, "std_z": 0.05}, "collapse: 80% of z's dimensions"),
        ({"std_z": 0.05}, "collapse: the deviation of normalised z is 0.050"),
        ({"diagonal": 0.01}, "nothing learned: z's dimensions correlate by 0.010"),
        ({"query_accuracy": 0.001}, "nothing learned: 0.1% of the queries"),
    ):
        (said,) = method.alarms(metrics | late)
        assert said.startswith(start)
        assert "try" in said
        assert method.alarms(metrics | {"step": 10.0}) == []
    assert method.alarms({"low_std_share": 0.1, "std_z": 0.9, "diagonal": 0.8, "query_accuracy": 0.5} | late) == []


def loss_sends(config):
    rows = [config.train.global_batch_size // distributed.world_size()] * distributed.world_size()
    n = rows[0]
    p, target = (torch.randn(n, 2, config.model.head.output_dim) for _ in range(2))
    batch = type("Batch", (), {"sample_ids": torch.arange(n), "labels": torch.full((n,), -1)})()
    with Count() as count:
        method.loss_of(config, p, target, batch, rows, 0)
    return count.wire_bytes(distributed.world_size())


@pytest.mark.parametrize("d", [16, 64])
def test_plan_knows_what_a_loss_sends(tmp_path, d):
    """At d = 16 the d x d sums are less than z, at 64 z is."""
    for name in METHODS:
        config = of_method(tmp_path, "", name, f"model.head.output_dim={d}", "train.global_batch_size=64")
        said, predicted, _ = method_costs.sent(config, 2, d, 2)
        assert ranks(2).run(loss_sends, config) == [pytest.approx(predicted, rel=0.02)] * 2, name
        if name in ("vicreg", "barlow_twins"):
            assert said.startswith("d x d sums" if d == 16 else "z, gathered")
        assert method_costs.held(config, 2, d, 2)[0] > 0
    assert set(WITH_TEACHER) < set(METHODS)
    assert config_module.Config().objective.name == "nt_xent"


# --- sets of views --------------------------------------------------------------------------------------------------

SETS = "augment.views=[{count=3,crop_size=16},{count=2,crop_size=32}]"
CHUNKED = ["objective.chunks=2"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lejepa", "decoupled"])
def test_more_views_than_two_on_any_number_of_ranks(tmp_path, small_shards, name):
    one = of_method(tmp_path / "1", small_shards, name, SETS)
    assert method.global_views(one) == slice(3, 5)
    many = of_method(tmp_path / "3", small_shards, name, SETS, "engine.zero_stage=2", "objective.chunks=2")
    ((loss, gradient),) = ranks(1).run(trajectory.loss_and_gradient, config_module.with_overrides(one, CHUNKED))
    for other_loss, other_gradient in ranks(3).run(trajectory.loss_and_gradient, many):
        assert other_loss == pytest.approx(loss, rel=1e-6)
        assert relative_error(other_gradient, gradient) < 1e-5
    assert ranks(2).run(trajectory.pretrain, one) == [0, 0]
    last = json.loads((tmp_path / "1" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last.keys() >= OWN_METRICS[name]


def test_a_teacher_counts_its_own_batch_norms_alone(tmp_path):
    config = of_method(tmp_path, "", "byol")
    taught = build_teacher(config)
    assert taught.predictor is None
    assert {id(norm) for norm in taught._batch_norms} <= {id(module) for module in taught.modules()}
