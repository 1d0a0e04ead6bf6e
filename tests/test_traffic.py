"""What a step costs a GPU, counted on fake tensors: bytes, launches, kept activations, waits, against the bare network.

ResNet-50 on 224 pixels in bf16, one rank and rank 0 of 64; and that the instrument counts what is known.
"""

from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from dist_ssl import config as config_module
from dist_ssl.config import WITH_PREDICTOR, WITH_TEACHER
from dist_ssl.models import batch_norm, batch_norm_cuda
from dist_ssl.planning import estimate
from tests.benchmarks import traffic
from tests.benchmarks.tracer import Tracer

CONFIG = Path(__file__).parent.parent / "configs" / "simclr_resnet50_imagenet.toml"
# Ranks, kernels of batch norm: the bytes that a step may move and the launches it may take, of the bare network's.
CASES = {
    (1, "fused"): (0.85, 1.3),
    (64, "fused"): (0.85, 1.3),
    (1, "torch's"): (1.05, 1.3),
    (64, "torch's"): (1.05, 1.4),
}


EACH = [pytest.param(case, marks=pytest.mark.slow) for case in CASES]


@pytest.fixture(scope="module", params=EACH, ids="{0[0]} ranks, {0[1]}".format)
def traced(request):
    """(step, bare, views of a rank), 64 images a rank."""
    size, kernels = request.param
    config = config_module.load(CONFIG, [f"train.global_batch_size={64 * size}"])
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        with mock.patch.object(batch_norm, "HAS_TRITON", kernels == "fused"):
            step, views = traffic.trace_step(config, size)
        return step, traffic.trace_bare(config, views, "torchvision"), views
    finally:
        dist.destroy_process_group()
        batch_norm_cuda._constant.cache_clear()  # it has kept fake tensors


def test_bytes_against_the_bare_networks(traced, request):
    step, bare, _ = traced
    assert step.total.bytes <= CASES[request.node.callspec.params["traced"]][0] * bare.total.bytes


def test_launches_are_nearly_the_bare_networks(traced, request):
    step, bare, _ = traced
    assert step.total.launches <= CASES[request.node.callspec.params["traced"]][1] * bare.total.launches


def test_activations_are_kept_as_they_were_computed(traced):
    step, bare, views = traced
    assert step.kept_bytes / views <= 45e6
    assert step.kept_bytes <= 1.01 * bare.kept_bytes


def test_the_host_does_not_wait(traced):
    step, _, _ = traced
    assert not step.syncs


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("name", ["moco_v3", "byol", "vicreg", "barlow_twins", "lejepa"])
def test_the_host_does_not_wait_with_other_methods(name, size):
    """resnet_tiny; and in backward nothing is sent but batch norm's, the teacher's statistics forward only."""
    tiny = ["model.encoder=resnet_tiny", "augment.crop_size=32", f"train.global_batch_size={32 * size}"]
    config = config_module.load(CONFIG, [f"objective.name={name}", *tiny])
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        step, _ = traffic.trace_step(config, size)
    finally:
        dist.destroy_process_group()
        batch_norm_cuda._constant.cache_clear()
    assert not step.syncs
    sent = {part: counts.collectives for part, counts in step.parts.items()}
    layers = sent["encoder"] + sent["head"]
    assert sent["backward"] == layers
    assert ("teacher" in sent) == (name in WITH_TEACHER)
    predicting = 1 if name in WITH_PREDICTOR and size > 1 else 0  # its one batch norm is counted under the head
    assert sent.get("teacher", layers - predicting) == layers - predicting
    assert sent["settling"] == 0


def test_two_collectives_a_batch_norm(traced):
    step, _, _ = traced
    layers = 53 + 2 if step.parts["loss"].collectives else 0  # of the encoder and the head; none on one rank
    assert step.parts["encoder"].collectives + step.parts["head"].collectives == layers
    assert step.parts["backward"].collectives == layers


@pytest.mark.parametrize("stage", [1, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 2, 3))])
def test_a_stage_sends_what_plan_says(stage):
    config = config_module.load(CONFIG, [f"engine.zero_stage={stage}"])
    expected = estimate.wire(config, estimate.Sizes.of(config, 64, measure=False))[0].value
    tracer = Tracer()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=64)
    try:
        traffic.trace_optimizer(config, traffic.fake_model(config), tracer, stage)
    finally:
        dist.destroy_process_group()
    sent = sum(counts.wire_bytes for part, counts in tracer.parts.items() if part != "optimizer")
    assert sent == pytest.approx(expected, rel=1e-3)
    assert not tracer.syncs


def traced_by_hand(code) -> Tracer:
    """What `code` does with an fp32 matrix of 1000 x 500 on the GPU and one on the host."""
    tracer = Tracer()
    with tracer.fake_mode:
        x = torch.empty(1000, 500, requires_grad=True)
    with tracer.tracing():
        code(x, torch.ones(1000, 500))
    return tracer


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (lambda x, _: x.detach().view(-1)[:10].t(), (0, 0, 0, 0)),
        (lambda x, _: x.detach().mul_(2), (2 * 2_000_000, 0, 1, 0)),
        (lambda x, _: x.detach().zero_(), (2_000_000, 0, 1, 0)),
        (lambda x, _: x.detach() * x.detach()[:1].expand(1000, 500), (2 * 2_000_000 + 2_000, 0, 1, 0)),
        (lambda x, _: x.detach() @ x.detach().T, (2 * 2_000_000 + 4_000_000, 2 * 1000 * 1000 * 500, 1, 0)),
        (lambda x, _: float(x.detach()[0, 0]), (0, 0, 0, 1)),
        (lambda x, host: x.detach().add_(host), (2 * 2_000_000, 0, 1, 1)),
        (lambda x, host: host.to(x.device), (0, 0, 0, 1)),
        (lambda x, host: host.to(x.device, non_blocking=True), (0, 0, 0, 0)),
        (lambda x, _: x.detach().cpu(), (0, 0, 0, 1)),
        (lambda x, _: torch.tensor([1.0, 2.0], device=x.device), (0, 0, 0, 1)),
        (lambda x, _: torch.ones(1000).mul_(2), (0, 0, 0, 0)),  # of the host
    ],
)
def test_the_instrument_counts_what_is_known(code, expected):
    total = traced_by_hand(code).total
    assert (total.bytes, total.flops, total.launches, total.host_syncs) == expected


def test_what_autograd_keeps_is_counted_once():
    tracer = Tracer()
    with tracer.fake_mode:
        x = torch.empty(1000, 500, requires_grad=True)
    with tracer.tracing(), tracer.keeping([]):
        y = x.exp()
        y * y + y.view(-1).view(1000, 500).square()
    assert tracer.kept_bytes == 2_000_000
