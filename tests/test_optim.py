"""The learning rate as a function of the step, parameter groups, and LARS on whole parameters."""

import itertools
import math

import pytest
import torch

from dist_ssl.engine import optimizers
from dist_ssl.models import build_model
from tests.trajectory import small_config


@pytest.mark.parametrize(("scaling", "scale"), [("linear", 2.0), ("sqrt", math.sqrt(512)), ("none", 1.0)])
def test_scaling(tmp_path, scaling, scale):
    config = small_config(tmp_path, "", "train.global_batch_size=512", f"optimizer.scaling={scaling}")
    assert optimizers.peak_learning_rate(config) == pytest.approx(1e-5 * scale)


def test_warm_up_then_cosine_to_zero(tmp_path):
    overrides = ["optimizer.warmup_epochs=2.0", "train.global_batch_size=10", "optimizer.base_learning_rate=1.0"]
    config = small_config(tmp_path, "", *overrides)
    rates = [optimizers.learning_rate(config, step, 100, 50) for step in range(100)]  # 5 steps an epoch: 10 of warm-up
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0, rel=1e-3)
    assert rates.index(max(rates)) in (9, 10)
    assert rates[54] == pytest.approx(0.5, rel=0.02)
    assert rates[-1] == pytest.approx(0.0, abs=1e-9)
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[10:]))


def test_biases_norms_and_positions_are_neither_decayed_nor_adapted(tmp_path):
    model = build_model(small_config(tmp_path, "", "model.encoder=vit_s_16"))
    names = {id(p): name for name, p in model.named_parameters()}
    adapted, plain = optimizers.parameter_groups(model, 0.1)
    assert (adapted["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert {"encoder.class_token", "encoder.encoder.pos_embedding"} <= {names[id(p)] for p in plain["params"]}
    assert all(p.ndim > 1 for p in adapted["params"])
    assert len(adapted["params"]) + len(plain["params"]) == len(names)


def test_lars_step_by_hand():
    w = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
    optimizer = optimizers.LARS([{"params": [w], "weight_decay": 0.5, "adapt": True}], lr=2.0, momentum=0.9)
    w.grad = torch.tensor([[-1.5, 1.0]])
    optimizer.step()
    # update = g + 0.5 w = (0, 3); trust = 0.001 * 5 / 3; step = 2 * trust * update = (0, 0.01)
    assert torch.allclose(w, torch.tensor([[3.0, 3.99]]))
    w.grad = torch.tensor([[-1.5, 4.0 - 0.5 * 3.99 - 1.0]])
    before = w.detach().clone()
    optimizer.step()
    update = torch.tensor([[0.0, 3.0]])
    trust = 0.001 * before.norm() / update.norm()
    assert torch.allclose(w, before - (0.9 * torch.tensor([[0.0, 0.01]]) + 2 * trust * update))
