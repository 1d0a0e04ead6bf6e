"""The kinds of projection head: each against its formula, and in training the same on any number of ranks."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dist_ssl import checkpoint
from dist_ssl import config as configuration
from dist_ssl.config import HEADS, HeadConfig, UserError
from dist_ssl.models import ProjectionHead, build_model
from tests import trajectory
from tests.pool import ranks
from tests.test_trajectory import relative_error
from tests.trajectory import small_config

D, SMALL = 24, {"hidden_dim": 16, "output_dim": 8, "latent_dim": 32, "top_k": 3}
LAYERS = [
    ({"kind": "none"}, ["z"], D),
    ({"kind": "linear"}, ["z"], 8),
    ({"kind": "mlp"}, ["g1", "z"], 8),
    ({"kind": "mlp", "num_layers": 3, "activation": "silu"}, ["g1", "g2", "z"], 8),
    ({"kind": "direct"}, ["z"], 8),
    ({"kind": "fixed_reweight"}, ["z"], D),
    ({"kind": "shortcut"}, ["g1", "g2", "z"], D + 8),
    ({"kind": "discrete"}, ["g1", "z"], 8),
    ({"kind": "sae"}, ["g1", "z"], 8),
]


def head_of(**keys):
    return ProjectionHead(D, HeadConfig(**SMALL | keys))


@pytest.mark.parametrize("batch_norm", [True, False])
def test_every_layer_of_a_head_can_be_read(batch_norm):
    assert {keys["kind"] for keys, _, _ in LAYERS} == set(HEADS) == set(configuration.choices("model.head.kind"))
    h = torch.randn(5, D)
    for keys, names, width in LAYERS:
        head = head_of(**keys, batch_norm=batch_norm).eval()
        layers = head.layers(h)
        assert [name for name, _ in layers] == names
        assert head.output_dim == layers[-1][1].shape[1] == width
        assert torch.equal(layers[-1][1], head(h))
        linear = [module for module in head.modules() if isinstance(module, torch.nn.Linear)]
        assert len(linear) == (0 if keys["kind"] in ("none", "direct", "fixed_reweight") else len(names) - (width > D))
        if keys["kind"] in ("mlp", "sae") and "activation" not in keys:
            assert all(values.min() >= 0 for _, values in layers[:-1]), "read after the ReLU"


def test_heads_are_what_their_papers_say():
    torch.manual_seed(0)
    h = torch.randn(6, D, requires_grad=True)
    assert torch.equal(head_of(kind="direct")(h), h[:, :8])
    reweighted = head_of(kind="fixed_reweight", kappa=1.5)(h)
    assert np.allclose(reweighted.detach(), h.detach().numpy() / 1.5 ** np.arange(D), rtol=1e-6)
    # RED's shortcut: of two rows the cosine of h and that of the MLP's output have the same weight.
    joined = head_of(kind="shortcut", batch_norm=False)
    parts = [joined.stack[1](joined.stack[0](h)), h]
    expected = sum(F.cosine_similarity(part[:3], part[3:]) for part in parts) / 2
    assert torch.allclose(F.cosine_similarity(*joined(h).split(3)), expected, atol=1e-6)
    assert torch.allclose(joined(h).square().mean(dim=1), torch.ones(6))
    for name, function in (("silu", F.silu), ("tanh", torch.tanh), ("relu", F.relu)):
        mlp = head_of(kind="mlp", batch_norm=False, activation=name)
        first, last = (layer[0] for layer in mlp.stack)
        assert torch.allclose(mlp(h), last(function(first(h))))


@pytest.mark.parametrize("levels", [2, 5, 8])
def test_a_discrete_head_has_so_many_values_and_tanhs_gradient(levels):
    head = head_of(kind="discrete", levels=levels)
    h = 3 * torch.randn(200, D)
    z = head(h)
    found = sorted({round(value, 5) for value in z.flatten().tolist()})
    assert found == pytest.approx(np.linspace(-1, 1, levels).tolist(), abs=1e-4)
    linear = head.stack[-1][:-1](head.stack[0](h)).detach().requires_grad_()
    assert (z - linear.tanh()).abs().max() <= 1 / (levels - 1) + 1e-6
    slope = torch.randn(200, 8)
    gradients = [torch.autograd.grad((f(linear) * slope).sum(), linear)[0] for f in (head.stack[-1][-1], torch.tanh)]
    assert torch.allclose(*gradients)


def test_a_sparse_code_passes_its_largest_numbers():
    head = head_of(kind="sae")
    h = torch.randn(50, D)
    code, z = (values.detach() for _, values in head.layers(h))
    encoded = head.stack[0][0](h).detach().relu().numpy()
    kept = np.where(encoded.argsort(axis=1).argsort(axis=1) >= encoded.shape[1] - 3, encoded, 0)
    assert np.array_equal(code.numpy(), kept)
    assert torch.allclose(z, code @ head.stack[1][0].weight.T + head.stack[1][0].bias, atol=1e-6)


def test_what_a_head_can_not_be():
    for keys, said in (
        ({"kind": "direct", "l1": 0.1}, "no linear layer to make sparse"),
        ({"kind": "sae", "top_k": 9, "latent_dim": 8}, "top_k: expected at most latent_dim, 8, got 9"),
    ):
        with pytest.raises(UserError, match=said):
            configuration.validate({"model": {"head": keys}}, "test")
    with pytest.raises(UserError, match=r"model.head.output_dim: expected at most 24, h's width, .* got 25"):
        head_of(kind="direct", output_dim=25)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, small_shards):
    """{l1: (loss, gradient)} of a sparse code on one rank, without l1 and with it."""
    folder = tmp_path_factory.mktemp("alone")
    return {
        l1: ranks(1).run(trajectory.loss_and_gradient, sparse(folder, small_shards, l1, "engine.zero_stage=0"))[0]
        for l1 in (0.0, 0.01)
    }


def sparse(folder, shards, l1, *overrides):
    head = ["kind='sae'", "latent_dim=64", "top_k=6", f"l1={l1}"]
    return small_config(folder, shards, *(f"model.head.{key}" for key in head), "run.seed=7", *overrides)


WEIGHT = "head.stack.1.0.weight"  # of z's layer


def is_that_of_l1(plain, shrinking):
    """Whether two gradients differ by that of 0.01 sum |weight|, at the run's first weights."""
    weight = dict(build_model(sparse("run", "", 0.01)).named_parameters())[WEIGHT]
    (expected,) = torch.autograd.grad(0.01 * weight.abs().sum(), weight)
    return torch.allclose(shrinking[WEIGHT] - plain[WEIGHT], expected.view(-1), atol=1e-6)


