"""docs/recipes.md as it stands there, on tiny data: each command line in a forked process, in an empty folder."""

from __future__ import annotations

import io
import json
import os
import pickle
import shlex
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import template
from tests.pool import free_port
from tests.terminal import ROOT, blocks
from tests.test_shards import photo_folder

pytestmark = pytest.mark.slow
NOT_RUN = ("pip install", "hf auth", "python -c")  # what needs a network
LOCAL = "python -m launch.local pretrain"  # here on one rank; the launcher has tests of its own
TINY = {
    "pretrain": "train.steps=1 train.global_batch_size=16 data.num_workers=0 log.tensorboard=false",
    "evaluate": 'evaluation.num_workers=0 evaluation.probes=["knn"]',
}


def command_lines(heading: str) -> list[list[str]]:
    """The arguments of `dist-ssl` in a recipe's block, made small; what needs a network is left out."""
    (block,) = blocks("recipes.md", "bash", heading)
    found = []
    for line in block.replace("\\\n", " ").splitlines():
        if line.startswith(NOT_RUN):
            continue
        line = line.replace(LOCAL, "dist-ssl pretrain")
        program, *arguments = shlex.split(line, comments=True)
        assert program == "dist-ssl", line
        small = TINY.get(arguments[0], "").split()
        found.append([*arguments, *(part for one in small for part in ("--set", one))])
    return found


def _command(connection: Connection, folder: str, arguments: list[str]) -> None:
    import torchvision

    from launch.command import main

    os.chdir(folder)
    os.environ["DS_ACCELERATOR"] = "cpu"
    torchvision.datasets.cifar.check_integrity = lambda *_: True  # our files have other sums
    sys.argv = ["dist-ssl", *arguments]
    said = io.StringIO()
    sys.stdout = sys.stderr = said
    try:
        main()
    except SystemExit as stopped:
        connection.send((stopped.code or 0, said.getvalue()))


def run_recipe(heading: str, folder: Path) -> None:
    if not (folder / "configs").exists():
        (folder / "configs").symlink_to(ROOT / "configs")
    for arguments in command_lines(heading):
        code, said = template.fork(_command, str(folder), arguments).connection.recv()
        assert code == 0, f"{shlex.join(arguments)}\n{said}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the recipes are run: `photos` is there."""
    folder = tmp_path_factory.mktemp("recipes")
    photo_folder(folder / "photos")
    return folder


def test_my_photos(folder: Path) -> None:
    run_recipe("My photos", folder)
    assert (
        np.load(folder / "photos.npy").shape[0] == len(json.loads((folder / "photos.json").read_text())["paths"]) == 60
    )
    results = json.loads((folder / "runs/photos/evaluation/step-1/results.json").read_text())
    assert (results["data"]["train_images"], results["data"]["test_images"]) == (54, 6)
    assert (folder / "runs/photos/report.html").stat().st_size > 10_000


def test_cifar(folder: Path) -> None:
    root = folder / "data" / "cifar-10-batches-py"
    root.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 3072), dtype=np.uint8)
    for name in ("test_batch", *(f"data_batch_{number}" for number in range(1, 6))):
        (root / name).write_bytes(pickle.dumps({"data": pixels, "labels": [*range(10)] * 2}))
    (root / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class{label}" for label in range(10)]}))
    run_recipe("CIFAR-10 by torchvision", folder)
    results = json.loads((folder / "runs/cifar10/evaluation/step-1/results.json").read_text())
    assert (results["data"]["train_images"], results["data"]["test_images"]) == (100, 20)


def test_a_convnext_of_timm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_recipe("A timm ConvNeXt", folder)
    monkeypatch.chdir(folder)
    names: dict[str, torch.nn.Module] = {}
    exec(blocks("recipes.md", "python", "A timm ConvNeXt")[0], names)
    assert names["encoder"](torch.zeros(2, 3, 32, 32)).shape == (2, 320)


def _rank(connection: Connection, folder: str, rank: int, port: int) -> None:
    os.chdir(folder)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    sys.stdout = said = io.StringIO()
    exec(blocks("recipes.md", "python", "My own DDP loop with your loss")[0], {})
    connection.send(said.getvalue())


def test_my_own_loop(folder: Path) -> None:
    port = free_port()
    ranks = [template.fork(_rank, str(folder), rank, port) for rank in range(2)]
    said = [rank.connection.recv() for rank in ranks]
    assert said[0].startswith("loss ")
    assert said[1] == ""
    assert 0 < float(said[0].split()[1]) < 10
    assert "layer4.1.conv2.weight" in torch.load(folder / "encoder.pth", weights_only=True)


def test_the_hubs_recipe_is_that_of_the_page_on_data() -> None:
    """Its commands are run against a local server elsewhere; here it is only held that the two pages say the same."""
    said = [
        " ".join(shlex.split(line, comments=True))
        for line in blocks("recipes.md", "bash", "ImageNet from the Hub")[0].splitlines()
    ]
    there = [
        " ".join(shlex.split(line, comments=True))
        for line in blocks("data.md", "bash", "ImageNet-1k from the Hub")[0].splitlines()
    ]
    assert said == there
