"""The mapping of fragments under each ZeRO stage, and LARS on top of it, against a naive loop."""

import pytest
import torch

from dist_ssl import config as config_module
from dist_ssl import engine
from dist_ssl.config import Config, UserError
from dist_ssl.distributed import World
from tests import engines
from tests.pool import ranks
from tests.trajectory import small_config

STEPS = 20  # norms of the flat partitions instead of layers are 0.7 to 4% off by then
CASES = [(2, 1), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(1, 0), (2, 2), (2, 3), (3, 1), (3, 3)])]


def lars(path, stage):
    return small_config(path, "", f"engine.zero_stage={stage}", "optimizer.name=lars", "optimizer.weight_decay=1e-4")


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Whole flat parameters after `STEPS` of a loop over layers in one process."""
    return engines.naive_lars(lars(tmp_path_factory.mktemp("naive"), 0), STEPS)


@pytest.mark.parametrize(("size", "stage"), CASES)
def test_fragments_hold_the_model_and_lars_equals_a_naive_loop(tmp_path, expected, size, stage):
    initial, stepped = zip(*ranks(size).run(engines.initial_and_stepped, lars(tmp_path, stage), STEPS), strict=True)
    assert initial == (True,) * size
    found = engines.assembled(list(stepped))
    difference = torch.cat([found[name, "master"] - expected[name] for name in expected])
    scale = torch.cat(list(expected.values()))
    assert difference.norm() / scale.norm() < 1e-6
    for name, values in expected.items():
        assert (found[name, "master"] - values).norm() <= 1e-6 * values.norm() + 1e-7, name


@pytest.mark.parametrize(
    "raw",
    [
        {"gradient_clipping": 1.0},
        {"zero_optimization": {"stage": 2}},
        {"zero_optimization": {"round_robin_gradients": True}},
        {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
        {"bf16": {"enabled": True}},
    ],
)
def test_raw_keys_that_are_derived_are_refused(raw):
    values = {"engine": {"deepspeed": raw}, "train": {"steps": 1}}
    with pytest.raises(UserError, match=r"engine\.deepspeed\."):
        engine.deepspeed_config(config_module.validate(values, "test"), 1000)


def test_raw_keys_that_are_not_derived_reach_deepspeed():
    raw = {"wall_clock_breakdown": True, "zero_optimization": {"contiguous_gradients": False}}
    config = config_module.validate({"engine": {"deepspeed": raw}, "train": {"steps": 1}}, "test")
    derived = engine.deepspeed_config(config, 1000)
    assert derived["wall_clock_breakdown"]
    assert derived["zero_optimization"]["contiguous_gradients"] is False
    assert engine.deepspeed_config(Config(), 1000)["gradient_clipping"] == 0.0  # DeepSpeed's own default is 1


def test_a_parameter_without_dimensions_is_refused_under_zero_3(tmp_path):
    config = small_config(tmp_path, "", "engine.zero_stage=3")
    model = engines.build_model(config)
    model.gain = torch.nn.Parameter(torch.tensor(0.5))
    with pytest.raises(UserError, match=r"zero_stage = 3: .* take 0, 1 or 2"):
        engine.initialize(model, config, World(0, 1, 0, 1, torch.device("cpu")))
