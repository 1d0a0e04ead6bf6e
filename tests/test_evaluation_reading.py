"""What an evaluation reads: bad images, other labels, classes that two parts number differently, other batches."""

from __future__ import annotations

import io
import json
import logging
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from dist_ssl.config import Config, StorageConfig, UserError, with_overrides
from dist_ssl.data.indexing import index_shards
from dist_ssl.evaluation import evaluate
from dist_ssl.evaluation.features import Features, extract, in_batches_of, open_split
from dist_ssl.evaluation.frozen import Readable
from dist_ssl.evaluation.sgd import copy_of
from dist_ssl.models import build_model
from tests.test_evaluation_frozen import config_of, subject_of
from tests.test_shards import photo_folder

CPU, IMAGES = torch.device("cpu"), 12


class Mean(nn.Module):
    output_dim = 3

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def shard(folder: Path, bad: tuple[int, ...] = ()) -> None:
    with tarfile.open(folder / "a.tar", "w") as file:
        for i in range(IMAGES):
            buffer = io.BytesIO()
            Image.new("RGB", (16, 16), (20 * i, 0, 0)).save(buffer, "PNG")
            image = b"<html>404</html>" if i in bad else buffer.getvalue()
            for ending, data in ("png", image), ("json", json.dumps({"fine": i, "coarse": i % 2}).encode()):
                member = tarfile.TarInfo(f"{i:03d}.{ending}")
                member.size = len(data)
                file.addfile(member, io.BytesIO(data))


def features_of(folder: Path, *overrides: str) -> Features:
    settings = [f"evaluation.test_shards={json.dumps(str(folder))}", "evaluation.num_workers=0", "augment.crop_size=16"]
    split = open_split("test", with_overrides(Config(), [*settings, *overrides]), CPU)
    return extract(split, [Readable(Mean())], ["digest"], folder / "features")


def test_bad_images_are_counted_told_and_too_many_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shard(tmp_path, bad=(3, 7))
    index_shards(str(tmp_path), StorageConfig(), num_workers=0)
    for _ in range(2):  # what the first start has read is not read again, but still refused
        with pytest.raises(
            UserError, match=r"evaluation\.test_shards: 2 of 12 images are bad, more than data\.max_bad"
        ):
            features_of(tmp_path)
    assert sum("a.tar: a/003: not a JPEG" in record.getMessage() for record in caplog.records) == 1
    found = features_of(tmp_path, "data.max_bad_fraction=0.2")
    assert np.flatnonzero(found.replaced).tolist() == [3, 7]
    assert "test images: 2 of 12 are bad" in caplog.messages[-1]


def test_features_of_an_older_version_are_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shard(tmp_path)
    index_shards(str(tmp_path), StorageConfig(), num_workers=0)
    features_of(tmp_path)
    (tmp_path / "features" / "replaced.npy").unlink()
    caplog.set_level(logging.INFO)
    assert not features_of(tmp_path).replaced.any()
    assert not caplog.messages  # nothing was read again


@pytest.mark.parametrize("checksums", [False, True])
def test_other_labels_are_other_features(tmp_path: Path, checksums: bool) -> None:
    shard(tmp_path)
    for label, expected in (None, [-1] * IMAGES), ("coarse", [0, 1] * (IMAGES // 2)), ("fine", [*range(IMAGES)]):
        index_shards(str(tmp_path), StorageConfig(), json_label=label, rebuild=True, checksums=checksums, num_workers=0)
        assert features_of(tmp_path).labels.tolist() == expected


def test_classes_that_the_parts_number_differently_are_refused(tmp_path: Path) -> None:
    photo_folder(tmp_path / "train", 3, each=2)
    photo_folder(tmp_path / "test", 3, each=2)
    (tmp_path / "test" / "class1").rename(tmp_path / "test" / "class8")
    from dist_ssl.data.given import train_and_test

    train, test = train_and_test(str(tmp_path), StorageConfig())
    config = config_of(tmp_path, train_shards=train, test_shards=test)
    with pytest.raises(UserError, match=r"class 1 is 'class1' in .*train.* and 'class2' in .*test.*; give both"):
        evaluate.evaluate(subject_of(config, tmp_path / "out"), CPU)


def test_the_views_of_a_page_need_not_divide_into_slices_or_chunks() -> None:
    config = with_overrides(Config(), ["train.global_batch_size=4096", "model.batch_norm_images=256"])
    few = in_batches_of(12, config, num_workers=0)
    assert (few.train.global_batch_size, few.objective.chunks, few.data.num_workers) == (12, 1, 0)
    assert few.augment == config.augment


@pytest.mark.parametrize("encoder", ["resnet18_small", "vit_s_16"])
def test_a_copy_to_fine_tune_has_its_own_blocks_where_they_are_computed_again(encoder: str) -> None:
    settings = [f"model.encoder={encoder}", "augment.crop_size=16", "model.activation_checkpointing=true"]
    model = build_model(with_overrides(Config(), settings)).eval().requires_grad_(False)
    tuned = copy_of(Readable(model.encoder, model.head)).encoder.train().requires_grad_(True)
    tuned(torch.randn(4, 3, 16, 16)).sum().backward()
    assert [name for name, parameter in tuned.named_parameters() if parameter.grad is None] == []
    assert all(parameter.grad is None for parameter in model.parameters())
