"""Gathers and global batch norm on real ranks, against one process that sees everything."""

import os
import sys
from unittest import mock

import pytest
import torch

from dist_ssl import distributed
from dist_ssl.checkpoint import Checkpointer
from dist_ssl.distributed import as_on_gpu
from dist_ssl.models import (
    GlobalBatchNorm,
    batch_norm,
    build_encoder,
    build_model,
    frozen_running_statistics,
    moments,
)
from dist_ssl.storage.layout import checkpoint_store
from tests import engines
from tests.counting import Count
from tests.pool import Pool, RankFailed, free_port, ranks
from tests.terminal import ROOT, run
from tests.trajectory import small_config


def slices(total: int, size: int) -> list[int]:
    return [total * (r + 1) // size - total * r // size for r in range(size)]


def batch_norm_on_ranks(total: int, shape: tuple[int, ...], offset: float):
    torch.manual_seed(0)
    x, g = torch.randn(2, total, *shape, dtype=torch.float64)
    x = x + offset
    layer = GlobalBatchNorm(shape[0]).double()
    rows = slices(total, distributed.world_size())
    start = sum(rows[: distributed.rank()])
    mine = slice(start, start + rows[distributed.rank()])
    leaf = x[mine].clone().requires_grad_()
    y = layer(leaf)
    y.backward(g[mine])
    return y.detach(), leaf.grad, layer.weight.grad, layer.running_mean, layer.running_var


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("shape", [(5, 4, 4), (7,)])
def test_batch_norm_equals_one_process(size, shape):
    offset = 1000.0  # E[x^2] - E[x]^2 would lose six digits here
    torch.manual_seed(0)
    x, g = torch.randn(2, 11, *shape, dtype=torch.float64)
    leaf = (x + offset).requires_grad_()
    oracle = (torch.nn.BatchNorm2d if len(shape) == 3 else torch.nn.BatchNorm1d)(shape[0]).double()
    y = oracle(leaf)
    y.backward(g)
    answers = ranks(size).run(batch_norm_on_ranks, 11, shape, offset)
    torch.testing.assert_close(torch.cat([a[0] for a in answers]), y.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(torch.cat([a[1] for a in answers]), leaf.grad, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(sum(a[2] for a in answers), oracle.weight.grad, rtol=1e-9, atol=1e-9)
    for answer in answers:
        torch.testing.assert_close(answer[3], oracle.running_mean, rtol=1e-12, atol=0)
        torch.testing.assert_close(answer[4], oracle.running_var, rtol=1e-9, atol=0)


def by_reductions(function, *arguments):
    """What it returns, and the collectives, where no gather is small enough."""
    with mock.patch.object(moments, "GATHERED_BYTES", -1), Count() as seen:
        return function(*arguments), seen.collectives


@pytest.mark.parametrize("way", ["cpu", "gpu"])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_batch_norm_of_many_ranks_merges_by_reductions(way, size):
    channels, offset = 5, 1000.0 if way == "cpu" else 3.0  # fp32 loses what is far from its mean in any way
    torch.manual_seed(0)
    x, g = torch.randn(2, 11, channels, 4, 4, dtype=torch.float64)
    x = x + offset
    if way == "gpu":
        x, g = x.float(), g.float()
        answers = ranks(size).run(by_reductions, on_gpus, batch_norm_of_rows, x, g)
    else:
        answers = ranks(size).run(by_reductions, batch_norm_on_ranks, 11, (channels, 4, 4), offset)
    leaf = x.double().requires_grad_()
    oracle = torch.nn.BatchNorm2d(channels).double()
    y = oracle(leaf)
    y.backward(g.double())
    tolerance = 1e-9 if way == "cpu" else 2e-6
    for k, expected in ((0, y.detach()), (1, leaf.grad)):
        found = torch.cat([answer[k] for answer, _ in answers]).double()
        assert float((found - expected).norm() / expected.norm()) < tolerance
    first = answers[0][0]
    mean, variance = (3, 4) if way == "cpu" else (4, 5)
    assert float((first[variance].double() / oracle.running_var - 1).abs().max()) < tolerance
    for answer, called in answers:
        assert torch.equal(answer[mean], first[mean]), "the same bits on all ranks"
        assert torch.equal(answer[variance], first[variance]), "the same bits on all ranks"
        forward = [("allreduce", 8 * (channels + 1)), ("allreduce", 8 * channels)]
        assert called == [*forward, ("allreduce", 2 * channels * x.element_size())]


def fp32_batch_norm(x: torch.Tensor, rows: list[int]) -> torch.Tensor:
    return GlobalBatchNorm(x.shape[1])(x.split(rows)[distributed.rank()]).detach()


def test_outputs_are_the_same_bits_on_any_ranks():
    x = torch.randn(60, 8, 12, 12, generator=torch.Generator().manual_seed(0)) * 3 + 5
    x = x.contiguous(memory_format=torch.channels_last)
    (expected,) = ranks(1).run(fp32_batch_norm, x, [60])
    for rows in ([30, 30], [41, 19], [7, 33, 20]):
        assert torch.equal(torch.cat(ranks(len(rows)).run(fp32_batch_norm, x, rows)), expected)


def on_gpus(function, *arguments):
    """As on GPUs without Triton, whose kernels `tests.batch_norm_kernels` stands in for."""
    import tests.batch_norm_kernels  # noqa: F401

    with as_on_gpu(), mock.patch.object(batch_norm, "_has_kernels", return_value=False):
        return function(*arguments)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("shape", [(5, 4, 4), (7,)])
def test_the_gpus_batch_norm_equals_one_process(size, shape, dtype, tolerance):
    """bf16 activations with fp32 weights, as under autocast; the reference sees the same rounded numbers, in fp64."""
    torch.manual_seed(0)
    x, g = torch.randn(2, 11, *shape).to(getattr(torch, dtype))
    leaf = x.double().requires_grad_()
    oracle = (torch.nn.BatchNorm2d if len(shape) == 3 else torch.nn.BatchNorm1d)(shape[0]).double()
    y = oracle(leaf)
    y.backward(g.double())
    answers = ranks(size).run(on_gpus, batch_norm_of_rows, x, g)
    pieces = [torch.cat([a[k] for a in answers]) for k in (0, 1)] + [sum(a[k] for a in answers) for k in (2, 3)]
    for got, want in zip(pieces, (y.detach(), leaf.grad, oracle.weight.grad, oracle.bias.grad), strict=True):
        assert float((got.double() - want).norm() / want.norm()) < tolerance
    for answer in answers:
        torch.testing.assert_close(answer[4], oracle.running_mean.float(), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(answer[5], oracle.running_var.float(), rtol=1e-5, atol=1e-7)
        assert answer[6] == [getattr(torch, dtype)]  # what is kept of the activations, in the dtype they came in


def batch_norm_of_rows(x: torch.Tensor, g: torch.Tensor):
    layer, kept = GlobalBatchNorm(x.shape[1]), set()
    rows = slices(len(x), distributed.world_size())
    leaf = x.split(rows)[distributed.rank()].clone().requires_grad_()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.numel() == leaf.numel():
            kept.add(tensor.dtype)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = layer(leaf)
    y.backward(g.split(rows)[distributed.rank()])
    running = layer.running_mean, layer.running_var
    return y.detach(), leaf.grad, layer.weight.grad, layer.bias.grad, *running, sorted(kept, key=str)


def gradient_of_rows(x: torch.Tensor, rows: list[int]) -> torch.Tensor:
    torch.manual_seed(0)
    encoder = build_encoder("resnet_tiny").to(x.dtype)
    for module in list(encoder.modules()):
        for name, child in module.named_children():
            if isinstance(child, torch.nn.ReLU) and x.dtype == torch.float32:
                setattr(module, name, torch.nn.GELU())
    h = encoder(x.split(rows)[distributed.rank()])
    (h.square().sum() / len(x)).backward()
    gradient = torch.cat([p.grad.flatten() for p in encoder.parameters()])
    distributed.dist.all_reduce(gradient)
    return gradient


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-10)])
def test_the_gpus_gradient_is_that_of_one_process(dtype, tolerance):
    """In fp32 without ReLUs: a last bit of fp32 statistics turns one over, which no dtype of the messages prevents."""
    x = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=getattr(torch, dtype))
    x = x.contiguous(memory_format=torch.channels_last)
    (expected,) = ranks(1).run(on_gpus, gradient_of_rows, x, [24])
    for rows in ([17, 7], [5, 11, 8]):
        gradient, *_ = ranks(len(rows)).run(on_gpus, gradient_of_rows, x, rows)
        assert float((gradient - expected).norm() / expected.norm()) < tolerance


