"""Images without shards: what is trained on is what lies in the folder, by the same plan, and what changed is told."""

from __future__ import annotations

import gzip
import json
import os
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from dist_ssl import config as configuration
from dist_ssl.config import Config, StorageConfig, UserError
from dist_ssl.data.commands import app
from dist_ssl.data.decode import decode
from dist_ssl.data.in_place_index import index_in_place
from dist_ssl.data.indexing import verify_shards
from dist_ssl.data.manifest import Manifest, load_manifest, read_member_index
from dist_ssl.data.reader import Reader
from dist_ssl.data.shards import write_shards
from dist_ssl.data.sources import open_source
from dist_ssl.data.stream import plan_of
from dist_ssl.planning.before_start import check_config
from dist_ssl.planning.doctor import store
from launch.checks import absolute
from tests import terminal
from tests.stream.consumed import BATCH, Ledger, config_of, consume, part
from tests.test_shards import photo_folder

LOCAL = StorageConfig()


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """60 photographs of three classes, indexed 16 a part."""
    monkeypatch.setattr("dist_ssl.data.in_place_index.PART_SAMPLES", 16)
    root = photo_folder(tmp_path / "photos")
    index_in_place(f"folder:{root}", LOCAL, num_workers=0)
    return root


def keys_and_bytes(manifest: Manifest) -> dict[str, bytes]:
    """Every sample, as the reader gives it."""
    reader, found = Reader(manifest, LOCAL, Config().data), {}
    for number, shard in enumerate(manifest.shards):
        index = read_member_index(shard, LOCAL)
        members = np.arange(len(index))
        for member, data in zip(members.tolist(), reader.images(np.full(len(index), number), members), strict=True):
            assert isinstance(data, bytes)
            found[index.keys[member]] = data
    reader.close()
    return found


def test_every_file_is_listed_once_where_it_is(photos: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in photos.rglob("*.*") if path.is_file()}
    manifest = load_manifest(f"folder:{photos}", LOCAL)
    assert [shard.num_samples for shard in manifest.shards] == [15, 15, 15, 15]
    assert manifest.classes == ("class0", "class1", "class2")
    files = {str(path.relative_to(photos)): path.read_bytes() for path in photos.glob("class*/*")}
    assert keys_and_bytes(manifest) == files
    for shard in manifest.shards:
        index = read_member_index(shard, LOCAL)
        assert [f"class{label}" for label in index.labels.tolist()] == [key.split("/")[0] for key in index.keys]
        assert len(set(index.labels.tolist())) == 3  # class-sorted folders are mixed
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert verify_shards(f"folder:{photos}", LOCAL, max_pixels=10**6, num_workers=0) == []


def config_for(root: Path) -> Config:
    return configuration.with_overrides(config_of(), [f"data.shards={json.dumps(f'folder:{root}')}", "data.streams=2"])


def test_ranks_workers_and_resumes_change_nothing(photos: Path) -> None:
    config = config_for(photos)
    manifest = load_manifest(config.data.shards, LOCAL)
    quiet: Ledger = consume(config, manifest, steps=4)
    first = [quiet[position][0].split("/", 1)[1] for position in range(60)]
    assert sorted(first) == sorted(str(path.relative_to(photos)) for path in photos.glob("class*/*"))
    two_workers = configuration.with_overrides(config, ["data.num_workers=2"])
    assert consume(two_workers, manifest, steps=4, world_size=2) == quiet
    assert consume(config, manifest, cursor=2 * BATCH, steps=2) == part(quiet, 2 * BATCH, 4 * BATCH)


def test_the_folder_may_move_and_its_index_with_it(photos: Path, tmp_path: Path) -> None:
    before = load_manifest(f"folder:{photos}", LOCAL)
    moved = shutil.move(photos, tmp_path / "elsewhere")
    after = load_manifest(f"folder:{moved}", LOCAL)
    assert after.hash == before.hash
    assert len(keys_and_bytes(after)) == 60


