"""`dist_ssl.objective` alone: light to import, and the code of docs/other_loops.md as it stands there."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.pool import ranks
from tests.terminal import ROOT, blocks

ALLOWED = {"dist_ssl"}  # beyond torch and what it imports
COUNT = """
import sys, time
import torch, torch.distributed
before, started = set(sys.modules), time.process_time()
import dist_ssl.objective
print(time.process_time() - started)
print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}))
"""


def test_the_losses_import_torch_and_nothing_else() -> None:
    done = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, cwd=ROOT, check=True)
    seconds, modules = done.stdout.splitlines()
    assert set(modules.split()) == ALLOWED
    assert float(seconds) < 0.05


def given(heading: str) -> dict[str, Any]:
    """What the page's code under a heading defines."""
    names: dict[str, Any] = {}
    exec(blocks("other_loops.md", "python", heading)[0], names)
    return names


def backbone() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 12), nn.Tanh(), nn.Linear(12, 8)).double()


def batches(steps: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    made = torch.randn(steps, 2, 8, 3, 4, 4, generator=generator, dtype=torch.float64)
    return [(one[0], one[1]) for one in made]


def trained(rank: int, size: int, steps: int = 3) -> list[Tensor]:
    """The weights after the page's loop, on this rank's slice of each batch."""
    model, rows = backbone(), slice(8 * rank // size, 8 * (rank + 1) // size)
    given("Plain DDP")["train"](model, [(one[rows], two[rows]) for one, two in batches(steps)])
    return [weight.detach() for weight in model.parameters()]


def trained_by_lightning(rank: int, size: int, steps: int = 3) -> tuple[list[Tensor], list[float]]:
    """The weights after the page's module, on this rank's slice of each batch, and the losses that it logged."""
    import pytorch_lightning as lightning
    from lightning_fabric.plugins.environments import TorchElasticEnvironment

    model, rows, logged = backbone(), slice(8 * rank // size, 8 * (rank + 1) // size), []

    class Logged(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            logged.append(float(trainer.callback_metrics["loss"]))

    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=size,
        strategy="ddp" if size > 1 else "auto",
        plugins=[TorchElasticEnvironment()] if size > 1 else [],  # the ranks are there already
        callbacks=[Logged()],
        max_epochs=1,
        use_distributed_sampler=False,
        **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
    )
    loader = torch.utils.data.DataLoader([(a[rows], b[rows]) for a, b in batches(steps)], batch_size=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it would rather have workers
        trainer.fit(given("PyTorch Lightning")["Pretraining"](model), loader)
    return [weight.detach() for weight in model.parameters()], logged


def trained_here(how: Callable[[int, int], Any]) -> Any:
    from dist_ssl import distributed

    return how(distributed.rank(), distributed.world_size())


def of_lightlys(whose: str) -> list[Tensor]:
    """The averaged gradient of lightly's model in one step of this rank's rows, under either loss."""
    from lightly.loss import NTXentLoss

    from dist_ssl import distributed

    rank, size = distributed.rank(), distributed.world_size()
    names = given("lightly's SimCLR")
    torch.manual_seed(2)
    model = names["SimCLR"](backbone(), 8).double().eval()  # their head's batch norm is of each rank's own rows
    gather = whose == "theirs" and size > 1
    criterion = names["criterion"] if whose == "ours" else NTXentLoss(temperature=0.5, gather_distributed=gather)
    view1, view2 = batches(1)[0]
    rows = slice(8 * rank // size, 8 * (rank + 1) // size)
    criterion(model(view1[rows]), model(view2[rows])).backward()
    gradient = [weight.grad for weight in model.parameters() if weight.grad is not None]
    if size > 1:
        for one in gradient:
            torch.distributed.all_reduce(one)
            one /= size
    return gradient


def error(found: list[Tensor], wanted: list[Tensor]) -> float:
    difference = sum(float((one - other).square().sum()) for one, other in zip(found, wanted, strict=True))
    return (difference / sum(float(one.square().sum()) for one in wanted)) ** 0.5


def test_plain_ddp_on_two_ranks_is_the_global_batch_on_one() -> None:
    (alone,) = ranks(1).run(trained_here, trained)
    for found in ranks(2).run(trained_here, trained):
        assert error(found, alone) < 1e-12


@pytest.mark.slow
def test_lightning_on_two_ranks_is_the_global_batch_on_one() -> None:
    pytest.importorskip("pytorch_lightning")
    (wanted,) = ranks(1).run(trained_here, trained)  # by the page's plain loop
    (alone,) = ranks(1).run(trained_here, trained_by_lightning)
    found = ranks(2).run(trained_here, trained_by_lightning)
    for weights, losses in (alone, *found):
        assert error(weights, wanted) < 1e-12
        assert losses == pytest.approx(alone[1], abs=1e-6)  # logged in fp32


@pytest.mark.slow
def test_lightlys_example_with_our_loss() -> None:
    pytest.importorskip("lightly")
    (wanted,) = ranks(1).run(of_lightlys, "theirs")
    assert error(ranks(1).run(of_lightlys, "ours")[0], wanted) < 1e-6
    found = {whose: error(ranks(2).run(of_lightlys, whose)[0], wanted) for whose in ("ours", "theirs", "their default")}
    print("gradient on two ranks against one:", found)
    assert found["ours"] < 1e-12
    assert found["their default"] > 0.01