def frozen_on_a_gpu():
    layer = GlobalBatchNorm(3)
    with frozen_running_statistics():
        layer(torch.randn(4, 3))
    frozen = int(layer.num_batches_tracked), layer.running_mean.tolist(), layer.running_var.tolist()
    layer(torch.randn(4, 3))
    trained = int(layer.num_batches_tracked), layer.running_mean.clone()
    layer.eval()(torch.randn(4, 3))
    return frozen, trained[0], torch.equal(trained[1], layer.running_mean), bool(layer.running_mean.any())


def gradient_and_statistics(config, x: torch.Tensor):
    model = build_model(config)
    model(x)[1].square().sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    return gradient, dict(model.named_buffers())


@pytest.mark.parametrize("size", [1, 2])
def test_recomputation_on_a_gpu_counts_each_batch_once(size, tmp_path):
    x = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    answers = [
        ranks(size).run(on_gpus, gradient_and_statistics, small_config(tmp_path, "", *overrides), x)[0]
        for overrides in ([], ["model.activation_checkpointing=true"])
    ]
    (gradient, buffers), (again, buffers_again) = answers
    assert torch.equal(gradient, again)
    assert all(torch.equal(buffers[name], value) for name, value in buffers_again.items())
    assert {int(value) for name, value in buffers.items() if name.endswith("num_batches_tracked")} == {1}


