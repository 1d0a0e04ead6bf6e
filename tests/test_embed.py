"""`dist-ssl embed` and its Python: the h of an evaluation, for any folder, with what is bad named and left out."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from dist_ssl import config as configuration
from dist_ssl.cli import app
from dist_ssl.config import StorageConfig, UserError
from dist_ssl.data.decode import BadSample
from dist_ssl.data.in_place_index import index_in_place
from dist_ssl.data.manifest import read_member_index
from dist_ssl.evaluation.embed import embed, images_in, load_encoder, write_embeddings
from dist_ssl.evaluation.features import Split
from tests import engines
from tests.pool import ranks
from tests.test_shards import photo_folder
from tests.trajectory import small_config


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's directory with a checkpoint of step 1."""
    run = tmp_path_factory.mktemp("run")
    settings = small_config(run, "", "evaluation.num_workers=0", "evaluation.batch_size_per_rank=16")
    ranks(1).run(engines.save_after, settings, 1)
    (run / "config.toml").write_text(configuration.dumps(settings))
    return run


def test_h_is_that_of_an_evaluation(trained: Path, tmp_path: Path) -> None:
    root = photo_folder(tmp_path / "photos")
    encoder = load_encoder(trained, device="cpu")
    h = embed(encoder, root)
    assert h.shape == (60, encoder.readable.encoder.output_dim)
    (manifest,) = index_in_place(f"folder:{root}", StorageConfig(), num_workers=0)
    split = Split("test", manifest, encoder.config, torch.device("cpu"))
    with torch.inference_mode():
        wanted = torch.cat([encoder.readable.encoder(split.pixels(batch.images)) for batch in split.batches()])
    keys = [key for shard in manifest.shards for key in read_member_index(shard, StorageConfig()).keys]
    rows = dict(zip(keys, wanted, strict=True))
    for path, row in zip(images_in(root), h, strict=True):
        np.testing.assert_allclose(row, rows[str(Path(path).relative_to(root))], atol=1e-5)
    paths = images_in(root)[:3]
    for pictures in (paths, [Path(path).read_bytes() for path in paths], list(map(Image.open, paths))):
        np.testing.assert_allclose(embed(encoder, pictures), h[:3], atol=1e-5)
    assert not any(module.training for module in encoder.readable.encoder.modules())


def test_a_pil_image_is_prepared_as_its_file_is(trained: Path, tmp_path: Path) -> None:
    """Upright, and of 16 bits the high byte."""
    grey, exif = np.arange(40 * 60, dtype=np.uint16).reshape(40, 60) * 27, Image.Exif()
    exif[0x0112] = 6
    Image.fromarray((grey >> 8).astype(np.uint8)).save(tmp_path / "turned.jpg", exif=exif)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    encoder, paths = load_encoder(trained, device="cpu"), images_in(tmp_path)
    opened = list(map(Image.open, paths))
    np.testing.assert_array_equal(embed(encoder, opened), embed(encoder, paths))
    assert [image.size for image in opened] == [(60, 40)] * 2  # the caller's are left as they were
    few = replace(encoder, config=configuration.with_overrides(encoder.config, ["data.max_pixels=2399"]))
    with pytest.raises(BadSample, match="an image: 60x40 pixels, more than"):
        embed(few, opened)


def test_command_line_and_what_is_bad(trained: Path, tmp_path: Path) -> None:
    root, out = photo_folder(tmp_path / "photos", 1), tmp_path / "h.npy"
    (root / "class0" / "2b.jpg").write_bytes(b"<html>404</html>")
    shutil.copy(root / "class0" / "1.JPEG", root / "loose.JPG")
    done = CliRunner().invoke(app, ["embed", str(trained), str(root), str(out)])
    assert done.exit_code == 0, done.output
    described = json.loads((tmp_path / "h.json").read_text())
    assert (described["step"], described["run"]) == (1, str(trained))
    assert described["paths"] == [path for path in images_in(root) if not path.endswith("2b.jpg")]
    encoder = load_encoder(trained, device="cpu")
    np.testing.assert_allclose(np.load(out), embed(encoder, described["paths"]), atol=1e-6)
    with pytest.raises(BadSample, match=r"2b\.jpg: not a JPEG"):
        embed(encoder, root)


def test_parquet(trained: Path, tmp_path: Path) -> None:
    root, out = photo_folder(tmp_path / "photos", 1, each=3), tmp_path / "h.parquet"
    parquet = pytest.importorskip("pyarrow.parquet")
    assert CliRunner().invoke(app, ["embed", str(trained), str(root), str(out)]).exit_code == 0
    table = parquet.read_table(out)
    assert table["path"].to_pylist() == images_in(root)
    encoder = load_encoder(trained, device="cpu")
    h = embed(encoder, root)
    np.testing.assert_allclose(np.array(table["h"].to_pylist()), h, atol=1e-6)
    write_embeddings(out, h[:1], [os.fsdecode(b"caf\xe9/1.jpg")], encoder)
    assert parquet.read_table(out)["path"].to_pylist() == [r"caf\udce9/1.jpg"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["photos", "h.csv"], "expected a name that ends in .npy or .parquet"),
        (["empty", "h.npy"], "empty: no jpg, jpeg"),
        (["photos", "none/h.npy"], "h.npy: expected a folder that exists and that you may write to"),
        (["photos", "h.npy", "--checkpoint", "7"], "expected a checkpoint of step 7"),
    ],
)
def test_mistakes(trained: Path, tmp_path: Path, arguments: list[str], expected: str) -> None:
    photo_folder(tmp_path / "photos", 1, each=3)
    (tmp_path / "empty").mkdir()
    folder, file, *rest = arguments
    done = CliRunner().invoke(app, ["embed", str(trained), str(tmp_path / folder), str(tmp_path / file), *rest])
    assert isinstance(done.exception, UserError)
    assert expected in str(done.exception)
    assert not (tmp_path / "h.npy").exists()