def test_an_index_elsewhere_lists_the_same(photos: Path, tmp_path: Path) -> None:
    (manifest,) = index_in_place(f"folder:{photos}", LOCAL, output=str(tmp_path / "index"), num_workers=0)
    assert load_manifest(str(tmp_path / "index"), LOCAL) == manifest
    assert manifest.hash == load_manifest(f"folder:{photos}", LOCAL).hash
    assert len(keys_and_bytes(manifest)) == 60


@pytest.mark.parametrize("change", ["gone", "edited", "longer", "a folder"])
def test_what_changed_since_is_named_and_ends_the_run(photos: Path, change: str) -> None:
    file = photos / "class1" / "3.JPEG"
    data = bytearray(file.read_bytes())
    file.unlink()
    if change == "edited":
        data[-5] ^= 1
        file.write_bytes(data)
    elif change == "longer":
        file.write_bytes(data + b"\0")
    elif change == "a folder":
        file.mkdir()
    expected = (
        f"{file}: is {'not the image that was indexed' if change in ('edited', 'longer') else 'gone'}; put it back"
    )
    config = config_for(photos)
    for workers in (0, 1):
        with pytest.raises(UserError) as raised:
            consume(configuration.with_overrides(config, [f"data.num_workers={workers}"]),
                    load_manifest(config.data.shards, LOCAL), steps=2)  # fmt: skip
        assert str(raised.value).startswith(expected)
        assert "\n" not in str(raised.value)
    (damage,) = verify_shards(f"folder:{photos}", LOCAL, num_workers=0)
    assert damage.key == "class1/3.JPEG"


