"""Writing shards: what comes out is what went in, permuted, the same each time, and an interrupted write goes on."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner
from webdataset.tariterators import group_by_keys, tar_file_expander

from dist_ssl.config import DataConfig, StorageConfig, UserError
from dist_ssl.data.commands import app
from dist_ssl.data.decode import ENDINGS, decode
from dist_ssl.data.indexing import index_shards, verify_shards
from dist_ssl.data.manifest import Manifest, load_manifest, read_member_index
from dist_ssl.data.shards import LEFT_OUT, write_shards
from dist_ssl.data.sources import FolderSource, open_source
from dist_ssl.evaluation.embed import images_in
from tests.s3 import s3_server

LOCAL = StorageConfig()


def read_back(manifest: Manifest) -> list[dict[str, Any]]:
    """All samples, by webdataset."""
    samples: list[dict[str, Any]] = []
    for shard in manifest.shards:
        with open(shard.url, "rb") as file:
            samples += list(group_by_keys(tar_file_expander([{"url": shard.url, "stream": file}])))
    return samples


def photo_folder(root: Path, classes: int = 3, each: int = 20) -> Path:
    rng = np.random.default_rng(0)
    for label in range(classes):
        (root / f"class{label}").mkdir(parents=True)
        for i in range(each):
            image = Image.fromarray(rng.integers(0, 256, (30 + i, 40, 3), dtype=np.uint8))
            image.save(root / f"class{label}" / f"{i}.{'JPEG' if i % 2 else 'png'}")
    return root


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_a_class_folder_comes_back_byte_for_byte(tmp_path: Path) -> None:
    root = photo_folder(tmp_path / "photos")
    source = open_source(f"folder:{root}")
    (manifest,) = write_shards(source, str(tmp_path / "out"), LOCAL, shard_mb=0.05, num_workers=0)
    assert len(manifest.shards) > 2
    assert manifest.classes == ("class0", "class1", "class2")
    assert load_manifest(str(tmp_path / "out"), LOCAL) == manifest
    samples = read_back(manifest)
    assert len({sample["__key__"] for sample in samples}) == 60 == manifest.num_samples
    originals = {path.read_bytes(): path for path in root.rglob("*.*")}
    labels = []
    for sample in samples:
        path = originals.pop(sample.get("jpeg") or sample["png"])
        assert path.parent.name == f"class{int(sample['cls'])}"
        labels.append(int(sample["cls"]))
    assert not originals
    # Class-sorted folders would ruin the negatives: no shard-sized stretch is of one class.
    assert all(len(set(labels[i : i + 12])) == 3 for i in range(0, 48, 12))
    index = [label for shard in manifest.shards for label in read_member_index(shard, LOCAL).labels.tolist()]
    assert index == labels


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    root = photo_folder(tmp_path / "photos", 1)
    (manifest,) = write_shards(open_source(f"folder:{root}/class0"), str(tmp_path / "out"), LOCAL, num_workers=0)
    assert manifest.num_samples == 20
    assert "cls" not in read_back(manifest)[0]
    assert set(read_member_index(manifest.shards[0], LOCAL).labels.tolist()) == {-1}


@pytest.mark.slow
def test_shards_are_the_same_whatever_the_workers_and_what_an_index_of_them_says(tmp_path: Path) -> None:
    source = open_source("shapes:300:16", seed=5)
    (one,) = write_shards(source, str(tmp_path / "a"), LOCAL, seed=5, shard_mb=0.1, num_workers=0)
    (two,) = write_shards(source, str(tmp_path / "b"), LOCAL, seed=5, shard_mb=0.1, num_workers=2)
    assert len(one.shards) > 3
    assert contents(tmp_path / "a").keys() == contents(tmp_path / "b").keys()
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    (other,) = write_shards(open_source("shapes:300:16"), str(tmp_path / "c"), LOCAL, shard_mb=0.1, num_workers=0)
    assert other.hash != one.hash == two.hash
    again = index_shards(str(tmp_path / "a"), LOCAL, output=str(tmp_path / "i"), checksums=True, num_workers=0)
    assert again.hash == one.hash
    assert verify_shards(str(tmp_path / "a"), LOCAL, num_workers=0) == []


def test_train_and_test_share_no_image_though_files_are_copied(tmp_path: Path) -> None:
    root = photo_folder(tmp_path / "photos")
    for i in range(20):  # every image of one class also stands in another
        (root / "class1" / f"copy{i}.png").write_bytes(
            next(path for path in (root / "class0").glob(f"{i}.*")).read_bytes()
        )
    source = open_source(f"folder:{root}")
    train, test = write_shards(source, str(tmp_path / "out"), LOCAL, test_fraction=0.3, num_workers=0)
    assert train.url == str(tmp_path / "out" / "train" / "manifest.json")
    assert train.num_samples + test.num_samples == 80
    assert 24 <= test.num_samples <= 45

    def digests(manifest: Manifest) -> set[bytes]:
        return {sample.get("jpeg") or sample["png"] for sample in read_back(manifest)}

    assert not digests(train) & digests(test)


def test_resize_scales_the_shorter_side_down_only(tmp_path: Path) -> None:
    root = photo_folder(tmp_path / "photos", 1)
    (manifest,) = write_shards(open_source(f"folder:{root}"), str(tmp_path / "out"), LOCAL, resize=35, num_workers=0)
    sizes = {Image.open(io.BytesIO(s.get("jpg") or s.get("jpeg") or s["png"])).size for s in read_back(manifest)}
    assert (40, 30) in sizes
    assert max(min(size) for size in sizes) == 35
    assert len(sizes) > 3


def test_files_that_are_no_images_are_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = photo_folder(tmp_path / "photos", 1)
    (root / "class0" / "page.jpg").write_bytes(b"<html>404</html>")
    (root / "class0" / "empty.png").write_bytes(b"")
    source = open_source(f"folder:{root}")
    (manifest,) = write_shards(source, str(tmp_path / "out"), LOCAL, shard_mb=0.02, num_workers=0)
    assert manifest.num_samples == 20
    (told,) = [record.getMessage() for record in caplog.records]
    assert "2 of 22 files left out as bad" in told
    assert f"{root}/class0/page.jpg (not a JPEG, PNG, WEBP, TIFF, BMP, GIF image" in told
    assert f"{root}/class0/empty.png (empty)" in told
    (again,) = write_shards(source, str(tmp_path / "out"), LOCAL, shard_mb=0.02, num_workers=2)
    assert again == manifest, "going on with a whole write changes nothing"
    (resized,) = write_shards(source, str(tmp_path / "small"), LOCAL, resize=20, num_workers=0)
    assert [sample["__key__"] for sample in read_back(resized)] == [s["__key__"] for s in read_back(manifest)]
    for path in (root / "class0").glob("[0-9]*"):
        path.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"none of 22 files is a good image: .*\(not a JPEG"):
        write_shards(source, str(tmp_path / "none"), LOCAL, num_workers=0)


def test_every_format_is_taken_and_what_is_left_out_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "photos"
    (root / "a" / "deep").mkdir(parents=True)
    for i, ending in enumerate([*ENDINGS, "TIFF"]):
        Image.new("RGB", (30, 20), (10 * i, 0, 0)).save(root / "a" / "deep" / f"{i}.{ending}")
    for name in ("a/1.txt", "a/2.txt", "a/scene.eps", "loose.png", "a/.DS_Store"):
        (root / name).write_bytes(b"%!PS")
    source = open_source(f"folder:{root}")
    (told,) = [record.getMessage() for record in caplog.records]
    assert f"left out: 1 .eps (such as {root}/a/scene.eps), 2 .txt (such as {root}/a/1.txt), 1 beside" in told
    assert f"(such as {root}/loose.png); taken are jpg, jpeg, png, webp, tif, tiff, bmp, gif" in told
    (manifest,) = write_shards(source, str(tmp_path / "out"), LOCAL, num_workers=0)
    assert manifest.num_samples == len(ENDINGS) + 1
    again = index_shards(str(tmp_path / "out"), LOCAL, output=str(tmp_path / "index"), checksums=True, num_workers=0)
    assert again.hash == manifest.hash, "an index knows the same endings"
    for path in (root / "a" / "deep").iterdir():
        path.rename(path.with_suffix(".psd"))
    with pytest.raises(UserError, match=r"holds no jpg, .* files; its files are 1 .eps \(such as .*, 9 .psd"):
        open_source(f"folder:{root}")


def test_images_that_training_could_not_decode_stay_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Half a JPEG, and one of too many pixels; what was left out is listed, also by a write that only goes on."""
    root, out = photo_folder(tmp_path / "photos", 1), tmp_path / "out"
    whole = (root / "class0" / "1.JPEG").read_bytes()
    for i in range(12):
        (root / "class0" / f"cut{i}.jpg").write_bytes(whole[: len(whole) // 2 + i])
    Image.new("RGB", (60, 60)).save(root / "class0" / "large.png")
    limits = DataConfig(max_pixels=3000, max_bad_fraction=0.013)
    source = open_source(f"folder:{root}")
    (manifest,) = write_shards(source, str(out), LOCAL, shard_mb=0.02, data=limits, num_workers=0)
    assert manifest.num_samples == 20
    (out / "manifest.json").unlink()  # as if killed before the end
    (out / "writing.json").write_text(json.dumps(manifest.details))
    caplog.clear()
    (again,) = write_shards(source, str(out), LOCAL, shard_mb=0.02, data=limits, num_workers=0)
    assert again == manifest
    (told,) = [record.getMessage() for record in caplog.records]
    assert "13 of 33 files left out as bad" in told
    assert f"all are listed in *{LEFT_OUT} beside the shards" in told
    listed = [json.loads(line) for path in out.glob(f"*{LEFT_OUT}") for line in path.read_text().splitlines()]
    reasons = {Path(entry["file"]).name: entry["reason"] for entry in listed}
    assert set(reasons) == {"large.png", *(f"cut{i}.jpg" for i in range(12))}
    assert reasons["large.png"] == "60x60 pixels, more than data.max_pixels = 3000"
    assert "truncated" in reasons["cut3.jpg"]
    assert verify_shards(str(out), LOCAL, max_pixels=3000, num_workers=0) == []


def test_too_many_bad_files_are_no_data_set(tmp_path: Path) -> None:
    root, out = photo_folder(tmp_path / "photos", 1), tmp_path / "out"
    for i in range(11):
        (root / "class0" / f"bad{i}.jpg").write_bytes(b"<html>404</html>")
    source = open_source(f"folder:{root}")
    with pytest.raises(UserError, match=r"11 of 31 files are bad, more than data.max_bad_fraction = 0.01 of them \(of"):
        write_shards(source, str(out), LOCAL, num_workers=0)
    assert not (out / "manifest.json").exists()
    (manifest,) = write_shards(source, str(out), LOCAL, data=DataConfig(max_bad_fraction=1.0), num_workers=0)
    assert manifest.num_samples == 20


def test_verify_decodes_what_was_written_unseen(tmp_path: Path) -> None:
    root, out = photo_folder(tmp_path / "photos", 1), tmp_path / "out"
    whole = (root / "class0" / "1.JPEG").read_bytes()
    (root / "class0" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    Image.new("RGB", (60, 60)).save(root / "class0" / "large.png")
    source = open_source(f"folder:{root}")
    (manifest,) = write_shards(source, str(out), LOCAL, shard_mb=0.02, decode_images=False, num_workers=0)
    assert manifest.num_samples == 22
    assert verify_shards(str(out), LOCAL, num_workers=0) == [], "its bytes are whole"
    damages = verify_shards(str(out), LOCAL, max_pixels=3000, num_workers=2)
    assert sorted(damage.reason.split(",")[0].split(" (")[0] for damage in damages) == [
        "60x60 pixels",
        "OSError: image file is truncated",
    ]
    assert all(damage.key for damage in damages)


@pytest.mark.slow
def test_a_write_that_was_killed_goes_on(tmp_path: Path) -> None:
    """kill -9 in the middle, the same command again: the same shards, and whole ones are not written again."""
    source = open_source("shapes:3000:16")
    write_shards(source, str(tmp_path / "whole"), LOCAL, shard_mb=0.2, num_workers=0)
    command = [
        sys.executable, "-m", "dist_ssl.cli", "shards", "write", "shapes:3000:16", str(tmp_path / "killed"),
        "--shard-mb", "0.2", "--workers", "1",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "killed").glob("*.idx"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (tmp_path / "killed" / "manifest.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob("*.idx")}
    assert len(kept) >= 3
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert {path.stat().st_mtime_ns for path in kept} == set(kept.values())
    for leftover in (tmp_path / "killed").glob(".*"):
        leftover.unlink()  # the temporary file of the write that was killed
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_destination_of_other_shards_is_refused(tmp_path: Path) -> None:
    write_shards(open_source("shapes:20:16"), str(tmp_path), LOCAL, num_workers=0)
    write_shards(open_source("shapes:20:16"), str(tmp_path), LOCAL, num_workers=0)
    for other, options, asked in (
        ("shapes:30:16", {}, r"source shapes:30:16 instead of shapes:20:16"),
        ("shapes:20:16", {"seed": 3, "resize": 9}, "seed 3 instead of 0, resize 9 instead of None"),
        ("shapes:20:16", {"data": DataConfig(max_pixels=70_000_000)}, "max_pixels 70000000 instead of 50000000"),
    ):
        expected = f"{tmp_path}: holds shards of shapes:20:16 already; asked for {asked}: choose another destination"
        with pytest.raises(UserError) as error:
            write_shards(open_source(other), str(tmp_path), LOCAL, num_workers=0, **options)  # type: ignore[arg-type]
        assert str(error.value) == expected + ", or empty it"
    manifest = tmp_path / "manifest.json"
    values = json.loads(manifest.read_text())
    del values["details"]["decoded"], values["details"]["max_pixels"]
    manifest.write_text(json.dumps(values))
    write_shards(open_source("shapes:20:16"), str(tmp_path), LOCAL, num_workers=0)  # of an older version
    manifest.write_text("{")
    with pytest.raises(UserError, match=r"its manifest.json is damaged; remove it"):
        write_shards(open_source("shapes:20:16"), str(tmp_path), LOCAL, num_workers=0)


def test_a_folder_that_changed_since_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Going on by another listing would write some images twice and others never."""
    root = photo_folder(tmp_path / "photos", 1)

    def write() -> list[Manifest]:
        return write_shards(open_source(f"folder:{root}"), str(tmp_path / "out"), LOCAL, shard_mb=0.02, num_workers=0)

    write()
    for interrupted in (False, True):
        if interrupted:
            (tmp_path / "out" / "manifest.json").rename(tmp_path / "manifest.json")
            details = json.loads((tmp_path / "manifest.json").read_text())["details"]
            (tmp_path / "out" / "writing.json").write_text(json.dumps(details))
        write()
        moved = next((root / "class0").iterdir())
        moved.rename(root / "class0" / f"z{moved.name}")
        with pytest.raises(UserError, match="held other files; put those back to go on, or choose another destination"):
            write()
        (root / "class0" / f"z{moved.name}").rename(moved)
    (root / "class0" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    caplog.clear()
    write()
    assert "1 files are left out, being unreadable, such as" in caplog.text


def test_straight_to_s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "store" / "bucket").mkdir(parents=True)
    with s3_server(tmp_path / "store") as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        config = StorageConfig(endpoint_url=server.endpoint_url)
        source = open_source("shapes:100:16")
        (there,) = write_shards(source, "s3://bucket/shapes", config, shard_mb=0.1, num_workers=0)
        (here,) = write_shards(source, str(tmp_path / "here"), LOCAL, shard_mb=0.1, num_workers=0)
        assert there.hash == here.hash == load_manifest("s3://bucket/shapes", config).hash
        assert verify_shards("s3://bucket/shapes", config, num_workers=0) == []
        assert verify_shards("s3://bucket/shapes", config, max_pixels=10**6, num_workers=0) == []
        assert len(verify_shards("s3://bucket/shapes", config, max_pixels=100, num_workers=0)) == 100
        indexed = index_shards(
            "s3://bucket/shapes", config, output=str(tmp_path / "index"), checksums=True, num_workers=0
        )
        assert indexed.hash == there.hash
        local = load_manifest(str(tmp_path / "index"), config)
        assert local.shards[0].url == "s3://bucket/shapes/000000.tar"
        secret = server.environment["AWS_SECRET_ACCESS_KEY"]
    for path in (tmp_path / "store").rglob("*"):
        assert path.is_dir() or secret.encode() not in path.read_bytes()


@pytest.mark.parametrize(
    "spec",
    ["shapes:", "shapes:x", "shapes:0", "shapes:5:4", "shapes:5:5:5", "folder:", "folder:/nonexistent", "pipe:ls",
     "torchvision:Nothing:/x", "torchvision:CIFAR10", "torchvision:CIFAR10:/nonexistent", ""],
)  # fmt: skip
def test_sources_that_are_none(spec: str) -> None:
    with pytest.raises(UserError):
        open_source(spec)


@pytest.mark.timeout(30)  # without an end a test would not end either
def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    root = photo_folder(tmp_path / "photos", 2)
    elsewhere = photo_folder(tmp_path / "elsewhere", 1, each=5) / "class0"
    (root / "class0" / "more").symlink_to(elsewhere)
    (root / "class0" / "again").symlink_to(elsewhere)
    (root / "class1" / "up").symlink_to("..")
    (root / "class1" / "round").mkdir()
    (root / "class1" / "round" / "about").symlink_to("..")
    source = open_source(f"folder:{root}")
    assert isinstance(source, FolderSource)
    assert source.labels == [0] * 25 + [1] * 20
    assert len(set(map(os.path.realpath, source.paths))) == len(images_in(root)) == 45


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no jpg"):
        open_source(f"folder:{tmp_path}")


def test_torchvision_sets(tmp_path: Path) -> None:
    """FakeData needs no files; an image folder keeps the bytes of its files."""
    photo_folder(tmp_path / "photos")
    source = open_source(f"torchvision:ImageFolder:{tmp_path / 'photos'}")
    assert len(source) == 60
    (sample,) = source.read([30])
    assert sample.image == Path(source._dataset.samples[30][0]).read_bytes()  # type: ignore[attr-defined]
    (manifest,) = write_shards(source, str(tmp_path / "out"), LOCAL, num_workers=0)
    assert manifest.classes == ("class0", "class1", "class2")
    assert manifest.num_samples == 60


@pytest.mark.slow
def test_command_line(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "dist_ssl.cli", "shards", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"})

    written = run("write", "shapes:40:16", str(tmp_path / "x"), "--test-fraction", "0.25", "--workers", "1")
    assert written.returncode == 0, written.stderr
    assert "30 samples in 1 shards" in written.stdout
    assert "10 samples in 1 shards" in written.stdout
    indexed = run("index", str(tmp_path / "x" / "train"), "--output", str(tmp_path / "i"), "--workers", "1")
    assert indexed.returncode == 0, indexed.stderr
    assert run("verify", str(tmp_path / "i"), "--workers", "1").returncode == 0
    shard = tmp_path / "x" / "train" / "000000.tar"
    shard.write_bytes(shard.read_bytes()[:-11_000])
    decoding = ["verify", str(tmp_path / "x" / "test"), "--decode", "--set", "data.max_pixels=99", "--workers=1"]
    undecodable = CliRunner().invoke(app, decoding)
    assert undecodable.exit_code == 1
    assert undecodable.stdout.count("16x16 pixels, more than data.max_pixels = 99") == 10
    explained = CliRunner().invoke(app, ["write", "--help"]).stdout
    assert all(f".{ending}" in explained for ending in ENDINGS)
    damaged = run("verify", str(tmp_path / "x" / "train"), "--workers", "1")
    assert damaged.returncode == 1
    assert "000000.tar: holds" in damaged.stdout
    wrong = run("write", "pipe:ls", str(tmp_path / "y"))
    assert wrong.returncode == 2
    assert wrong.stderr.count("\n") == 1
    assert wrong.stderr.startswith("error: pipe:ls: expected shapes:COUNT")


# --- IDX ----------------------------------------------------------------------------------------------------------


def idx(path: Path, array: np.ndarray[Any, Any], kind: int = 8, zipped: bool = True, claimed: Any = None) -> Path:
    sizes = array.shape if claimed is None else claimed
    data = bytes((0, 0, kind, len(sizes))) + b"".join(size.to_bytes(4) for size in sizes) + array.tobytes()
    path.write_bytes(gzip.compress(data) if zipped else data)
    return path


PIXELS = np.random.default_rng(0).integers(0, 256, (30, 9, 14), dtype=np.uint8)


@pytest.mark.parametrize("zipped", [False, True])
def test_idx_comes_back_pixel_for_pixel(tmp_path: Path, zipped: bool) -> None:
    images = idx(tmp_path / "images", PIXELS, zipped=zipped)
    labels = idx(tmp_path / "labels", np.arange(30, dtype=np.uint8) % 7, zipped=zipped)
    (manifest,) = write_shards(open_source(f"idx:{images}:{labels}"), str(tmp_path / "out"), LOCAL, num_workers=0)
    assert manifest.classes == tuple("0123456")
    assert manifest.num_samples == 30
    for sample in read_back(manifest):
        index = int(sample["__key__"])
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(sample["png"]))), PIXELS[index])
        assert np.array_equal(np.asarray(decode(sample["png"], 10**6))[:, :, 1], PIXELS[index])
        assert int(sample["cls"]) == index % 7
    unlabelled = open_source(f"idx:{images}")
    assert unlabelled.classes == ()
    assert unlabelled.read([3])[0].label is None


def test_idx_files_that_are_none(tmp_path: Path) -> None:
    images, labels = idx(tmp_path / "images", PIXELS), idx(tmp_path / "labels", np.zeros(30, np.uint8))
    (tmp_path / "cut.gz").write_bytes(images.read_bytes()[:-900])
    (tmp_path / "rotten.gz").write_bytes(images.read_bytes()[:200] + bytes(50) + images.read_bytes()[250:])
    (tmp_path / "empty").write_bytes(b"")
    for spec, expected in (
        (f"{tmp_path}/nothing", "nothing: no such file; expected an IDX file"),
        (f"{tmp_path}", "no such file"),
        (f"{tmp_path}/cut.gz", "cut.gz: not a whole gzip file"),
        (f"{tmp_path}/rotten.gz", "rotten.gz: not a whole gzip file"),
        (f"{tmp_path}/empty", "empty: begins with ; expected 00 00 08 03"),
        (f"{labels}:{images}", "labels: begins with 00 00 08 01; expected 00 00 08 03"),
        (idx(tmp_path / "floats", PIXELS, kind=13), "floats: begins with 00 00 0d 03"),
        (idx(tmp_path / "short", PIXELS[1:], claimed=(30, 9, 14)), "expected 30x9x14 = 3780 bytes .* found only 3654"),
        (idx(tmp_path / "long", PIXELS, claimed=(29, 9, 14)), "expected 29x9x14 = 3654 bytes .* found more"),
        (idx(tmp_path / "none", PIXELS[:0]), "none: empty: 0x9x14"),
        (idx(tmp_path / "huge", PIXELS, claimed=(2**32 - 1,) * 3), "more than the file can hold"),
        (idx(tmp_path / "plain", PIXELS, zipped=False, claimed=(31, 9, 14)), "more than the file can hold"),
        (f"{images}:{idx(tmp_path / 'few', np.zeros(29, np.uint8))}", "30 images, but 29 labels; expected as many"),
    ):
        with pytest.raises(UserError, match=expected):
            open_source(f"idx:{spec}")


FASHION = Path("/usr/share/datasets/fashion-mnist")


@pytest.mark.skipif(not FASHION.is_dir(), reason="needs Debian's dataset-fashion-mnist (installed with CI=true)")
def test_torchvisions_fashion_mnist_is_that_of_its_files(tmp_path: Path) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name, head, each in (("images-idx3", 16, 784), ("labels-idx1", 8, 1)):
        whole = gzip.decompress((FASHION / f"t10k-{name}-ubyte.gz").read_bytes())
        (raw / f"t10k-{name}-ubyte").write_bytes(whole)
        few = whole[:4] + (5).to_bytes(4, "big") + whole[8 : head + 5 * each]
        (raw / f"train-{name}-ubyte").write_bytes(few)  # torchvision wants all four to be there
    source = open_source(f"torchvision:FashionMNIST/test:{tmp_path}")
    ours = open_source(f"idx:{raw}/t10k-images-idx3-ubyte:{raw}/t10k-labels-idx1-ubyte")
    assert len(source) == len(ours) == 10_000
    assert len(open_source(f"torchvision:FashionMNIST:{tmp_path}")) == 5
    assert source.classes[9] == "Ankle boot"
    some = [0, 1, 4711, 9999]
    for one, other in zip(source.read(some), ours.read(some), strict=True):
        assert one.label == other.label
        np.testing.assert_array_equal(decode(one.image, 10**6), decode(other.image, 10**6))
    assert source.read([0])[0].label == 9


@pytest.mark.skipif(not FASHION.is_dir(), reason="needs Debian's dataset-fashion-mnist (installed with CI=true)")
@pytest.mark.slow
def test_fashion_mnist(tmp_path: Path) -> None:
    spec = f"idx:{FASHION}/t10k-images-idx3-ubyte.gz:{FASHION}/t10k-labels-idx1-ubyte.gz"
    (manifest,) = write_shards(open_source(spec), str(tmp_path), LOCAL, shard_mb=8, num_workers=0)
    labels = np.concatenate([read_member_index(shard, LOCAL).labels for shard in manifest.shards])
    assert np.bincount(labels).tolist() == [1000] * 10
    (first,) = [sample for sample in read_back(manifest) if sample["__key__"] == "00000000"]
    assert first["cls"] == b"9", "an ankle boot"
    pixels = gzip.decompress((FASHION / "t10k-images-idx3-ubyte.gz").read_bytes())[16 : 16 + 784]
    assert np.asarray(Image.open(io.BytesIO(first["png"]))).tobytes() == pixels