def test_l1_adds_its_gradient_to_the_last_layers_weight_alone(alone):
    (loss, plain), (same_loss, shrinking) = alone.values()
    assert same_loss == loss
    assert all(torch.equal(plain[name], shrinking[name]) for name in plain if name != WEIGHT)
    assert is_that_of_l1(plain, shrinking)


def test_l1_is_added_once_a_step_in_chunks_too(tmp_path, small_shards):
    shared = ["engine.zero_stage=2", "objective.chunks=3"]
    first, second = (sparse(tmp_path, small_shards, l1, *shared) for l1 in (0.0, 0.01))
    both = [ranks(2).run(trajectory.loss_and_gradient, config)[0][1] for config in (first, second)]
    assert is_that_of_l1(*both)


@pytest.mark.parametrize(("size", "stage"), [(3, 2), pytest.param(2, 3, marks=pytest.mark.slow)])
def test_a_sparse_head_has_one_gradient_on_any_ranks(tmp_path, small_shards, alone, size, stage):
    loss, gradient = alone[0.01]
    many = sparse(tmp_path, small_shards, 0.01, f"engine.zero_stage={stage}")
    for other_loss, other_gradient in ranks(size).run(trajectory.loss_and_gradient, many):
        assert other_loss == pytest.approx(loss, rel=1e-6)
        assert relative_error(other_gradient, gradient) < 1e-5


@pytest.mark.slow
def test_heads_train_and_are_read_back(tmp_path, small_shards):
    """One with a table of its own, one that hands h on, one that rounds: in bf16, under ZeRO 1 and 3, by two losses."""
    for number, (keys, names, _) in enumerate(LAYERS[5:8]):
        head = [f"model.head.{key}={value}" for key, value in keys.items()]
        engine = [f"engine.zero_stage={(1, 3)[number % 2]}", "engine.precision=bf16"]
        loss = f"objective.name={('nt_xent', 'vicreg')[number % 2]}"
        folder = tmp_path / keys["kind"]
        config = small_config(folder, small_shards, *head, *engine, loss, "train.steps=2", "model.head.top_k=3")
        assert ranks(2).run(trajectory.pretrain, config) == [0, 0], keys
        assert np.isfinite(trajectory.losses(folder)).all(), keys
        _, step, model = checkpoint.load_run(folder)
        assert step == 2
        assert [name for name, _ in model.head.layers(torch.randn(4, 128))] == names