@pytest.mark.parametrize(
    "options", [[], ["--output", "the index"], ["--test-fraction", "0.3", "--seed", "2", "--output", "two"]], ids=str
)
def test_the_command_that_a_changed_folder_advises_lists_it_anew(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    root = photos.rename(tmp_path / "my photos")
    assert CliRunner().invoke(app, ["index", f"folder:{root}", "--rebuild", *options]).exit_code == 0
    place = f"folder:{root}" if not options else "two/train" if "--seed" in options else options[1]
    before = load_manifest(place, LOCAL)
    keys = set(keys_and_bytes(before))
    key = read_member_index(before.shards[0], LOCAL).keys[0]
    (root / key).write_bytes((root / key).read_bytes() + b"\0")
    with pytest.raises(UserError, match=r"is not the image that was indexed; put it back and start again") as told:
        keys_and_bytes(before)
    command = shlex.split(str(told.value).split("as they are now: ")[1])
    assert command[:3] == ["dist-ssl", "shards", "index"]
    done = CliRunner().invoke(app, command[2:])
    assert done.exit_code == 0, done.output
    after = load_manifest(place, LOCAL)
    assert set(keys_and_bytes(after)) == keys
    assert after.details == before.details | {"files": after.details["files"]}


def test_the_command_that_an_unindexed_folder_advises_indexes_it(photos: Path, tmp_path: Path) -> None:
    root = photos.rename(tmp_path / "my photos")
    shutil.rmtree(root / ".dist_ssl")
    for place in (f"folder:{root}", f"folder:{root}/test"):
        with pytest.raises(UserError, match="not indexed yet") as told:
            load_manifest(place, LOCAL)
        command = shlex.split(str(told.value).split("`")[1])
        assert CliRunner().invoke(app, command[2:]).exit_code == 0
        assert load_manifest(place, LOCAL).num_samples == (6 if place.endswith("test") else 60)


def test_an_interrupted_index_goes_on_and_one_of_a_changed_folder_does_not_lie(photos: Path) -> None:
    place = photos / ".dist_ssl"
    before = load_manifest(f"folder:{photos}", LOCAL)
    (place / "manifest.json").unlink()
    (place / "000002.idx").unlink()
    with pytest.raises(UserError, match="not indexed yet; run `dist-ssl shards index folder:"):
        load_manifest(f"folder:{photos}", LOCAL)
    written = (place / "000001.idx").stat().st_mtime_ns
    assert index_in_place(f"folder:{photos}", LOCAL, num_workers=0)[0].hash == before.hash
    assert (place / "000001.idx").stat().st_mtime_ns == written
    (photos / "class0" / "0.png").write_bytes((photos / "class0" / "2.png").read_bytes())
    (after,) = index_in_place(f"folder:{photos}", LOCAL, num_workers=0)
    assert after.hash != before.hash
    assert len(keys_and_bytes(after)) == 60
    file = photos / "class0" / "4.png"  # of the same size: only reading tells
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    (rebuilt,) = index_in_place(f"folder:{photos}", LOCAL, num_workers=0, rebuild=True)
    assert rebuilt.hash != after.hash


def test_train_and_test_share_no_image(photos: Path) -> None:
    for i in range(20):
        shutil.copy(next((photos / "class0").glob(f"{i}.*")), photos / "class1" / f"copy{i}.png")
    index_in_place(f"folder:{photos}", LOCAL, test_fraction=0.3, num_workers=0)
    train, test = (load_manifest(f"folder:{photos}/{name}", LOCAL) for name in ("train", "test"))
    assert train.num_samples + test.num_samples == 80
    assert not set(keys_and_bytes(train).values()) & set(keys_and_bytes(test).values())
    # A folder that is called so goes before a part.
    index_in_place(f"folder:{photo_folder(photos / 'train', 1)}", LOCAL, num_workers=0)
    assert load_manifest(f"folder:{photos}/train", LOCAL).num_samples == 20


def test_what_is_no_image_is_left_out_and_named(photos: Path, caplog: pytest.LogCaptureFixture) -> None:
    (photos / "class0" / "page.jpg").write_bytes(b"<html>404</html>")
    os.mkfifo(photos / "class0" / "pipe.jpg")
    (photos / "class0" / ".hidden").mkdir()
    shutil.copy(photos / "class0" / "1.JPEG", photos / "class0" / ".hidden" / "1.JPEG")
    index_in_place(f"folder:{photos}", LOCAL, num_workers=0)
    assert load_manifest(f"folder:{photos}", LOCAL).num_samples == 60
    assert "1 of 61 files left out, such as class0/page.jpg (not a JPEG" in caplog.text
    assert "pipe.jpg: no ordinary file" in caplog.text


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    root = photo_folder(tmp_path / "photos", 1, each=3)
    os.rename(os.fsencode(root / "class0" / "0.png"), os.fsencode(root / "class0") + b"/caf\xe9.png")
    (manifest,) = index_in_place(f"folder:{root}", LOCAL, num_workers=0)
    assert len(keys_and_bytes(manifest)) == 3
    json.dumps(list(keys_and_bytes(manifest)))  # as ledgers write them


def test_a_hostile_index_reads_nothing_outside_of_the_folder(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes((photos / "class0" / "0.png").read_bytes())
    place = photos / ".dist_ssl" / "000000.idx"
    manifest = load_manifest(f"folder:{photos}", LOCAL)
    for name in ("../secret.png", str(tmp_path / "secret.png"), "class0/../../secret.png"):
        index = read_member_index(manifest.shards[0], LOCAL)
        keys = [name, *list(index.keys)[1:]]
        place.write_bytes(type(index)(**{**vars(index), "keys": keys}).to_bytes())
        reader = Reader(manifest, LOCAL, Config().data)
        with pytest.raises(UserError, match="names may not be absolute or hold"):
            reader.images(np.array([0]), np.array([0]))


@pytest.mark.parametrize("zipped", [False, True])
def test_an_idx_file_gives_the_pixels_that_its_shards_would(tmp_path: Path, zipped: bool) -> None:
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (40, 9, 7), dtype=np.uint8), rng.integers(0, 10, 40, dtype=np.uint8)
    opened = gzip.open if zipped else open
    for name, array in (("images", pixels), ("labels", labels)):
        head = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
        with opened(tmp_path / name, "wb") as file:
            file.write(head + array.tobytes())
    spec = f"idx:{tmp_path}/images:{tmp_path}/labels"
    (in_place,) = index_in_place(spec, LOCAL, num_workers=0)
    assert load_manifest(spec, LOCAL) == in_place
    (shards,) = write_shards(open_source(spec), str(tmp_path / "out"), LOCAL, num_workers=0)
    assert len(in_place.shards) == len(shards.shards) == 1
    ours, theirs = (read_member_index(one.shards[0], LOCAL) for one in (in_place, shards))
    assert list(ours.keys) == list(theirs.keys)
    assert ours.labels.tolist() == theirs.labels.tolist()
    decoded = [
        {key: np.asarray(decode(data, 10**6)) for key, data in keys_and_bytes(one).items()}
        for one in (in_place, shards)
    ]
    for i, key in enumerate(sorted(decoded[0])):
        np.testing.assert_array_equal(decoded[0][key], decoded[1][key])
        np.testing.assert_array_equal(decoded[0][key][..., 0], pixels[i])
    pixels[3, 0, 0] ^= 1
    with opened(tmp_path / "images", "wb") as file:
        file.write(bytes((0, 0, 8, 3)) + np.array(pixels.shape, ">u4").tobytes() + pixels.tobytes())
    from dist_ssl.data import idx

    idx.read.cache_clear()
    with pytest.raises(UserError, match="images, image 00000003: is not the image that was indexed") as told:
        keys_and_bytes(in_place)
    assert str(told.value).endswith(f": dist-ssl shards index {spec} --rebuild")


def test_a_place_that_cannot_be_written_to_is_told(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(photos / ".dist_ssl")
    (photos / ".dist_ssl").write_text("")  # root may write anywhere, but not into a file
    with pytest.raises(UserError, match=r"name another folder by `dist-ssl shards index \.\.\. --output FOLDER`"):
        index_in_place(f"folder:{photos}", LOCAL, num_workers=0)


def test_command_line_and_what_else_reads_the_place(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = CliRunner()
    done = run.invoke(app, ["index", f"folder:{photos}", "--test-fraction", "0.2", "--workers", "0"])
    assert done.exit_code == 0, done.output
    assert f"{photos}/.dist_ssl/train/manifest.json: 48 samples in 3 shards of 16 to 16" in done.output
    verified = run.invoke(app, ["verify", f"folder:{photos}/test", "--decode", "--workers", "0"])
    assert verified.output.endswith("whole: every byte of 1 shards was compared, every image was decoded\n")
    config = config_for(photos)
    check_config(config, 1)
    assert [finding.remedy for finding in store(config)] == [None, None]
    monkeypatch.chdir(photos.parent)
    assert absolute(config_for(Path("photos"))).data.shards == f"folder:{photos}"


@pytest.mark.slow
def test_a_run_whose_folder_changes_ends_in_one_line_and_goes_on_once_it_is_mended(
    photos: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    command = [sys.executable, "-m", "dist_ssl.cli", "pretrain", "configs/debug_cpu.toml"]
    for setting in (
        f"run.dir={json.dumps(str(run_dir))}", f"data.shards={json.dumps(f'folder:{photos}')}", "data.streams=1",
        "train.global_batch_size=16", "train.steps=3", "checkpoint.every_steps=1", "data.num_workers=0",
    ):  # fmt: skip
        command += ["--set", setting]
    config = configuration.load("configs/debug_cpu.toml", command[6::2])
    plan = plan_of(config, load_manifest(config.data.shards, LOCAL))
    _, (shard,), (member,) = plan.locate(np.array([2 * 16]))  # it is read in the third step
    manifest = load_manifest(config.data.shards, LOCAL)
    file = photos / read_member_index(manifest.shards[shard], LOCAL).keys[member]
    file.rename(tmp_path / "away")
    done = terminal.run(command, timeout=300)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: {file}: is gone; put it back and start again")
    (tmp_path / "away").rename(file)
    done = terminal.run(command, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "going on from step" in done.stderr
    consumed = [json.loads(line)["samples"] for line in (run_dir / "ledger-rank0.jsonl").read_text().splitlines()]
    assert len({key for keys in consumed for _, key in keys}) == 48