@pytest.mark.parametrize("size", [1, 2])
def test_frozen_statistics_on_a_gpu(size):
    for answer in ranks(size).run(on_gpus, frozen_on_a_gpu):
        assert answer == ((0, [0, 0, 0], [1, 1, 1]), 1, True, True)


def test_each_batch_is_counted_once_by_the_model_and_by_its_encoder_alone(tmp_path):
    model = build_model(small_config(tmp_path, ""))
    x = torch.randn(4, 3, 32, 32)
    model(x)
    model.encoder(x)
    model.head.eval()
    model(x)
    counts = {name: int(n) for name, n in model.named_buffers() if name.endswith("num_batches_tracked")}
    assert {n for name, n in counts.items() if name.startswith("encoder.")} == {3}
    assert {n for name, n in counts.items() if name.startswith("head.")} == {1}


def test_frozen_statistics():
    layer = GlobalBatchNorm(3)
    with frozen_running_statistics():
        layer(torch.randn(4, 3))
    assert layer.num_batches_tracked == 0
    assert torch.equal(layer.running_mean, torch.zeros(3))
    layer(torch.randn(4, 3))
    assert layer.num_batches_tracked == 1


def gather(rows: list[int]):
    mine = torch.arange(rows[distributed.rank()]).view(-1, 1) + 100 * distributed.rank()
    return distributed.gather_rows(mine, rows)


@pytest.mark.parametrize("rows", [[2, 2], [3, 1], [2, 3, 1]])
def test_gather_rows_uneven(rows):
    expected = torch.cat([torch.arange(n).view(-1, 1) + 100 * r for r, n in enumerate(rows)])
    for gathered in ranks(len(rows)).run(gather, rows):
        assert torch.equal(gathered, expected)


def seconds_that_groups_wait(config, minutes: float, port: int) -> list[float]:
    """Of a process group that waits so long, of one of some ranks, of DeepSpeed's clone, and of the one for saves."""
    torch.distributed.destroy_process_group()
    os.environ["MASTER_PORT"] = str(port)
    distributed.initialize(minutes)
    model = engines.build(config)
    saves = Checkpointer(checkpoint_store(config), config.run.dir, config.checkpoint, model, 1)._group
    groups = [torch.distributed.group.WORLD, distributed.peers(2).group, model._engine.seq_data_parallel_group, saves]
    return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]


@pytest.mark.slow
def test_all_groups_wait_as_long_as_they_were_told(tmp_path):
    """A save waits longer by what its requests may take: a rank's file, the state, the manifest, a removal."""
    pool = Pool(4)
    try:
        config = small_config(tmp_path, "", "storage.retry_seconds=50")
        found = pool.run(seconds_that_groups_wait, config, 7.0, free_port())
        assert found == [[420.0, 420.0, 420.0, 620.0]] * 4
    finally:
        for process in pool.processes:
            process.kill()
            process.wait()


def fail_on_rank_one():
    distributed.raise_together(ValueError("expected x") if distributed.rank() == 1 else None)


def test_raise_together_raises_everywhere():
    with pytest.raises(RankFailed) as failure:
        ranks(2).run(fail_on_rank_one)
    assert all("ValueError" in text and "expected x" in text for text in failure.value.tracebacks)


def fail_to_decode_on_rank_one():
    with distributed.together():
        if distributed.rank() == 1:
            b"\xff".decode()


def fail_by_an_error_that_is_not_sent():
    class Local(Exception):
        pass

    distributed.raise_together(Local("expected x") if distributed.rank() == 1 else None)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (fail_to_decode_on_rank_one, "rank 1: UnicodeDecodeError: 'utf-8'"),
        (fail_by_an_error_that_is_not_sent, "rank 1: Local: expected x"),
    ],
)
def test_an_error_of_more_than_a_message_is_told_on_all_ranks(function, said):
    with pytest.raises(RankFailed) as failure:
        ranks(2).run(function)
    assert said in failure.value.tracebacks[0]


@pytest.mark.slow
def test_a_program_sends_functions_of_its_own_to_forked_ranks(tmp_path):
    """As `python -m tests.benchmarks.objective` does, whose functions are those of `__main__`."""
    (tmp_path / "program.py").write_text(
        "from tests.pool import Pool\n\n\ndef doubled(x):\n    return 2 * x\n\n\n"
        "if __name__ == '__main__':\n    pool = Pool(2)\n    print(pool.run(doubled, 4))\n    pool.close()\n"
    )
    done = run([sys.executable, "-m", "program"], PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))
    assert done.stdout == "[8, 8]\n", done.stderr
